"""`.npz` and `.safetensors` files: headers read and checked, arrays left in the file."""

from __future__ import annotations

import io
import json
import struct
import tokenize
from typing import Any, BinaryIO

import numpy as np

from sparseinst_jax.weights.arrays import (
    Piece,
    StoredArray,
    WeightsFileError,
    c_strides,
    f_strides,
    short,
)
from sparseinst_jax.weights.zip_entries import ZipEntries

# What NumPy raises for headers that are none; it tokenizes those that are no literal.
_HEADER_ERRORS = (
    ValueError,
    TypeError,
    SyntaxError,
    RecursionError,
    MemoryError,
    tokenize.TokenError,
)
# Names, shapes and places of 10,000 arrays take 1.5 MB.
MAX_HEADER_BYTES = 2 << 20
SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


def read_npz(entries: ZipEntries) -> dict[str, StoredArray]:
    """Finds the arrays of an `.npz` file: a zip of `.npy` files.

    Raises:
      WeightsFileError: if an entry is something else, or an array of objects (a pickle).
    """
    foreign = [name for name in entries.names if not name.endswith(".npy")]
    if foreign:
        raise WeightsFileError(
            f"the zip entry {short(foreign[0])} is neither part of a PyTorch checkpoint nor a .npy "
            "array, expected a file of torch.save or numpy.savez"
        )
    return {name.removesuffix(".npy"): _npy(name, entries.piece(name)) for name in entries.names}


def _npy(name: str, piece: Piece) -> StoredArray:
    formats = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    # NumPy refuses headers above 10,000 bytes; it evaluates them as literals only.
    head = io.BytesIO(piece.read(0, min(piece.size, 1 << 14)).tobytes())
    try:
        version = np.lib.format.read_magic(head)
        if version not in formats:
            raise ValueError(f"version {version} of the .npy format")
        shape, is_fortran, dtype = formats[version](head)
    except _HEADER_ERRORS as error:
        raise WeightsFileError(f"{short(name)} is not a readable .npy array: {short(error)}") from (
            error
        )
    if dtype.hasobject:
        raise WeightsFileError(
            f"{short(name)} is an array of objects, which is a pickle in disguise; expected plain "
            "arrays of numbers"
        )
    shape = tuple(int(size) for size in shape)
    data = Piece(piece.file, piece.start + head.tell(), piece.size - head.tell())
    strides = f_strides(shape) if is_fortran else c_strides(shape)
    is_big_endian = dtype.str.startswith(">")
    return StoredArray(data, dtype.name, shape, strides, 0, is_big_endian, exact_size=True)


def read_safetensors(file: BinaryIO, size: int) -> dict[str, StoredArray]:
    """Finds the arrays of a `.safetensors` file.

    Read here and not by the library of that name: its NumPy side knows no bfloat16 in every
    version that this package allows, and all formats share one check of sizes and one reader.

    Source: the format of safetensors: 8 bytes of header size, a json, the data.

    Raises:
      WeightsFileError: if the header is damaged, or an array lies outside of the file.
    """
    header_bytes = struct.unpack("<Q", file.read(8))[0]
    if header_bytes > min(size - 8, MAX_HEADER_BYTES):
        raise WeightsFileError(
            f"the safetensors header claims {header_bytes} bytes, expected at most "
            f"{min(size - 8, MAX_HEADER_BYTES)}: cut off or damaged; download the file again"
        )
    try:
        header = json.loads(file.read(header_bytes), object_pairs_hook=_without_duplicates)
    except WeightsFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise WeightsFileError(
            f"the safetensors header is not a json ({short(error)}): damaged; download it again"
        ) from error
    if not isinstance(header, dict):
        raise WeightsFileError(f"the safetensors header is a {type(header).__name__}, not a dict")
    header.pop("__metadata__", None)
    data = Piece(file, 8 + header_bytes, size - 8 - header_bytes)
    return {name: _safetensor(name, entry, data) for name, entry in header.items()}


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise WeightsFileError(f"the name {short(twice)} is there twice, expected once")
    return result


def _safetensor(name: str, entry: Any, data: Piece) -> StoredArray:
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        is_whole = all(type(number) is int for number in (*shape, start, stop))
    except (TypeError, KeyError, ValueError) as error:
        raise WeightsFileError(
            f"the safetensors header of {short(name)} lacks dtype, shape or data_offsets: damaged"
        ) from error
    if not is_whole or not 0 <= start <= stop <= data.size:
        raise WeightsFileError(
            f"{short(name)} claims the bytes {short(start)} to {short(stop)} of {data.size}: cut "
            "off or damaged; download the file again"
        )
    if not isinstance(dtype, str) or len(shape) > 64:
        raise WeightsFileError(f"the safetensors header of {short(name)} is damaged")
    return StoredArray(
        Piece(data.file, data.start + start, stop - start),
        SAFETENSORS_DTYPES.get(dtype, dtype),
        tuple(shape),
        c_strides(shape),
        exact_size=True,
    )
