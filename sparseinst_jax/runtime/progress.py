"""Work through many images: in threads, a few ahead of use, with a progress display."""

from __future__ import annotations

import collections
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from typing import TextIO, TypeVar

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
