"""Report progress of training: a live line, a CSV file and, if wanted, TensorBoard."""

import collections
import contextlib
import csv
import os
import resource
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

import jax
import numpy as np

from sparseinst_jax.data.batch import Batch
from sparseinst_jax.runtime.files import keep_beside, written_whole
from sparseinst_jax.runtime.messages import brief, listed, rounded

Row = Mapping[str, float | int]
_REDRAW_SECONDS = 0.1
_SECONDS_WITHOUT_A_WORD = 5.0  # off a terminal: a step taken from the compilation cache takes two
_STEPS_FOR_SPEED = 100  # the newest steps, for the speed shown and the time left


class RowWriter(Protocol):
    """Where rows of metrics go."""

    def write(self, rows: Sequence[Row]) -> None:
        """Write whole rows, each with its `step`."""
        ...

    def close(self) -> None:
        """Finish writing."""
        ...


class MetricsFile:
    """A CSV file with one row per step; a step never occurs twice.

    Opening drops the rows after `last_step`, which a resumed run will write again, and a row that
    was cut off by a crash. The columns grow when a new metric appears. A file that was removed or
    altered by others gets its header again, and what cannot be read of it is kept beside it: each
    with a line to standard error.

    Args:
      path: of the file; made if missing.
      last_step: the step from which the run continues; 0 starts a new file.
    """

    def __init__(self, path: Path, last_step: int):
        self._path, self._columns = path, ["step"]
        rows = [row for row in self._readable() if row["step"] <= last_step]
        self._columns = list(dict.fromkeys(key for row in rows for key in row)) or ["step"]
        lost = last_step - len({row["step"] for row in rows})
        if lost > 0:
            _warn(f"{path} lacks the rows of {lost} of the {last_step} steps done")
        self._rewrite(rows)

    def write(self, rows: Sequence[Row]) -> None:
        """Append rows and flush them."""
        new = [key for row in rows for key in row if key not in self._columns]
        is_there = self._path.exists()
        if new or not is_there or not self._has_our_header():
            if not is_there:
                _warn(f"{self._path} was removed; it begins again at step {rows[0]['step']}")
            kept = self._readable()
            self._columns += dict.fromkeys(new)
            self._rewrite(kept)
        with self._path.open("a", newline="") as file:
            self._writer(file).writerows(_as_text(rows))

    def close(self) -> None:
        """Nothing stays open between writes."""

    def _has_our_header(self) -> bool:
        with self._path.open(errors="replace") as file:
            return file.readline().rstrip("\n") == ",".join(self._columns)

    def _readable(self) -> list[dict[str, float | int]]:
        faults: list[str] = []
        rows = read_metrics(self._path, faults)
        if faults:
            keep_beside(self._path, faults)
        return rows

    def _writer(self, file: TextIO) -> csv.DictWriter:
        return csv.DictWriter(file, self._columns, restval="", lineterminator="\n")

    def _rewrite(self, rows: Sequence[Row]) -> None:
        """Replace the file at once, so that a crash leaves the old or the new one."""
        self._columns += dict.fromkeys(k for row in rows for k in row if k not in self._columns)
        with written_whole(self._path) as temporary, temporary.open("w", newline="") as file:
            writer = self._writer(file)
            writer.writeheader()
            writer.writerows(_as_text(rows))


class TensorBoard:
    """Write rows as TensorBoard scalars.

    Raises:
      ValueError: the extra `tensorboard` is not installed.
    """

    def __init__(self, folder: Path, last_step: int):
        try:
            import tensorboardX
        except ImportError:
            raise ValueError(
                "config.train.tensorboard is true, but tensorboardX is not installed."
                ' Run: pip install "sparseinst_jax[tensorboard]", or set it to false.'
            ) from None
        self._writer = tensorboardX.SummaryWriter(str(folder), purge_step=last_step + 1)

    def write(self, rows: Sequence[Row]) -> None:
        """Add one scalar per value."""
        for row in rows:
            for key, value in row.items():
                if key != "step":
                    self._writer.add_scalar(key, value, int(row["step"]))
        self._writer.flush()

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class Progress:
    """One live line on a terminal, a line every `log_every` steps elsewhere.

    A step that has to be compiled counts neither for the speed nor for the time left: it takes
    minutes where the others take a fraction of a second.

    Args:
      num_steps: the last step.
      steps_per_epoch: for the epoch shown.
      batch_size: images per step, over all hosts.
      first_step: steps done before this process started.
      stream: where to write; standard output by default.
    """

    def __init__(
        self,
        num_steps: int,
        steps_per_epoch: float,
        batch_size: int,
        first_step: int = 0,
        stream: TextIO | None = None,
    ):
        self._stream = stream or sys.stdout
        self._is_live = self._stream.isatty()
        self._num_steps, self._steps_per_epoch = num_steps, steps_per_epoch
        self._batch_size = batch_size
        self._step = first_step
        self._shapes: set[Any] = set()  # that are compiled
        self._last = self._drawn_at = time.monotonic()  # the end of the step before
        self._recent: collections.deque[float] = collections.deque(maxlen=_STEPS_FOR_SPEED)
        self._rows: list[Row] = []  # since the last report
        self._shown: dict[str, str] = {}  # of the last report: losses, learning rate
        self._line_open = False
        self._open_window()

    def _open_window(self) -> None:
        self._seconds, self._waited, self._counted = 0.0, 0.0, 0

    @contextlib.contextmanager
    def stepping(self, batch: Batch, waited: float) -> Iterator[None]:
        """Count the step that is done inside; show that it is compiled if its shape is new.

        Args:
          batch: of the step.
          waited: the time in seconds that the step waited for it.
        """
        shapes = tuple(np.shape(part) for part in batch if part is not None)
        is_new = shapes not in self._shapes
        self._shapes.add(shapes)
        with self._compiling(*batch.images.shape[1:3]) if is_new else contextlib.nullcontext():
            yield
        now, seconds = time.monotonic(), time.monotonic() - self._last
        self._step, self._last = self._step + 1, now
        if not is_new:
            self._recent.append(seconds)
            self._seconds, self._waited = self._seconds + seconds, self._waited + waited
            self._counted += 1
        if self._is_live and now - self._drawn_at > _REDRAW_SECONDS:
            self._drawn_at = now
            self._draw(self._parts())

    @contextlib.contextmanager
    def _compiling(self, height: int, width: int) -> Iterator[None]:
        """Show the seconds of a step that is compiled; off a terminal, where they are many."""
        started, done = time.monotonic(), threading.Event()
        parts = [
            f"step {self._step + 1}/{self._num_steps}",
            f"compiling for images of {height} x {width}",
        ]

        def show() -> None:
            if not self._is_live and not done.wait(_SECONDS_WITHOUT_A_WORD):
                self.print_line("  ".join(parts))
            while self._is_live and not done.wait(_REDRAW_SECONDS):
                self._draw([*parts, format_seconds(time.monotonic() - started)])

        thread = threading.Thread(target=show, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
        seconds = time.monotonic() - started
        if not self._is_live and seconds > _SECONDS_WITHOUT_A_WORD:
            self.print_line(f"compiled in {format_seconds(seconds)}")

    def paused(self, seconds: float) -> None:
        """Take time that was not training (an evaluation) out of the rates."""
        self._last += seconds

    def rates(self) -> dict[str, float]:
        """Rates since the last report: images_per_second, data_wait (share of 1), memory_gib.

        Steps that were compiled are left out; without others there is the memory alone.
        """
        if not self._counted:
            return {"memory_gib": memory_gib()}
        seconds = max(self._seconds, 1e-9)
        return {
            "images_per_second": self._counted * self._batch_size / seconds,
            "data_wait": min(self._waited / seconds, 1.0),
            "memory_gib": memory_gib(),
        }

    def add(self, rows: Sequence[Row]) -> None:
        """Take rows of metrics, for the means of the next report."""
        self._rows += rows

    def report(self) -> None:
        """Show the means of the losses since the last report, and start the next window."""
        for name in dict.fromkeys(name for row in self._rows for name in row):
            values = [row[name] for row in self._rows if name in row]
            if name.startswith("loss/"):
                self._shown[name.removeprefix("loss/")] = f"{sum(values) / len(values):.3f}"
            elif name == "learning_rate":
                self._shown["lr"] = f"{values[-1]:.3g}"
        if self._is_live:
            self._draw(self._parts())
        else:
            self._write("  ".join(self._parts()) + "\n")
        self._rows = []
        self._open_window()

    def print_line(self, text: str) -> None:
        """Print a message on a line of its own."""
        self.close()
        self._write(f"{text}\n")

    def close(self) -> None:
        """End the live line, so that what others print starts on a line of its own."""
        if self._line_open:
            self._write("\n")
            self._line_open = False

    def _draw(self, parts: Sequence[str]) -> None:
        """Draw the parts that fit the terminal: a line that wraps could not be drawn over."""
        width, line = _terminal_width(self._stream) - 1, parts[0]
        for part in parts[1:]:
            if len(line) + 2 + len(part) > width:
                break
            line += f"  {part}"
        self._write("\r" + line[:width].ljust(width))
        self._line_open = True

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()

    def _parts(self) -> list[str]:
        """What is shown, the most important first."""
        parts = [f"step {self._step}/{self._num_steps}"]
        if self._recent:
            seconds = max(sum(self._recent) / len(self._recent), 1e-9)
            parts += [
                f"ETA {format_seconds((self._num_steps - self._step) * seconds)}",
                f"{rounded(self._batch_size / seconds)} images/s",
            ]
        parts += [f"{name} {text}" for name, text in self._shown.items()]
        rates = self.rates()
        if "data_wait" in rates:
            parts.append(f"data wait {rates['data_wait']:.0%}")
        epoch = self._step / self._steps_per_epoch
        return [*parts, f"epoch {epoch:.1f}", f"{rates['memory_gib']:.1f} GiB"]


def read_metrics(path: Path, faults: list[str] | None = None) -> list[dict[str, float | int]]:
    """Read the whole rows of a metrics file; empty cells are left out.

    Args:
      path: of the file.
      faults: takes what cannot be read, line by line; such rows are left out.

    Returns:
      Rows of numbers in the order of the file; none if it does not exist.

    Raises:
      ValueError: something cannot be read, and nobody takes the `faults`.
    """
    if not path.exists():
        return []
    text = path.read_text("utf-8-sig", "replace")
    # A line without its end was cut off by a crash, maybe in the middle of a number.
    lines = csv.reader(text[: text.rfind("\n") + 1].splitlines())
    header = next(lines, ["step"])
    rows, found = [], []
    if "step" not in header:
        found.append(f"line 1 names no column step, got {brief(','.join(header))}")
        lines = ()
    for number, cells in enumerate(lines, start=2):
        try:
            if len(cells) != len(header):
                raise ValueError(f"{len(cells)} cells, expected {len(header)}")
            row = {
                name: _number(name, cell) for name, cell in zip(header, cells, strict=True) if cell
            }
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, KeyError, OverflowError) as error:
            reason = "no step" if isinstance(error, KeyError) else str(error)
            found.append(f"line {number}: {reason}")
    if found and faults is None:
        raise ValueError(f"{path} cannot be read: {listed(found, 3, '; ')}. Mend or remove it.")
    if faults is not None:
        faults += found
    return rows


def _number(column: str, cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        raise ValueError(f"{column} is {brief(cell)}, expected a number") from None


def _warn(line: str) -> None:
    print(f"WARNING: {line}", file=sys.stderr, flush=True)


def memory_gib() -> float:
    """Peak memory in GiB: of the fullest local accelerator, else of this process."""
    peaks = [
        (device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()
    ]
    if max(peaks) > 0:
        return max(peaks) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def format_seconds(seconds: float) -> str:
    """Write `1:02:03` or `2:03`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def _as_text(rows: Iterable[Row]) -> list[dict[str, str]]:
    # Nine digits hold every float32 exactly.
    return [{k: str(v) if isinstance(v, int) else f"{v:.9g}" for k, v in r.items()} for r in rows]


def _terminal_width(stream: TextIO) -> int:
    try:
        return max(os.get_terminal_size(stream.fileno()).columns, 20)
    except (OSError, ValueError):
        return 120
