"""Work through many images: in threads, a few ahead of use, with a progress display."""

from __future__ import annotations

import collections
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

from sparseinst_jax.runtime.messages import rounded

SECONDS_BETWEEN_LINES = 10.0
Item = TypeVar("Item")
Value = TypeVar("Value")


def map_ahead(
    pool: Executor, function: Callable[[Item], Value], items: Iterable[Item], ahead: int
) -> Iterator[Value]:
    """Map in the pool's threads or processes, in order, with at most `ahead` results waiting."""
    waiting = collections.deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class Ahead(Iterator[Item]):
    """Run an iterator in a thread, a few items ahead; of a live one only the newest item waits.

    Attributes:
        dropped: items of a live one that were not taken in time.
    """

    def __init__(self, items: Iterable[Item], most: int, is_live: bool = False):
        self._items, self._is_live, self.dropped = items, is_live, 0
        self._queue: queue.Queue[Any] = queue.Queue(1 if is_live else most)
        self._end: BaseException | None = None
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        items, error = iter(self._items), None
        try:
            for item in items:
                self._put((item, None), replaces=self._is_live)
                if self._is_closed.is_set():
                    break
        except BaseException as fault:  # it is raised where the items are used
            error = fault
        if hasattr(items, "close"):
            items.close()  # type: ignore[attr-defined]
        self._put((None, error or StopIteration()))

    def _put(self, entry: Any, replaces: bool = False) -> None:
        while not self._is_closed.is_set():
            try:
                return self._queue.put(entry, timeout=0.0 if replaces else 0.1)
            except queue.Full:
                if replaces:
                    try:
                        self._queue.get_nowait()
                        self.dropped += 1
                    except queue.Empty:
                        pass

    def __next__(self) -> Item:
        return self.take()

    def take(self, timeout: float | None = None) -> Item:
        """The next item, or what the iterator raised; `queue.Empty` after `timeout` seconds."""
        if self._end is None:
            item, self._end = self._queue.get(timeout=timeout)
            if self._end is None:
                return item
        raise self._end

    def close(self, timeout: float | None = None) -> None:
        """Let the thread end, and wait for it, at most `timeout` seconds."""
        self._is_closed.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)


class ImageProgress:
    """Show how many images are done: a bar in a terminal, otherwise an occasional line.

    What the first images took does not count for the time left: a network is compiled with them.

    Args:
        total: number of images; None where it is not known.
        stream: where to write, or None for silence.
        what: the word before the count.
        unit: of what is counted; "B" is written as MB.
        first: what to say until the first are done.
    """

    def __init__(
        self,
        total: int | None,
        stream: TextIO | None = sys.stderr,
        what: str = "evaluated",
        unit: str = "image",
        first: str = "the first take longer",
    ):
        self.total, self.stream, self.what, self.unit = total, stream, what, unit
        self.done = 0
        self._first, self._first_seconds = 0, 0.0  # the images that came first, and their time
        self._before_first = first
        self._bar: tqdm | None = None

    def __enter__(self) -> ImageProgress:
        self._start = self._last = time.monotonic()
        if self.stream is not None and self.stream.isatty():
            is_bytes = self.unit == "B"
            self._bar = tqdm(
                total=self.total,
                file=self.stream,
                unit=self.unit,
                unit_scale=is_bytes,
                desc=self.what,
            )
            self._bar.set_postfix_str(self._before_first)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, count: int) -> None:
        """Note `count` more images."""
        self.done += count
        now, is_first = time.monotonic(), not self._first
        if is_first:
            self._first, self._first_seconds = count, now - self._start
        if self._bar is not None and is_first:
            self._bar.initial = self._bar.n = count
            self._bar.unpause()
            self._bar.set_postfix_str("")
        elif self._bar is not None:
            self._bar.update(count)
        elif self.stream is not None:
            if now - self._last >= SECONDS_BETWEEN_LINES or self.done == self.total:
                self._last = now
                print(self.line(now - self._start), file=self.stream, flush=True)

    def line(self, seconds: float) -> str:
        """Write the state after `seconds`: count, speed and time left, or in the end time taken."""
        scale, unit = (1e6, "MB") if self.unit == "B" else (1, f"{self.unit}s")
        total = "" if self.total is None else f"/{round(self.total / scale)}"
        state = f"{self.what} {round(self.done / scale)}{total} {unit}"
        speed = self.done / max(seconds, 1e-9) / scale
        if self.done == self.total:
            # Of a few images in no time at all a speed would say nothing.
            took = f" in {rounded(seconds)} s, {rounded(speed)} {unit}/s"
            return state + took * (seconds >= 1)
        if self.done == self._first:
            return state
        speed = (self.done - self._first) / max(seconds - self._first_seconds, 1e-9)
        state += f", {rounded(speed / scale)} {unit}/s"
        if self.total is None:
            return state
        left = round((self.total - self.done) / max(speed, 1e-9))
        return f"{state}, ETA {left // 3600:d}:{left // 60 % 60:02d}:{left % 60:02d}"


def with_progress(
    items: Iterable[Item], total: int, stream: TextIO | None, what: str
) -> Iterator[Item]:
    """Hand on one item after the other and show how many are done, see `ImageProgress`."""
    with ImageProgress(total, stream, what) as line:
        for item in items:
            yield item
            line.advance(1)
