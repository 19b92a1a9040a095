"""Prove that an exported file finds what the package finds, before it is handed over.

Both get the same photos, resized and padded to at least two sizes. Which candidates are kept, and
their labels, must be equal; masks and scores differ by rounding. A cell of a mask that lies at the
cut may fall on either side of it, which moves the mean probability inside a small mask by more than
rounding: a score may differ by what such cells explain, and by no more.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sparseinst_jax.data import shapes
from sparseinst_jax.runner import run_lengths
from sparseinst_jax.runner.predictor import BasePredictor, Fetched, Pending

MASK_PROBS, SCORES, PIXELS = 2e-4, 1e-5, 1e-5  # largest differences; pixels as a fraction
PHOTO_SIZE = (384, 512)
AT_THE_CUT = 1e-5  # of a probability, where rounding decides


class Agreement(NamedTuple):
    """How far an exported file is from the model.

    Attributes:
      photos: how many were compared.
      sizes: padded (height, width) of each.
      candidates: kept by the model, over all photos.
      labels_or_kept: candidates whose label differs, or that only one of the two keeps.
      mask_probs: largest difference of a probability.
      scores: largest difference of a score that no cell at the cut explains.
      pixels: different pixels of all masks at the photos' size, as a fraction.
      mean_iou: of the masks, the model's against the file's.
      seconds: the comparison took.
    """

    photos: int
    sizes: list[list[int]]
    candidates: int
    labels_or_kept: int
    mask_probs: float
    scores: float
    pixels: float
    mean_iou: float
    seconds: float

    def faults(self) -> list[str]:
        """What is beyond the bounds of float32."""
        bounds = {"mask_probs": MASK_PROBS, "scores": SCORES, "pixels": PIXELS}
        found = [
            f"{name}: {getattr(self, name):.2g}, at most {most:g} is rounding"
            for name, most in bounds.items()
            if not getattr(self, name) <= most
        ]
        if self.labels_or_kept:
            found.append(f"{self.labels_or_kept} of {self.candidates} candidates differ")
        return found

    def __str__(self) -> str:
        sizes = ", ".join(f"{height}x{width}" for height, width in self.sizes)
        return (
            f"{self.photos} photos ({sizes}), {self.candidates} objects: labels "
            f"{'equal' if not self.labels_or_kept else f'differ in {self.labels_or_kept}'}, "
            f"mask probabilities within {self.mask_probs:.1e}, scores within {self.scores:.1e}, "
            f"{self.pixels:.1e} of mask pixels differ (mean IoU {self.mean_iou:.6f})"
        )


def drawn_photos() -> list[np.ndarray]:
    """Draw two scenes, a wide and a high one, which are resized to different padded sizes."""
    wide, high = (shapes.draw_image(0, index, PHOTO_SIZE)[0] for index in (1, 2))
    turned = [wide if wide.shape[0] < wide.shape[1] else wide.swapaxes(0, 1)]
    turned.append(high if high.shape[0] > high.shape[1] else high.swapaxes(0, 1))
    return [np.ascontiguousarray(photo) for photo in turned]


def photos_of_two_sizes(exported: BasePredictor, photos: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The photos, with drawn ones where they would all be padded to one size."""
    sizes = {exported.padded_size(exported.prepare(photo)) for photo in photos}
    return [*photos, *drawn_photos()] if len(sizes) < 2 else list(photos)


def compare(
    model: BasePredictor, exported: BasePredictor, photos: Sequence[np.ndarray]
) -> Agreement:
    """Compare an exported file with the model.

    Args:
      model: the package's.
      exported: the file's.
      photos: uint8 [h, w, 3].
    """
    start, sizes, worst = time.monotonic(), [], np.zeros(2)
    counts = np.zeros(4, np.int64)  # candidates, different ones, pixels, different ones
    ious: list[float] = []
    for photo in photos:
        item = exported.prepare(photo)
        size = exported.padded_size(item)
        sizes.append(list(size))
        pending = [Pending([0], [item], each.select([item], size)) for each in (model, exported)]
        ours, theirs = model.fetch(pending[0].selection), exported.fetch(pending[1].selection)
        kept = ours.is_kept[0] | theirs.is_kept[0]
        differ = (ours.is_kept[0] != theirs.is_kept[0]) | (ours.labels[0] != theirs.labels[0])
        counts[:2] += int(ours.is_kept[0].sum()), int((differ & kept).sum())
        worst = np.maximum(worst, _worst(ours, theirs, model._cut.threshold))
        found = [each.finish([p])[0] for each, p in zip((model, exported), pending, strict=True)]
        masks = [dict(zip(f.query_index.tolist(), f.encode()[0], strict=True)) for f in found]
        for query in masks[0].keys() & masks[1].keys():
            a, b = run_lengths.decode_masks([masks[0][query], masks[1][query]], photo.shape[:2])
            union = int((a | b).sum())
            different = int((a != b).sum())
            counts[2:] += a.size, different
            ious.append(1 - different / union if union else 1.0)
    return Agreement(
        photos=len(photos),
        sizes=sizes,
        candidates=int(counts[0]),
        labels_or_kept=int(counts[1]),
        mask_probs=float(worst[0]),
        scores=float(worst[1]),
        pixels=float(counts[3] / max(counts[2], 1)),
        mean_iou=float(np.mean(ious)) if ious else 1.0,
        seconds=round(time.monotonic() - start, 1),
    )


def _worst(ours: Fetched, theirs: Fetched, cut: float) -> np.ndarray:
    """Largest difference of probabilities, and of scores beyond what cells at the cut explain."""
    a, b = np.asarray(ours.masks)[0], np.asarray(theirs.masks)[0]
    probs = np.abs(a - b).max(initial=0.0)
    at_the_cut = (np.abs(a - cut) <= AT_THE_CUT).sum((1, 2))
    explained = at_the_cut / np.maximum((a > cut).sum((1, 2)), 1)
    scores = np.abs(ours.scores[0] - theirs.scores[0]) - explained
    return np.array([probs, scores.max(initial=0.0)])
