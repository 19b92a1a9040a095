"""Stop cleanly after a first signal, and at once after a second one."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

# Exit codes of a run that was asked to stop, as a shell reports a process ended by the signal.
EXIT_CODES = {signal.SIGHUP: 129, signal.SIGINT: 130, signal.SIGTERM: 143}
# `timeout` and some job systems send a signal to the process and to its group: that is one.
_SAME_SECONDS = 0.5


class StopSignals:
    """Records the first stop signal instead of dying; a second one stops the process at once.

    SIGHUP (the terminal was closed) is one, unless it is ignored, as under `nohup`; as the second
    it does not count, because a shell repeats what the system has sent.

    A thread sees the second one, because the main thread may be in the middle of something
    compiled or of a save, where it runs no Python for a long time.

    Args:
        doing: what the first signal begins, for the user.
    """

    def __init__(self, doing: str = "finishing the step and saving") -> None:
        self._doing = doing
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._fds: tuple[int, int] | None = None
        self._fd_before = -1

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is not threading.main_thread():
            return self  # the caller keeps its signal handlers
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        self._fds = reading, writing
        self._fd_before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=_watch, args=(reading,), daemon=True, name="signals").start()
        for number in EXIT_CODES:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._fds is not None:
            signal.set_wakeup_fd(self._fd_before)
            os.close(self._fds[1])  # the thread reads the end, and closes its side

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
            name = self.received.name
            _write(f"{name}: {self._doing}; a second signal stops at once")


def _watch(reading: int) -> None:
    """Stop the process at the second signal."""
    first = None
    while received := os.read(reading, 1):
        number = received[0]
        if number not in EXIT_CODES:
            continue
        first = first or time.monotonic()
        if number == signal.SIGHUP:
            continue
        if time.monotonic() - first > _SAME_SECONDS:
            name = signal.Signals(number).name
            _write(f"stopped at once by a second {name}; the same command continues")
            for child in multiprocessing.active_children():
                child.kill()
            os._exit(EXIT_CODES[signal.Signals(number)])
    os.close(reading)


def _write(text: str) -> None:
    # Not by print: the main thread may be in the middle of one.
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())
