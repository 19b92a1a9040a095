"""The bytes of a pickle, read so that no claimed size is believed and nothing grows without end."""

from __future__ import annotations

import codecs
import struct
from typing import Any, BinaryIO

from sparseinst_jax.weights.arrays import Piece, WeightsFileError
from sparseinst_jax.weights.stand_ins import Text

SHORT_BYTES = 1024
# A checkpoint of 500 arrays with its optimizer takes 50,000 operations and 50 kB of names.
MAX_OPERATIONS, MAX_SHORT_BYTES, MAX_INTEGER_BYTES, MAX_LINE = 300_000, 16 << 20, 64, 4096


class PickleBytes:
    """Reads the parts of pickles from a file and counts what they take.

    Args:
      file: at the first byte of a pickle.
      end: where the pickles must have ended, in bytes from the beginning of the file.
    """

    def __init__(self, file: BinaryIO, end: int):
        self.file, self.end = file, end
        self._operations, self._short_bytes = 0, 0

    def refuse_short(self) -> None:
        """Refuses a file that ended too early."""
        raise WeightsFileError("the pickle ends in the middle: cut off; download the file again")

    def spend(self, operations: int = 0, short_bytes: int = 0) -> None:
        """Counts what a pickle takes; too much is refused."""
        self._operations += operations
        self._short_bytes += short_bytes
        if self._operations > MAX_OPERATIONS:
            raise WeightsFileError(
                f"the pickle takes more than {MAX_OPERATIONS} operations, expected some 50,000: it "
                "holds something else than weights"
            )
        if self._short_bytes > MAX_SHORT_BYTES:
            raise WeightsFileError(
                f"the pickle holds more than {MAX_SHORT_BYTES} bytes of names and short texts: it "
                "holds something else than weights"
            )

    def fixed(self, format: str) -> Any:
        """A number of a fixed size, by its `struct` format."""
        return struct.unpack(format, self.read(struct.calcsize(format)))[0]

    def read(self, size: int) -> bytes:
        """A few bytes."""
        content = self.file.read(size)
        if len(content) < size:
            self.refuse_short()
        return content

    def line(self) -> bytes:
        """The rest of a line, without its end."""
        line = self.file.readline(MAX_LINE)
        self.spend(short_bytes=len(line))
        if len(line) == MAX_LINE:
            raise WeightsFileError(
                f"the pickle holds a line of more than {MAX_LINE} bytes, as protocol 0 has for "
                "arrays; load it where it was made and save it with protocol 2 or later"
            )
        if not line.endswith(b"\n"):
            self.refuse_short()
        return line[:-1]

    def run(self, size: int) -> bytes | Piece:
        """Bytes of a claimed size: read if they are short, else only their place."""
        start = self.file.tell()
        if not 0 <= size <= self.end - start:
            raise WeightsFileError(
                f"the pickle claims {size} bytes at byte {start}, of {self.end - start} left: "
                "cut off or damaged; download the file again"
            )
        if size <= SHORT_BYTES:
            self.spend(short_bytes=size)
            return self.read(size)
        self.file.seek(start + size)
        return Piece(self.file, start, size)

    def frame(self) -> None:
        """A frame says how many bytes follow; it is believed no more than any size."""
        size, left = self.fixed("<Q"), self.end - self.file.tell()
        if size > left:
            raise WeightsFileError(
                f"the pickle claims a frame of {size} bytes, but {left} are left: cut off or "
                "damaged; download the file again"
            )

    def text(self, size: int) -> str | Text:
        """A text of a claimed size: a long one stays in the file."""
        run = self.run(size)
        return Text(run) if isinstance(run, Piece) else run.decode("utf-8", "surrogatepass")

    def old_text(self, size: int) -> str | Piece:
        """Python 2's strings: names and bytes alike."""
        run = self.run(size)
        return run if isinstance(run, Piece) else run.decode("latin-1")

    def integer(self, size: int) -> int:
        """A signed little-endian integer of a claimed size."""
        if not 0 <= size <= MAX_INTEGER_BYTES:
            raise WeightsFileError(
                f"the pickle holds an integer of {size} bytes, expected at most {MAX_INTEGER_BYTES}"
            )
        return int.from_bytes(self.read(size), "little", signed=True)

    def decimal(self) -> int | bool:
        """An integer in digits, or 00 and 01 for a flag."""
        line = self.line().decode().removesuffix("L")
        if line in ("00", "01"):
            return line == "01"
        if len(line) > 2 * MAX_INTEGER_BYTES:
            raise WeightsFileError(f"the pickle holds an integer of {len(line)} digits")
        return int(line)

    def quoted(self) -> str:
        """A string in quotes."""
        line = self.line()
        if len(line) < 2 or line[0] != line[-1] or line[0] not in b"'\"":
            raise ValueError("a string without quotes")
        return codecs.decode(line[1:-1], "unicode_escape")
