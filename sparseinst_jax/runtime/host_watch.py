"""Detect from inside a process that another host of the job has stopped responding.

A collective waits forever for a host that was killed, suspended or cut off, and for one that is
alive but stuck. So each host reports about twice a second on the job's board (the key-value store
of the coordinator) that it is alive and what it is doing, and reads the reports of the others.
JAX's own heartbeats come later, do not detect a process that is alive but stuck, and abort the
process.
"""

import sys
import threading
import time
from collections.abc import Callable
from typing import Protocol

LOST_HOST = 75  # exit code; EX_TEMPFAIL of sysexits.h: try again
STUCK = 6  # time-outs without progress, for a host that is alive: compiling takes minutes
DONE = "done, waiting for the others"  # needs no progress any more
_FOLDER = "sparseinst_hosts/"
_ALIVE, _FAILED = "alive", "failed"


class Board(Protocol):
    """The key-value store of a job; JAX's distributed client is one."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        """Write a value."""
        ...

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        """Read all values below a key."""
        ...


class HostWatch:
    """Two threads: one writes and reads the board, one judges.

    Ends the process with a message and the code `LOST_HOST` when

    * another host has not reported for `timeout` seconds (it was killed, suspended, cut off);
    * another host reported that it failed;
    * this host has made no progress for `STUCK` times `timeout` seconds. The message lists what
      every host was doing last.

    Args:
      board: of the job.
      index: of this host.
      number: of hosts.
      name: of this machine, for the messages of the others.
      timeout: seconds.
      end: ends the process with an exit code.
    """

    def __init__(
        self,
        board: Board,
        index: int,
        number: int,
        name: str,
        timeout: float,
        end: Callable[[int], None],
    ):
        self._board, self._index, self._name = board, index, name
        self._timeout, self._end = timeout, end
        self._period = min(2.0, timeout / 10)
        now = time.monotonic()
        # What each host wrote last, and when that was first seen here.
        self._seen = {host: ("", now) for host in range(number)}
        self._doing, self._since = "starting", now
        self._count, self._failure = 0, ""

    def start(self) -> None:
        """Start watching, until the process ends."""
        for function in (self._exchange_forever, self._judge_forever):
            threading.Thread(target=function, daemon=True, name="hosts").start()

    def report(self, doing: str) -> None:
        """Record that this host makes progress, and with what."""
        self._doing, self._since = doing, time.monotonic()

    def report_failure(self, message: str) -> None:
        """Report that this host failed, and give the others time to read it."""
        self._failure = message
        try:
            self._write()
        except RuntimeError:  # the board is gone: nobody can read it
            return
        # The board is gone with the first host.
        time.sleep(4 * self._period if self._index == 0 else self._period / 2)

    def exchange(self) -> None:
        """Write on the board and read it, once."""
        self._count += 1
        self._write()
        for key, value in self._board.key_value_dir_get(_FOLDER):
            host = int(key.rpartition("/")[2])
            if host in self._seen and self._seen[host][0] != value:
                self._seen[host] = value, time.monotonic()

    def verdict(self) -> str | None:
        """The reason why this process has to stop, or None."""
        now = time.monotonic()
        others = {host: value for host, value in self._seen.items() if host != self._index}
        for host, (value, _) in others.items():
            state, _, _, message = _parsed(value)
            if state == _FAILED:
                return f"{self._named(host)} has failed: {message}"
        # The board lives on the first host: without it the others seem silent too.
        for host, (_, when) in others.items():
            if now - when > self._timeout:
                doing = _parsed(self._seen[host][0])[3]
                return (
                    f"{self._named(host)} has not answered for {now - when:.0f} s; its last"
                    f" report: {doing or 'none'}"
                )
        if now - self._since > STUCK * self._timeout and self._doing != DONE:
            lines = [f"  {self._named(host)}: {_parsed(v)[3]}" for host, (v, _) in others.items()]
            lines.insert(self._index, f"  {self._named(self._index)}: {self._doing}")
            return "\n".join(
                [f"no progress for {now - self._since:.0f} s. What each host was doing:", *lines]
            )
        return None

    def _write(self) -> None:
        state = _FAILED if self._failure else _ALIVE
        text = self._failure or self._doing
        value = "\t".join([state, self._name, str(self._count), text])
        self._board.key_value_set(f"{_FOLDER}{self._index}", value, allow_overwrite=True)

    def _exchange_forever(self) -> None:
        while True:
            try:
                self.exchange()
            except RuntimeError:  # of the connection: the judge sees that nothing is heard
                pass
            time.sleep(self._period)

    def _judge_forever(self) -> None:
        while True:
            time.sleep(self._period)
            verdict = self.verdict()
            if verdict is not None:
                if " has failed: " in verdict:
                    time.sleep(self._period)  # if it is our fault too, our own message says more
                print(
                    f"error: {verdict}\nThis host stops too (exit code {LOST_HOST}). The same"
                    " command continues from the last checkpoint, on any number of hosts.",
                    file=sys.stderr,
                )
                self._end(LOST_HOST)
                return

    def _named(self, host: int) -> str:
        name = self._name if host == self._index else _parsed(self._seen[host][0])[1]
        return f"host {host}{f' ({name})' if name else ''}"


def _parsed(value: str) -> tuple[str, str, str, str]:
    """State, machine, count and text of what a host wrote."""
    state, name, count, text = (*value.split("\t", 3), "", "", "", "")[:4]
    return state, name, count, text
