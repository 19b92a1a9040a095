"""The entries of a zip file of arrays (`.npz`, PyTorch), with every size checked beforehand."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from typing import BinaryIO

from sparseinst_jax.weights.arrays import Piece, WeightsFileError, name_some, short

# A directory of 2 MB has room for some 20,000 entries; a checkpoint has a few thousand.
MAX_DIRECTORY_BYTES = 2 << 20
# What compressed entries may grow to: weights shrink by a tenth, runs of zeros more.
INFLATED_BYTES, INFLATED_RATIO = 64 << 20, 8
_ENCRYPTED, _LOCAL_HEADER = 0x1, struct.Struct("<4s22xHH")


class _Careful(io.BufferedIOBase):
    """A file that `zipfile` cannot read in one big gulp: its directory is read whole."""

    def __init__(self, file: BinaryIO):
        self._file = file

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

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
            directory = zipfile.ZipFile(_Careful(file)).infolist()  # type: ignore[arg-type]
        except (
            zipfile.BadZipFile,
            struct.error,
            NotImplementedError,
            UnicodeDecodeError,
            ValueError,
        ) as error:
            if isinstance(error, WeightsFileError):
                raise
            raise WeightsFileError(
                f"it is no whole zip file ({short(error)}): cut off or damaged; download it again"
            ) from error
        self._entries: dict[str, zipfile.ZipInfo] = {}
        for entry in directory:
            self._check(entry)
            self._entries[entry.filename] = entry
        self._check_sizes()

    @property
    def names(self) -> list[str]:
        """In the order of the directory."""
        return list(self._entries)

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
        wrong = [entry.filename for entry in stored if entry.file_size != entry.compress_size]
        if wrong:
            raise WeightsFileError(f"stored zip entries with two sizes: {name_some(wrong)}")
        inflated = sum(entry.file_size for entry in entries)
        most = max(INFLATED_BYTES, INFLATED_RATIO * self._size)
        if inflated > most:
            raise WeightsFileError(
                f"the zip entries claim to inflate to {inflated} bytes from a file of "
                f"{self._size}, expected at most {most}: a zip bomb, or not weights"
            )

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def piece(self, name: str) -> Piece:
        """The content of an entry; a compressed one is inflated to memory.

        Raises:
          WeightsFileError: if the entry is cut off, damaged, or not the size that it claims.
        """
        entry = self._entries[name]
        # PyTorch can leave the checksums out: they are all 0 then.
        start = self._data_start(entry)
        piece = Piece(self._file, start, entry.compress_size)
        if entry.compress_type == zipfile.ZIP_STORED:
            return piece._replace(checksum=entry.CRC)
        content = self._inflate(piece, entry)
        if entry.CRC not in (0, zlib.crc32(content)):
            raise WeightsFileError(
                f"the zip entry {short(name)} is damaged, it does not have its checksum; download "
                "the file again"
            )
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
        raise WeightsFileError(
            f"the zip entry {short(entry.filename)} is not where the directory says: cut off or "
            "damaged; download the file again"
        )

    def _inflate(self, piece: Piece, entry: zipfile.ZipInfo) -> bytes:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            content = inflater.decompress(piece.read().data, entry.file_size + 1)
        except zlib.error as error:
            raise WeightsFileError(
                f"the zip entry {short(entry.filename)} cannot be inflated ({error}): damaged; "
                "download the file again"
            ) from error
        if len(content) != entry.file_size:
            raise WeightsFileError(
                f"the zip entry {short(entry.filename)} inflates to another size than the "
                f"{entry.file_size} bytes it claims: damaged, or a zip bomb"
            )
        return content
