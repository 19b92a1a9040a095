"""Read ahead in a thread, and start anew where the processes that read have died or hang."""

import contextlib
import multiprocessing
import queue
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")

STUCK_SECONDS = 300.0  # without a batch
MAX_FAILURES = 2  # in a row at one batch; then it is no accident
_CLOSE_SECONDS = 15.0


class _LostError(Exception):
    """The reader gives nothing any more; says why."""


def supervised(
    start: Callable[[int], Iterator[Item]], number: int, say: Callable[[str], None] | None = None
) -> Generator[Item, None, None]:
    """Iterate over `number` items of a reader that may be lost and started again.

    Args:
      start: begins to read at an item; what is behind it (threads, processes) is ended by closing
        the iterator. Must give the same items whenever it is called.
      number: of items.
      say: takes a line for the user; by default to standard error.

    Raises:
      ValueError: the reader was lost `MAX_FAILURES` times in a row at the same item.
      Exception: what the reader raised.
    """
    say = say or _print
    done = failures = 0
    while done < number:
        reader = _Reader(start, done)
        try:
            while done < number:
                item = reader.get()
                yield item
                done, failures = done + 1, 0
        except _LostError as lost:
            failures += 1
            if failures >= MAX_FAILURES:
                raise ValueError(
                    f"the images cannot be read: {lost}, {failures} times in a row. Is the disk or"
                    " the network drive of the images there, and memory enough for"
                    " config.data.num_workers processes (0 reads in the training process)?"
                ) from None
            say(f"WARNING: {lost}; reading starts again at the same batch")
        finally:
            reader.close()


class _Reader:
    """A thread that iterates, with the processes that it started."""

    def __init__(self, start: Callable[[int], Any], first: int):
        self._before = set(multiprocessing.active_children())
        self._items: queue.Queue[tuple[str, Any]] = queue.Queue(1)
        self._is_over, self._is_lost = threading.Event(), False
        self._processes: set[Any] = set()
        self._thread = threading.Thread(target=self._run, args=(start, first), daemon=True)
        self._thread.start()

    def get(self) -> Any:
        try:
            kind, value = self._items.get(timeout=STUCK_SECONDS)
        except queue.Empty:
            self._is_lost = True
            raise _LostError(f"no batch for {STUCK_SECONDS:g} s, the readers hang") from None
        if kind == "item":
            if not self._processes:
                self._look()
            return value
        # Grain's own words; the fault of an image is no RuntimeError.
        if isinstance(value, RuntimeError) and "terminated unexpectedly" in str(value):
            self._is_lost = True
            code = [p.exitcode for p in self._processes if p.exitcode]
            number = f" (exit code {code[0]})" if code else ""
            raise _LostError(f"a process that reads images has died{number}")
        raise value

    def close(self) -> None:
        """End the thread; processes of a lost reader are killed."""
        self._is_over.set()
        if self._is_lost:
            self._look()
            for process in self._processes:
                process.kill()
        self._thread.join(_CLOSE_SECONDS)

    def _look(self) -> None:
        """Note the processes that were started."""
        self._processes |= set(multiprocessing.active_children()) - self._before

    def _run(self, start: Callable[[int], Any], first: int) -> None:
        # Processes inherit what is blocked: a terminal's Ctrl-C must not end them in mid-sentence.
        with contextlib.suppress(AttributeError):  # no such thing on Windows
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            items = start(first)
            try:
                for item in items:
                    if not self._put(("item", item)):
                        return
                self._put(("error", RuntimeError("the reader ended before the last batch")))
            finally:
                close = getattr(items, "close", None)
                if close is not None:
                    close()
        except Exception as error:
            self._put(("error", error))

    def _put(self, item: tuple[str, Any]) -> bool:
        while not self._is_over.is_set():
            with contextlib.suppress(queue.Full):
                self._items.put(item, timeout=0.1)
                return True
        return False


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
