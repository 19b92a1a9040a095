"""What happens when images cannot be read during a run.

An image that cannot be used is left out and listed; processes that died or hang are started again.
"""

import contextlib
import csv
import errno
import multiprocessing
import multiprocessing.heap
import queue
import re
import shutil
import signal
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from sparseinst_jax.data.plan import ImagePlan
from sparseinst_jax.data.records import ImageRecord
from sparseinst_jax.data.target_masks import TargetForm
from sparseinst_jax.data.train_image import TrainImage, load_train_image
from sparseinst_jax.runtime.files import keep_beside, written_whole
from sparseinst_jax.runtime.messages import brief, listed
from sparseinst_jax.runtime.progress import Ahead

ON_ERROR = ("stop", "skip")
MAX_SHARE = 0.05  # of the images seen lately that may be skipped
NUM_LATELY = 1000  # images
MIN_FAULTY = 8  # skipped images that are enough to judge the first ones by
_SHOWN = 5
# What reading an image raises for the image's own fault or the disk's.
ERRORS = (ValueError, OSError)


class Skip(NamedTuple):
    """One image that was left out: its id, what it is called, and why."""

    image_id: int
    source: str
    reason: str


def skip_of(record: ImageRecord, error: Exception) -> Skip:
    """Describe an image that raised an error."""
    return Skip(int(record.image_id), record.source, " ".join(str(error).split()))


def load_or_skip(
    records: Sequence[ImageRecord],
    plan: ImagePlan,
    flip_labels: tuple[int, ...],
    ignores_crowd: bool,
    form: TargetForm,
    skips: list[Skip],
) -> TrainImage:
    """Load a planned image; what cannot be used is left out and noted in `skips`.

    In place of the image comes an empty (black) one of the planned size without objects, so that
    nothing else of the batch or of the plan changes, on any number of hosts. Where only the image
    that objects are pasted from cannot be used, nothing is pasted.
    """
    try:
        return load_train_image(records, plan, flip_labels, ignores_crowd, form)
    except ERRORS as error:
        fault = error
    if plan.paste is not None:
        alone, own = plan._replace(paste=None), list[Skip]()
        loaded = load_or_skip(records, alone, flip_labels, ignores_crowd, form, own)
        skips += own or [skip_of(records[plan.paste.position], fault)]
        return loaded
    skips.append(skip_of(records[plan.position], fault))
    height, width = plan.transform.size
    region = -(-height // form.stride), -(-width // form.stride)
    is_ignored = np.zeros(region, bool) if ignores_crowd else None
    return TrainImage(np.zeros((height, width, 3), np.uint8), [], [], is_ignored, [], [])


class SkippedImages:
    """Records skipped images in `skipped.csv` of the run folder, and stops if there are too many.

    A step never occurs twice: opening drops what came after `last_step`, as with the metrics.

    Args:
      path: of the file; made when the first image is skipped.
      last_step: the step from which the run continues; 0 starts a new file.
      num_images: of one step on this host.
    """

    _COLUMNS = ("step", "part", "image_id", "file", "reason")

    def __init__(self, path: Path, last_step: int, num_images: int):
        self.path = path
        self._step, self._num_images = last_step, num_images
        self._rows = [row for row in _read(path) if int(row[0]) <= last_step]
        if path.exists():
            with written_whole(path) as temporary, temporary.open("w", newline="") as file:
                _writer(file).writerows([self._COLUMNS, *self._rows])
        self._lately = [int(row[0]) for row in self._rows if row[1] == "train"]

    def add(self, step: int, skips: Sequence[Skip]) -> None:
        """Note what was skipped of the images of a step (counted from 1, as in metrics.csv).

        Raises a ValueError if too many were skipped lately.
        """
        self._step = step
        if not skips:
            return
        self._note("train", skips)
        first = step - max(NUM_LATELY // self._num_images, 1)
        self._lately = [s for s in (*self._lately, *[step] * len(skips)) if s > first]
        # A run that begins with nothing but faulty images would learn from black ones.
        seen = step * self._num_images
        of = seen if len(self._lately) >= max(MIN_FAULTY, seen / 2) else NUM_LATELY
        self._refuse_too_many(len(self._lately), of, "images lately", skips)

    def add_evaluated(self, skips: Sequence[Skip], num_images: int) -> list[str]:
        """Note the images that an evaluation skipped; gives lines for the user.

        Raises a ValueError if they are too many.
        """
        if not skips:
            return []
        self._note("val", skips)
        self._refuse_too_many(len(skips), num_images, "images of the validation data", skips)
        return [
            f"WARNING: {len(skips)} of {num_images} images of the validation data cannot be used"
            f" and count as images without detections; listed in {self.path}"
        ]

    def summary(self) -> list[str]:
        """Lines on what was skipped in the whole run; empty if nothing was."""
        if not self._rows:
            return []
        ids = dict.fromkeys((row[1], row[2], row[3]) for row in self._rows)
        shown = [f"{part} image {number}: {file}" for part, number, file in ids]
        return [
            f"WARNING: {len(ids)} images could not be used, {len(self._rows)} times; listed in"
            f" {self.path}:",
            *(f"  {line}" for line in listed(shown, _SHOWN, "\n").split("\n")),
        ]

    def _refuse_too_many(self, number: int, of: int, what: str, skips: Sequence[Skip]) -> None:
        if number > MAX_SHARE * of:
            raise ValueError(
                f"{number} of {of} {what} cannot be used, more than {MAX_SHARE:.0%}: something is"
                f" wrong with the data or the disk. The last one: {skips[-1].reason}. All are"
                f" listed in {self.path}; `sparseinst check-data` finds them, too."
            )

    def _note(self, part: str, skips: Iterable[Skip]) -> None:
        rows = [(str(self._step), part, str(s.image_id), s.source, s.reason) for s in skips]
        is_new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            _writer(file).writerows([self._COLUMNS, *rows] if is_new else rows)
        self._rows += rows


def _writer(file):
    return csv.writer(file, lineterminator="\n")


def _read(path: Path) -> list[tuple[str, ...]]:
    """The whole rows; a line that a crash cut off is dropped, what others broke is kept beside."""
    if not path.exists():
        return []
    text = path.read_text(errors="replace")
    rows = list(csv.reader(text[: text.rfind("\n") + 1].splitlines()))
    columns = SkippedImages._COLUMNS
    good = [tuple(row) for row in rows if len(row) == len(columns) and row[0].isdecimal()]
    bad = [
        f"line {number}: expected {','.join(columns)}, got {brief(','.join(row))}"
        for number, row in enumerate(rows, start=1)
        if tuple(row) not in (columns, *good)
    ]
    if bad:
        keep_beside(path, bad)
    return good


Item = TypeVar("Item")

STUCK_SECONDS = 300.0  # without a batch
MAX_FAILURES = 2  # in a row at one batch; then it is no accident
_CLOSE_SECONDS = 15.0


class _LostError(Exception):
    """The reader delivers nothing any more; the text is the reason."""


class _FullError(_LostError):
    """There was no room in the shared memory through which processes hand over what they read."""


def supervised(
    start: Callable[[int], Iterator[Item]],
    number: int,
    print_line: Callable[[str], None] | None = None,
    start_alone: Callable[[int], Iterator[Item]] | None = None,
) -> Generator[Item, None, None]:
    """Iterate over `number` items of a reader, and start it again if it dies or hangs.

    Args:
      start: begins to read at an item; what is behind it (threads, processes) is ended by closing
        the iterator. Must give the same items whenever it is called.
      number: of items.
      print_line: takes a line for the user; by default to standard error.
      start_alone: the same without processes, for when shared memory is too small for them.

    Raises:
      ValueError: the reader was lost `MAX_FAILURES` times in a row at the same item.
      Exception: what the reader raised.
    """
    print_line = print_line or _print
    done = failures = 0
    while done < number:
        reader = _Reader(start, done)
        try:
            while done < number:
                item = reader.get()
                yield item
                done, failures = done + 1, 0
        except _LostError as lost:
            if isinstance(lost, _FullError) and start_alone is not None:
                print_line(
                    f"WARNING: {lost}; this process reads from here on, more slowly. {_CURE}"
                )
                start, start_alone = start_alone, None
                continue
            failures += 1
            if failures >= MAX_FAILURES:
                raise ValueError(
                    f"the images cannot be read: {lost}, {failures} times in a row. Is the disk or"
                    " the network drive of the images there, and memory enough for"
                    " config.data.num_workers processes (0 reads in the training process)?"
                ) from None
            print_line(f"WARNING: {lost}; reading starts again at the same batch")
        finally:
            reader.close()


_CURE = (
    "Processes need it larger: `docker run --shm-size=8g`, or a volume of memory at /dev/shm; or"
    " --config.data.num_workers=0."
)


def _shared_memory() -> str:
    try:
        size = shutil.disk_usage("/dev/shm")
    except OSError:
        return "shared memory is too small"
    return f"/dev/shm ({size.total >> 20} MiB, {size.free >> 20} free) is too small"


def _share_numbers_in_files() -> None:
    """Let the numbers that processes share lie in a file, not in /dev/shm.

    A page there is taken when it is first touched: where readers have filled it by then, SIGBUS
    would end this process.
    """
    arena: Any = multiprocessing.heap.Arena
    if hasattr(arena, "_dir_candidates"):
        arena._dir_candidates = []


class _Reader:
    """A thread that iterates, with the processes that it started."""

    def __init__(self, start: Callable[[int], Any], first: int):
        self._before = set(multiprocessing.active_children())
        self._is_lost = False
        self._processes: set[Any] = set()
        self._items = Ahead(_read_from(start, first), 1)

    def get(self) -> Any:
        try:
            item = self._items.take(STUCK_SECONDS)
        except queue.Empty:
            self._is_lost = True
            raise _LostError(f"no batch for {STUCK_SECONDS:g} s, the readers hang") from None
        except RuntimeError as error:
            # Grain's own words; the fault of an image is no RuntimeError.
            if "terminated unexpectedly" not in str(error):
                raise
            self._is_lost = True
            found = re.search(r"exit code (-?\d+)", str(error))
            if found and int(found[1]) == -signal.SIGBUS:
                raise _FullError(f"{_shared_memory()} for a process that reads images") from error
            number = f" ({found[0]})" if found else ""
            raise _LostError(f"a process that reads images has died{number}") from error
        except OSError as error:
            if error.errno != errno.ENOSPC:  # images are only read
                raise
            raise _FullError(f"{_shared_memory()} for processes that read images") from error
        if not self._processes:
            self._look()
        return item

    def close(self) -> None:
        """End the thread; processes of a lost reader are killed."""
        if self._is_lost:
            self._look()
            for process in self._processes:
                process.kill()
        self._items.close(_CLOSE_SECONDS)

    def _look(self) -> None:
        """Note the processes that were started."""
        self._processes |= set(multiprocessing.active_children()) - self._before


def _read_from(start: Callable[[int], Iterator[Item]], first: int) -> Iterator[Item]:
    """Start a reader and hand on its items, all in the thread that asks for the first one."""
    # Processes inherit what is blocked: a terminal's Ctrl-C must not end them halfway.
    with contextlib.suppress(AttributeError):  # no such thing on Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    _share_numbers_in_files()
    yield from start(first)
    raise RuntimeError("the reader ended before the last batch")


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
