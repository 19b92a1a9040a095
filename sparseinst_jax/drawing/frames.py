"""Pictures of video frames: drawn in processes that do without JAX, in colours that stay."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from sparseinst_jax.drawing.crops import decode_crop
from sparseinst_jax.drawing.pictures import Colour, draw_instances, instance_colour


def draw_frame(
    image: np.ndarray,
    rles: Sequence[Mapping[str, Any]],
    captions: Sequence[str],
    colours: Sequence[Colour],
) -> np.ndarray:
    """Draw objects over a frame, see `draw_instances`.

    Args:
        image: uint8 [h, w, 3].
        rles: D compressed RLEs, the first is drawn on top.
        captions: D strings.
        colours: D colours.

    Returns:
        uint8 [h, w, 3], a whole factor larger where the frame is small.
    """
    return np.asarray(draw_instances(image, map(decode_crop, rles), captions, colours))


def leave_signals_to_parent() -> None:
    """For a process that draws: a terminal sends Ctrl-C to it, too, and the parent decides."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


class SteadyColours:
    """Give an object the same colour from frame to frame, by the overlap of its masks.

    Of each frame's objects and those seen lately, the pairing with the largest sum of overlaps
    (intersection over union) is taken, within each class. This is for the eye: an object that is
    hidden for longer, or moves further than its own size between frames, gets a new colour, and two
    that cross may exchange theirs. It is no tracking.

    Args:
        least_overlap: below it two masks are two objects.
        remembered: frames for which an object that is not seen keeps its colour.
    """

    def __init__(self, least_overlap: float = 0.2, remembered: int = 10):
        self._least_overlap, self._remembered = least_overlap, remembered
        self._seen: dict[int, tuple[int, int, Any]] = {}  # number -> its last frame, label, mask
        self._frame = self._next = 0

    def __call__(self, rles: Sequence[Any], labels: Sequence[int]) -> list[Colour]:
        """Return the colours of a frame's D objects; frames come in their order."""
        self._frame += 1
        oldest = self._frame - self._remembered
        self._seen = {key: each for key, each in self._seen.items() if each[0] >= oldest}
        numbers = self._known(rles, labels)
        for place, number in enumerate(numbers):
            if number < 0:
                numbers[place], self._next = self._next, self._next + 1
        for number, rle, label in zip(numbers, rles, labels, strict=True):
            self._seen[number] = self._frame, int(label), rle
        return [instance_colour(number) for number in numbers]

    def _known(self, rles: Sequence[Any], labels: Sequence[int]) -> list[int]:
        """The number of each object that was seen before; -1 for the others."""
        from scipy.optimize import linear_sum_assignment  # takes as long to import as JAX

        numbers = [-1] * len(rles)
        if not rles or not self._seen:
            return numbers
        keys = list(self._seen)
        seen = [self._seen[key] for key in keys]
        overlaps = np.array(
            coco_mask.iou(list(rles), [rle for _, _, rle in seen], [False] * len(seen))
        )
        is_same_class = np.array(labels)[:, None] == [label for _, label, _ in seen]
        overlaps = np.where(is_same_class, overlaps, 0.0)
        for row, column in zip(*linear_sum_assignment(overlaps, maximize=True), strict=True):
            if overlaps[row, column] >= self._least_overlap:
                numbers[row] = keys[column]
        return numbers
