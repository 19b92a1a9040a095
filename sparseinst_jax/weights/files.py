"""Weight files of every ecosystem, read by what they are and not by what they are called.

Neither torch nor paddle is needed, and nothing that a file asks for is run: pickles are read by
`safe_pickle`, which knows no way to call anything. Sizes are compared with the file before memory
is allocated, so what is refused is refused at once.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from sparseinst_jax.weights.arrays import StoredArray, WeightsFileError, name_some
from sparseinst_jax.weights.plain_files import read_npz, read_safetensors
from sparseinst_jax.weights.zip_entries import INFLATED_BYTES, INFLATED_RATIO, ZipEntries

KINDS = ".pth and .pkl of PyTorch or detectron2, .pdparams of Paddle, .npz, .safetensors"


class WeightsFile(NamedTuple):
    """What a weights file holds.

    Attributes:
      arrays: as named in the file, after unwrapping; native byte order, bfloat16 widened.
      kind: of file, such as "PyTorch zip" or "safetensors".
      notes: what was unwrapped, left out or looks wrong (not a number), for people.
      sha256: of the whole file, in hexadecimal digits.
    """

    arrays: dict[str, np.ndarray]
    kind: str
    notes: list[str]
    sha256: str


class _Contents(NamedTuple):
    arrays: dict[str, StoredArray]
    kind: str
    notes: list[str]


def read_weights_file(path: str | Path) -> WeightsFile:
    """Reads the arrays of a weights file; its kind is decided by its content.

    Raises:
      FileNotFoundError: if there is no such file.
      WeightsFileError: if it is of no known kind, damaged, or asks for more than to be read.
    """
    path = Path(path)
    if path.is_dir():
        raise WeightsFileError(f"{path} is a folder; give a weights file ({KINDS})")
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}; give a file ({KINDS})")
    with path.open("rb") as file:
        try:
            contents = _contents(file, path.stat().st_size)
            arrays = _read(contents.arrays, path.stat().st_size)
        except WeightsFileError as error:
            raise WeightsFileError(f"{path} cannot be read as weights: {error}") from error
        except (struct.error, zlib.error, UnicodeError, EOFError) as error:
            raise WeightsFileError(f"{path} is damaged: {error}; download it again") from error
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    notes = [*contents.notes, *_warnings(contents.arrays, arrays)]
    return WeightsFile(arrays, contents.kind, notes, sha256)


def _contents(file: BinaryIO, size: int) -> _Contents:
    head = file.read(16)
    file.seek(0)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _Contents(read_npz(ZipEntries(file, size)), "npz", [])
    if head[8:9] == b"{":
        return _Contents(read_safetensors(file, size), "safetensors", [])
    raise WeightsFileError(f"it starts with {head!r}, expected one of: {KINDS}")


def _read(stored: dict[str, StoredArray], file_size: int) -> dict[str, np.ndarray]:
    """Reads all arrays, after all of them were checked."""
    if not stored:
        raise WeightsFileError("it holds no arrays; give the file with the weights")
    faults = [f"{name} has {fault}" for name, array in stored.items() if (fault := array.fault())]
    if faults:
        raise WeightsFileError(f"damaged or unsupported arrays: {name_some(faults)}")
    total = sum(array.num_bytes for array in stored.values())
    most = max(INFLATED_BYTES, INFLATED_RATIO * file_size)
    if total > most:  # arrays may share their bytes, but not without end
        raise WeightsFileError(
            f"its arrays take {total} bytes, expected at most {most} of a file of {file_size}: "
            "they all share the same bytes, which no checkpoint does"
        )
    return {name: array.read() for name, array in stored.items()}


def _warnings(stored: dict[str, StoredArray], arrays: dict[str, np.ndarray]) -> list[str]:
    notes = []
    wide = [name for name, array in stored.items() if array.dtype == "bfloat16"]
    if wide:
        notes.append(f"{len(wide)} arrays of bfloat16 widened to float32: {name_some(wide, 3)}")
    odd = [
        name
        for name, array in arrays.items()
        if array.dtype.kind == "f" and not np.isfinite(array).all()
    ]
    if odd:
        notes.append(f"WARNING: {len(odd)} arrays hold NaN or infinity: {name_some(odd)}")
    return notes
