"""Report progress of training: a live line, a CSV file and, if wanted, TensorBoard."""

import csv
import os
import resource
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

import jax

Row = Mapping[str, float | int]
_REDRAW_SECONDS = 0.1


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
    was cut off by a crash. The columns grow when a new metric appears.

    Args:
      path: of the file; made if missing.
      last_step: the step from which the run continues; 0 starts a new file.
    """

    def __init__(self, path: Path, last_step: int):
        self._path = path
        rows = [row for row in read_metrics(path) if row["step"] <= last_step]
        self._columns = list(dict.fromkeys(key for row in rows for key in row)) or ["step"]
        self._rewrite(rows)

    def write(self, rows: Sequence[Row]) -> None:
        """Append rows and flush them."""
        new = [key for row in rows for key in row if key not in self._columns]
        if new:
            self._columns += dict.fromkeys(new)
            self._rewrite(read_metrics(self._path))
        with self._path.open("a", newline="") as file:
            self._writer(file).writerows(_as_text(rows))

    def close(self) -> None:
        """Nothing stays open between writes."""

    def _writer(self, file: TextIO) -> csv.DictWriter:
        return csv.DictWriter(file, self._columns, restval="", lineterminator="\n")

    def _rewrite(self, rows: Sequence[Row]) -> None:
        """Replace the file at once, so that a crash leaves the old or the new one."""
        temporary = self._path.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            writer = self._writer(file)
            writer.writeheader()
            writer.writerows(_as_text(rows))
        os.replace(temporary, self._path)


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
        self._losses: Row = {}
        self._drawn_at = 0.0
        self._line_open = False
        self._open_window()

    def _open_window(self) -> None:
        self._window_start, self._window_step = time.monotonic(), self._step
        self._waited = self._paused = 0.0

    def stepped(self, step: int, waited: float) -> None:
        """Count a step; `waited` is the time in seconds that it waited for its batch."""
        self._step = step
        self._waited += waited
        now = time.monotonic()
        if self._is_live and now - self._drawn_at > _REDRAW_SECONDS:
            self._drawn_at = now
            self._draw()

    def paused(self, seconds: float) -> None:
        """Take time that was not training (an evaluation) out of the rates."""
        self._paused += seconds

    def rates(self) -> dict[str, float]:
        """Rates since the last report: images_per_second, data_wait (share of 1), memory_gib."""
        seconds = max(time.monotonic() - self._window_start - self._paused, 1e-9)
        images = (self._step - self._window_step) * self._batch_size
        return {
            "images_per_second": images / seconds,
            "data_wait": min(self._waited / seconds, 1.0),
            "memory_gib": memory_gib(),
        }

    def report(self, row: Row) -> None:
        """Show a row of metrics and start the next window of rates."""
        self._losses = row
        if self._is_live:
            self._draw()
        else:
            print(self._line(), file=self._stream, flush=True)
        self._open_window()

    def print_line(self, text: str) -> None:
        """Print a message on a line of its own."""
        self.close()
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """End the live line, so that what others print starts on a line of its own."""
        if self._line_open:
            print(file=self._stream, flush=True)
            self._line_open = False

    def _draw(self) -> None:
        # The live line is cut to the terminal: one that wraps could not be drawn over.
        width = _terminal_width(self._stream)
        self._stream.write("\r" + self._line()[: width - 1].ljust(width - 1))
        self._stream.flush()
        self._line_open = True

    def _line(self) -> str:
        rates = self.rates()
        row = {**rates, **self._losses} if not self._is_live else {**self._losses, **rates}
        parts = [
            f"step {self._step}/{self._num_steps}",
            f"epoch {self._step / self._steps_per_epoch:.1f}",
        ]
        names = [name for name in row if name.startswith("loss/")]
        parts += [f"{name.removeprefix('loss/')} {row[name]:.4f}" for name in names]
        if "learning_rate" in row:
            parts.append(f"lr {row['learning_rate']:.3g}")
        parts += [
            f"{row['images_per_second']:.1f} images/s",
            f"data wait {row['data_wait']:.0%}",
            f"{row['memory_gib']:.1f} GiB",
            f"ETA {format_seconds(self._remaining(row['images_per_second']))}",
        ]
        return "  ".join(parts)

    def _remaining(self, images_per_second: float) -> float:
        images = (self._num_steps - self._step) * self._batch_size
        return images / images_per_second if images_per_second > 0 else float("inf")


def read_metrics(path: Path) -> list[dict[str, float | int]]:
    """Read the whole rows of a metrics file; empty cells are left out.

    Returns:
      Rows of numbers in the order of the file; none if it does not exist.
    """
    if not path.exists():
        return []
    text = path.read_text()
    # A line without its end was cut off by a crash, maybe in the middle of a number.
    lines = text[: text.rfind("\n") + 1].splitlines()
    rows = []
    for cells in csv.DictReader(lines):
        row: dict[str, Any] = {k: float(v) for k, v in cells.items() if k and v}
        if "step" in row:
            rows.append({**row, "step": int(row["step"])})
    return rows


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
    """`1:02:03` or `2:03`; `?` where unknown."""
    if seconds == float("inf"):
        return "?"
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
