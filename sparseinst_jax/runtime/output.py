"""Standard output and error that cannot end a program: what cannot be written there is dropped.

A pipe whose reader is gone, a terminal that was closed, a log on a full disk, an encoding without
the characters of a class name: what is printed is a courtesy, and no reason to lose work.
"""

import contextlib
import datetime
import io
import os
import select
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOST_OUTPUT = "lost_output.txt"  # in a run's folder
_lost: str | None = None  # why something was dropped, the first time
_note: Path | None = None  # where to say so


class _Unfailing(io.RawIOBase):
    """The raw end of a stream: a write that fails is dropped and noted."""

    def __init__(self, number: int, name: str):
        self._number, self.name = number, f"<{name}>"

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        return os.isatty(self._number)

    def write(self, data: Any, /) -> int:
        while True:
            try:
                return os.write(self._number, data)
            except BlockingIOError:  # another program made the pipe non-blocking
                select.select([], [self._number], [])
            except OSError as error:
                _note_lost(f"{self.name[1:-1]} cannot be written ({error.strerror})")
                return len(data)


def guard_output() -> None:
    """Replace standard output and error by streams whose writing never fails.

    Streams that were closed lead nowhere, and take their number before a file of ours does. Those
    that a notebook or a test has put in their place stay.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest free number
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is not None and type(stream) is not io.TextIOWrapper:
            continue
        if stream is not None and isinstance(getattr(stream.buffer, "raw", None), _Unfailing):
            continue
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.flush()
        guarded = io.TextIOWrapper(
            io.BufferedWriter(_Unfailing(number, name)),
            encoding=stream.encoding if stream else "utf-8",
            errors="backslashreplace",
            line_buffering=stream is None or stream.line_buffering or stream.write_through,
        )
        setattr(sys, name, guarded)


@contextlib.contextmanager
def lost_output_noted(folder: Path) -> Iterator[None]:
    """Guard the output, and note in a file of this folder, once, that some of it was dropped."""
    global _note
    before = sys.stdout, sys.stderr
    guard_output()
    _note = folder / LOST_OUTPUT
    if _lost is not None:
        _write_note()
    try:
        yield
    finally:
        _note = None
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


def _note_lost(reason: str) -> None:
    global _lost
    if _lost is None:
        time = datetime.datetime.now(datetime.UTC).isoformat(" ", "seconds")
        _lost = f"{time} {reason}: what is printed from here on may be lost, the work goes on"
        _write_note()


def _write_note() -> None:
    if _note is not None:
        with contextlib.suppress(OSError), _note.open("a") as file:
            file.write(f"{_lost}\n")
