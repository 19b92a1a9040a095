"""`.npz` and `.safetensors` files, and the entries of zip files: sizes checked, arrays left there.

NumPy reads the headers of `.npy` arrays; the rest is read here, because the libraries' own readers
accept files that tests of ours refuse. `numpy.load` asks for 100 GB of memory where a header claims
them, and takes arrays of text or records and entries longer than their shape; `safetensors` takes
the last of two arrays of one name, and knows bfloat16 only in new versions.
"""

from __future__ import annotations

import io
import json
import struct
import tokenize
import zipfile
import zlib
from typing import Any, BinaryIO

import numpy as np

from sparseinst_jax.runtime.messages import listed
from sparseinst_jax.weights.reading.stored_arrays import (
    ITEM_SIZES,
    DamagedFileError,
    Piece,
    StoredArray,
    WeightsFileError,
    c_strides,
    f_strides,
    short,
)

# A directory of 2 MB has room for about 20,000 entries; a checkpoint has a few thousand.
MAX_DIRECTORY_BYTES = 2 << 20
# What compressed entries may grow to: weights shrink by a tenth, runs of zeros more.
INFLATED_BYTES, INFLATED_RATIO = 64 << 20, 8
_ENCRYPTED, _LOCAL_HEADER = 0x1, struct.Struct("<4s22xHH")

# Names, shapes and places of 10,000 arrays take 1.5 MB.
MAX_HEADER_BYTES = 2 << 20
# What NumPy raises for headers that are none; it tokenizes those that are no literal.
_HEADER_ERRORS = (
    ValueError,
    TypeError,
    SyntaxError,
    RecursionError,
    MemoryError,
    tokenize.TokenError,
)
_HEADER_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
# F64, I32, ..., BF16 and BOOL.
_SAFETENSORS_KINDS = {"F": "float", "I": "int", "U": "uint", "BF": "bfloat", "BOOL": "bool"}
_SAFETENSORS_DTYPES = {
    kind + bits: f"{name}{bits}"
    for kind, name in _SAFETENSORS_KINDS.items()
    for bits in ("", "8", "16", "32", "64")
    if f"{name}{bits}" in ITEM_SIZES
}


class _BoundedReads:
    """A file that `zipfile`, which reads a directory whole, cannot read in one big gulp."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int | None = -1, /) -> bytes:
        most = MAX_DIRECTORY_BYTES
        wanted = most + 1 if size is None or size < 0 else size
        content = self._file.read(min(wanted, most + 1))
        if wanted > most and len(content) > most:
            raise WeightsFileError(
                f"the zip directory takes more than {most} bytes, which is room for 20,000 "
                "entries; expected a few thousand"
            )
        return content


class ZipEntries:
    """The entries of a zip file by name; stored ones stay in the file, others are inflated.

    Args:
      file: opened for reading; must stay open.
      size: of the file in bytes.

    Raises:
      WeightsFileError: if it is no whole zip, or has names that are absolute, that climb out of
        the folder or are there twice, or sizes that the file cannot hold.
    """

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._size = file, size
        try:
            directory = zipfile.ZipFile(_BoundedReads(file)).infolist()  # type: ignore[arg-type]
        except WeightsFileError:
            raise
        except (zipfile.BadZipFile, struct.error, NotImplementedError, ValueError) as error:
            raise DamagedFileError(f"it is no whole zip file ({short(error)})") from error
        self._entries: dict[str, zipfile.ZipInfo] = {}
        for entry in directory:
            self._check(entry)
            self._entries[entry.filename] = entry
        self._check_sizes()

    @property
    def names(self) -> list[str]:
        """In the order of the directory."""
        return list(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def _check(self, entry: zipfile.ZipInfo) -> None:
        name = entry.filename
        parts = name.replace("\\", "/").split("/")
        if not name or name != entry.orig_filename or parts[0] == "" or ".." in parts:
            raise WeightsFileError(
                f"the zip entry {short(entry.orig_filename)} has a path that leads out of the "
                "file, expected plain names; take the file from its publisher"
            )
        if ":" in parts[0]:
            raise WeightsFileError(f"the zip entry {short(name)} has an absolute path")
        if name in self._entries:
            raise WeightsFileError(f"the zip entry {short(name)} is there twice, expected once")
        if entry.flag_bits & _ENCRYPTED:
            raise WeightsFileError(f"the zip entry {short(name)} is encrypted")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise WeightsFileError(
                f"the zip entry {short(name)} is compressed by method {entry.compress_type}, "
                "expected stored or deflated"
            )

    def _check_sizes(self) -> None:
        entries = self._entries.values()
        packed = sum(entry.compress_size for entry in entries)
        if packed > self._size:
            raise WeightsFileError(
                f"the zip entries claim {packed} bytes, but the file has {self._size}: cut off, "
                "or entries that overlap"
            )
        stored = [entry for entry in entries if entry.compress_type == zipfile.ZIP_STORED]
        wrong = [short(e.filename) for e in stored if e.file_size != e.compress_size]
        if wrong:
            raise WeightsFileError(f"stored zip entries with two sizes: {listed(wrong)}")
        inflated = sum(entry.file_size for entry in entries)
        most = max(INFLATED_BYTES, INFLATED_RATIO * self._size)
        if inflated > most:
            raise WeightsFileError(
                f"the zip entries claim to inflate to {inflated} bytes from a file of "
                f"{self._size}, expected at most {most}: a zip bomb, or not weights"
            )

    def piece(self, name: str) -> Piece:
        """The content of an entry; a compressed one is inflated to memory.

        Raises a WeightsFileError if it is cut off, damaged, or not the size that it claims.
        """
        entry = self._entries[name]
        # PyTorch can leave the checksums out: they are all 0 then.
        piece = Piece(self._file, self._data_start(entry), entry.compress_size)
        if entry.compress_type == zipfile.ZIP_STORED:
            return piece._replace(checksum=entry.CRC)
        content = _inflate(piece, entry)
        return Piece(content, 0, len(content))

    def _data_start(self, entry: zipfile.ZipInfo) -> int:
        if 0 <= entry.header_offset < self._size:
            self._file.seek(entry.header_offset)
            header = self._file.read(_LOCAL_HEADER.size)
            if len(header) == _LOCAL_HEADER.size and header.startswith(b"PK\x03\x04"):
                _, name_size, extra_size = _LOCAL_HEADER.unpack(header)
                encoding = "utf-8" if entry.flag_bits & 0x800 else "cp437"
                name = self._file.read(name_size).decode(encoding, "replace")
                start = entry.header_offset + len(header) + name_size + extra_size
                if name == entry.orig_filename and start + entry.compress_size <= self._size:
                    return start
        what = f"the zip entry {short(entry.filename)}"
        raise DamagedFileError(f"{what} is not where the directory says")


def _inflate(piece: Piece, entry: zipfile.ZipInfo) -> bytes:
    what = f"the zip entry {short(entry.filename)}"
    try:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        content = inflater.decompress(piece.read().data, entry.file_size + 1)
    except zlib.error as error:
        raise DamagedFileError(f"{what} cannot be inflated ({error})") from error
    if len(content) != entry.file_size:
        raise WeightsFileError(
            f"{what} inflates to another size than the {entry.file_size} bytes it claims: damaged, "
            "or a zip bomb"
        )
    if entry.CRC not in (0, zlib.crc32(content)):
        raise DamagedFileError(f"{what} does not have its checksum")
    return content


def read_npz(entries: ZipEntries) -> dict[str, StoredArray]:
    """Finds the arrays of an `.npz` file: a zip of `.npy` files.

    Raises a WeightsFileError if an entry is something else, or an array of objects (a pickle).
    """
    foreign = [name for name in entries.names if not name.endswith(".npy")]
    if foreign:
        raise WeightsFileError(
            f"the zip entry {short(foreign[0])} is neither part of a PyTorch checkpoint nor a .npy "
            "array, expected a file of torch.save or numpy.savez"
        )
    return {name.removesuffix(".npy"): _npy(name, entries.piece(name)) for name in entries.names}


def _npy(name: str, piece: Piece) -> StoredArray:
    # NumPy refuses headers above 10,000 bytes; it evaluates them as literals only.
    head = io.BytesIO(piece.read(0, min(piece.size, 1 << 14)).tobytes())
    try:
        version = np.lib.format.read_magic(head)
        if version not in _HEADER_READERS:
            raise ValueError(f"version {version} of the .npy format")
        shape, is_fortran, dtype = _HEADER_READERS[version](head)
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


def read_safetensors(file: BinaryIO, size: int) -> tuple[dict[str, StoredArray], dict[str, Any]]:
    """Finds the arrays of a `.safetensors` file: 8 bytes of header size, a json, the data.

    Returns:
      The arrays, and what the header says beside them; values that are a json are read as such.

    Raises:
      WeightsFileError: if the header is damaged, or an array lies outside of the file.
    """
    header_bytes = struct.unpack("<Q", file.read(8))[0]
    most = min(size - 8, MAX_HEADER_BYTES)
    if header_bytes > most:
        what = f"the safetensors header claims {header_bytes} bytes"
        raise DamagedFileError(f"{what}, expected at most {most}")
    try:
        header = json.loads(file.read(header_bytes), object_pairs_hook=_without_duplicates)
    except WeightsFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"the safetensors header is not a json ({short(error)})") from error
    if not isinstance(header, dict):
        raise DamagedFileError(f"the safetensors header is a {type(header).__name__}, not a dict")
    facts = header.pop("__metadata__", None)
    facts = facts if isinstance(facts, dict) else {}
    data = Piece(file, 8 + header_bytes, size - 8 - header_bytes)
    arrays = {name: _safetensor(name, entry, data) for name, entry in header.items()}
    return arrays, {key: _json_or_text(value) for key, value in facts.items()}


def _json_or_text(value: Any) -> Any:
    try:
        return json.loads(value)
    except (TypeError, ValueError, RecursionError):
        return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise WeightsFileError(f"the name {short(name)} is there twice, expected once")
        result[name] = value
    return result


def _safetensor(name: str, entry: Any, data: Piece) -> StoredArray:
    what = f"the safetensors header of {short(name)}"
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        is_whole = all(type(number) is int for number in (*shape, start, stop))
    except (TypeError, KeyError, ValueError) as error:
        raise DamagedFileError(f"{what} lacks dtype, shape or data_offsets") from error
    if not is_whole or not 0 <= start <= stop <= data.size:
        bounds = f"{short(start)} to {short(stop)} of {data.size}"
        raise DamagedFileError(f"{short(name)} claims the bytes {bounds}")
    if not isinstance(dtype, str) or len(shape) > 64:
        raise DamagedFileError(f"{what} has no dtype or too many axes")
    place = Piece(data.file, data.start + start, stop - start)
    dtype, shape = _SAFETENSORS_DTYPES.get(dtype, dtype), tuple(shape)
    return StoredArray(place, dtype, shape, c_strides(shape), exact_size=True)
