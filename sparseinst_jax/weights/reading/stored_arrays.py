"""Arrays that still lie in a file: where they are and what they are, checked before they are read.

Nothing is allocated for an array before its size was compared with the bytes that are there, so a
file cannot ask for more memory than it has bytes.
"""

from __future__ import annotations

import itertools
import math
import operator
import zlib
from collections.abc import Sequence
from typing import BinaryIO, NamedTuple

import numpy as np

# Name of a dtype -> bytes of one element. What weights are made of; complex, quantised and 8-bit
# floating-point arrays are not among them.
_CODES = "f8 f4 f2 i8 i4 i2 i1 u8 u4 u2 u1 b1".split()  # of NumPy, with the bytes
NUMPY_NAMES = {code: np.dtype(code).name for code in _CODES}
ITEM_SIZES = {
    **{name: int(code[1]) for code, name in NUMPY_NAMES.items()},
    "bfloat16": 2,  # NumPy has none: widened to float32, which holds each of its values
}
MAX_RANK = 32


class WeightsFileError(ValueError):
    """A weights file that is refused; the message says what, got, expected and the cure."""


class DamagedFileError(WeightsFileError):
    """A weights file whose parts contradict each other; `what` says which."""

    def __init__(self, what: str):
        super().__init__(f"{what}: cut off or damaged; download the file again")


class Piece(NamedTuple):
    """A run of bytes of an open file, or of bytes in memory."""

    file: BinaryIO | bytes  # opened for reading
    start: int  # of the run in the file, in bytes
    size: int  # of the run in bytes
    checksum: int = 0  # CRC-32 that the file gives for the whole run; 0 if none

    def read(self, start: int = 0, size: int | None = None) -> np.ndarray:
        """Reads bytes from `start` of the piece, as a uint8 array: a view if they are in memory.

        Raises:
          WeightsFileError: if the piece, or the file, is shorter; if all of it is read and it
            does not have its checksum.
        """
        size = self.size - start if size is None else size
        if start < 0 or size < 0 or start + size > self.size:
            raise WeightsFileError(f"{size} bytes are needed at {start}, but {self.size} are there")
        if isinstance(self.file, bytes) and size:
            return np.frombuffer(self.file, np.uint8, size, self.start + start)
        content = np.empty(size, np.uint8)
        if isinstance(self.file, bytes):
            return content  # of no bytes
        self.file.seek(self.start + start)
        view = content.data
        while view:
            count = self.file.readinto(view)  # type: ignore[attr-defined]
            if not count:
                raise DamagedFileError("the file ends in the middle")
            view = view[count:]
        if self.checksum and size == self.size and zlib.crc32(content.data) != self.checksum:
            raise DamagedFileError("the data do not have their checksum")
        return content


class StoredArray(NamedTuple):
    """An array of a file that was not read yet."""

    piece: Piece | None  # the bytes in which it lies, or None if that is not known
    dtype: str  # a key of `ITEM_SIZES`, or another name, which makes a fault
    shape: tuple[int, ...]  # of the array
    strides: tuple[int, ...]  # in elements, one per axis
    offset: int = 0  # of the first element in the piece, in elements
    is_big_endian: bool = False  # order of the bytes of an element
    exact_size: bool = False  # whether the piece must hold this array and nothing else

    @property
    def num_bytes(self) -> int:
        """Of the array itself, whatever the piece holds."""
        return math.prod(self.shape) * ITEM_SIZES.get(self.dtype, 1)

    def _span(self) -> int:
        """Elements from the first to the last one that the array reaches."""
        if not math.prod(self.shape):
            return 0
        return 1 + sum(
            (size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True)
        )

    def fault(self) -> str | None:
        """What is wrong with it, or None; nothing is read or allocated."""
        if self.dtype not in ITEM_SIZES:
            return f"dtype {short(self.dtype)}, expected plain numbers"
        numbers = (*self.shape, *self.strides, self.offset)
        if not all(type(number) is int and abs(number) < 1 << 63 for number in numbers):
            return "a shape, strides or an offset that are not whole numbers of 64 bits"
        if len(self.shape) > MAX_RANK or len(self.shape) != len(self.strides):
            return f"{len(self.shape)} axes with {len(self.strides)} strides"
        if any(size < 0 for size in self.shape):
            return f"negative shape {self.shape}"
        if any(stride < 0 for stride in self.strides) or self.offset < 0:
            return f"negative strides or offset: strides {self.strides}, offset {self.offset}"
        if self.piece is None:
            return "no data in the file"
        item = ITEM_SIZES[self.dtype]
        # Strides of zero could make 100 GB of one element: an array may not outgrow its bytes.
        needed = max(self.offset + self._span() if self.num_bytes else 0, self.num_bytes // item)
        if needed * item > self.piece.size or (self.exact_size and needed * item < self.piece.size):
            return (
                f"shape {self.shape} of {self.dtype} needs {needed * item} bytes, "
                f"but its data are {self.piece.size} bytes"
            )
        return None

    def read(self) -> np.ndarray:
        """Reads the values: native byte order, C-contiguous, bfloat16 widened to float32.

        Raises:
          WeightsFileError: if there is a `fault`, or the file ends early.
        """
        fault = self.fault()
        if fault or self.piece is None:
            raise WeightsFileError(fault)
        item = ITEM_SIZES[self.dtype]
        content = self.piece.read(self.offset * item if self._span() else 0, self._span() * item)
        stored = np.dtype("uint16" if self.dtype == "bfloat16" else self.dtype)
        flat = content.view(stored.newbyteorder(">" if self.is_big_endian else "<"))
        if self.strides == c_strides(self.shape) or not flat.size:
            array = flat.reshape(self.shape)
        else:
            strides = tuple(stride * item for stride in self.strides)
            array = np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False)
        if self.dtype == "bfloat16":
            return (array.astype(np.uint32) << 16).view(np.float32)
        return np.asarray(array, stored, order="C")


def c_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of an array whose last axis moves fastest."""
    return f_strides(shape[::-1])[::-1]


def f_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of an array whose first axis moves fastest."""
    return (1, *itertools.accumulate(shape[:-1], operator.mul)) if shape else ()


def short(name: object) -> str:
    """A name of a file for a message: never longer than a line, without control characters."""
    text = str(name)
    text = text if len(text) <= 120 else f"{text[:100]}… ({len(text)} characters)"
    return text if text.isprintable() else ascii(text)[1:-1]
