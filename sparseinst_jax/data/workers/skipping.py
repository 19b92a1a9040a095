"""Images that cannot be used while a run goes on: an empty image in their place, and a list."""

import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sparseinst_jax.data.coco import ImageRecord
from sparseinst_jax.data.plan import ImagePlan
from sparseinst_jax.data.target_masks import TargetForm
from sparseinst_jax.data.train_image import TrainImage, load_train_image
from sparseinst_jax.runtime.messages import listed

ON_ERROR = ("stop", "skip")
MAX_SHARE = 0.05  # of the images seen lately that may be skipped
NUM_LATELY = 1000  # images
_SHOWN = 5
# What reading an image raises for the image's own fault or the disk's.
ERRORS = (ValueError, OSError)


class Skip(NamedTuple):
    """One image that was left out: its id, what it is called, and why."""

    image_id: int
    source: str
    reason: str


def skip_of(record: ImageRecord, error: Exception) -> Skip:
    """What there is to say of an image that raised an error."""
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
        try:
            alone = plan._replace(paste=None)
            loaded = load_train_image(records, alone, flip_labels, ignores_crowd, form)
        except ERRORS as error:
            fault = error
        else:
            skips.append(skip_of(records[plan.paste.position], fault))
            return loaded
    skips.append(skip_of(records[plan.position], fault))
    height, width = plan.transform.size
    region = -(-height // form.stride), -(-width // form.stride)
    is_ignored = np.zeros(region, bool) if ignores_crowd else None
    return TrainImage(np.zeros((height, width, 3), np.uint8), [], [], is_ignored, [], [])


class SkippedImages:
    """Lists what was skipped in `skipped.csv` of the run folder, and stops above a share.

    A step never occurs twice: opening drops what came after `last_step`, as with the metrics.

    Args:
      path: of the file; made when the first image is skipped.
      last_step: the step from which the run continues; 0 starts anew.
      num_images: of one step on this host.
    """

    _COLUMNS = ("step", "part", "image_id", "file", "reason")

    def __init__(self, path: Path, last_step: int, num_images: int):
        self.path = path
        self._step, self._num_images = last_step, num_images
        self._rows = [row for row in _read(path) if int(row[0]) <= last_step]
        if path.exists():
            self._rewrite()
        self._lately = [int(row[0]) for row in self._rows if row[1] == "train"]

    def add(self, step: int, skips: Sequence[Skip]) -> None:
        """Note what was skipped of the images of a step (counted from 1, as in metrics.csv).

        Raises:
          ValueError: too many were skipped lately.
        """
        self._step = step
        if not skips:
            return
        self._note("train", skips)
        first = step - max(NUM_LATELY // self._num_images, 1)
        self._lately = [s for s in (*self._lately, *[step] * len(skips)) if s > first]
        self._refuse_too_many(len(self._lately), NUM_LATELY, "images lately", skips)

    def add_evaluated(self, skips: Sequence[Skip], num_images: int) -> list[str]:
        """Note the images that an evaluation skipped; gives lines for the user.

        Raises:
          ValueError: too many of its images were skipped.
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
        """What was skipped in the whole run, for the end; empty where nothing was."""
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

    def _rewrite(self) -> None:
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            _writer(file).writerows([self._COLUMNS, *self._rows])
        os.replace(temporary, self.path)


def _writer(file):
    return csv.writer(file, lineterminator="\n")


def _read(path: Path) -> list[tuple[str, ...]]:
    """The whole rows; a line that a crash cut off is dropped."""
    if not path.exists():
        return []
    text = path.read_text()
    rows = list(csv.reader(text[: text.rfind("\n") + 1].splitlines()))[1:]
    return [tuple(row) for row in rows if len(row) == len(SkippedImages._COLUMNS)]
