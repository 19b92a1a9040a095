"""Prove that an exported file finds what the package finds, before it is handed over.

Both get the same photos, resized and padded to at least two sizes. Which candidates are kept, and
their labels, must be equal; masks and scores differ by rounding. A cell of a mask that lies at the
cut may fall on either side of it, which moves the mean probability inside a small mask by more than
rounding: a score may differ by what such cells explain, and by no more. Where the model chooses on
its way between things that are equal up to rounding, it finds this or that: there the file must
agree with the model as it rounds otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple, TextIO

import numpy as np

from sparseinst_jax.data import shapes
from sparseinst_jax.runner import run_lengths
from sparseinst_jax.runner.masks import MaskCut
from sparseinst_jax.runner.predictor import BasePredictor, Pending, Prepared, Size
from sparseinst_jax.runtime.progress import with_progress

PHOTO_SIZE = (384, 512)
ROUNDINGS = 12  # ways to round that are tried; one tie falls either way in half of them
AT_THE_CUT = 1e-5  # of a probability, where rounding decides


class Bounds(NamedTuple):
    """What is rounding.

    Attributes:
      mask_probs: largest difference of a probability in nearly every mask.
      outliers: the share of masks that may differ by more.
      outlier_probs: what these may differ by.
      scores: largest difference of a score.
      pixels: of the masks at the photo's size, as a fraction.
    """

    mask_probs: float
    outliers: float
    outlier_probs: float
    scores: float
    pixels: float


ROUNDING = Bounds(2e-4, 0.0, 2e-4, 1e-5, 1e-5)
# In FastInst every layer's attention sees the masks before it, cut at 0: there, too, a cell may
# fall on either side, and none of the outputs shows it. It moves what its query finds.
BEHIND_CUTS = Bounds(2e-4, 0.02, 0.05, 1e-4, 5e-5)


class Agreement(NamedTuple):
    """How far an exported file is from the model.

    Attributes:
      photos: how many were compared.
      sizes: padded (height, width) of each.
      candidates: kept by the model, over all photos.
      labels_or_kept: candidates whose label differs, or that only one of the two keeps.
      mask_probs: largest difference of a probability.
      outliers: the share of masks with a difference above `ROUNDING.mask_probs`.
      scores: largest difference of a score that no cell at the cut explains.
      pixels: different pixels of all masks at the photos' size, as a fraction.
      is_behind_cuts: whether masks are cut within the network, too: other bounds.
      mean_iou: of the masks, the model's against the file's.
      ties: how many photos were compared with a model whose weights are rounded otherwise.
      seconds: the comparison took.
    """

    photos: int
    sizes: list[list[int]]
    candidates: int
    labels_or_kept: int
    mask_probs: float
    outliers: float
    scores: float
    pixels: float
    is_behind_cuts: bool
    mean_iou: float
    ties: int
    seconds: float

    def faults(self) -> list[str]:
        """What is beyond the bounds of float32."""
        bounds = BEHIND_CUTS if self.is_behind_cuts else ROUNDING
        found = [
            f"{name}: {getattr(self, name):.2g}, at most {most:g} is rounding"
            for name, most in (
                ("mask_probs", bounds.outlier_probs),
                ("outliers", bounds.outliers),
                ("scores", bounds.scores),
                ("pixels", bounds.pixels),
            )
            if not getattr(self, name) <= most
        ]
        if self.labels_or_kept:
            found.append(f"{self.labels_or_kept} of {self.candidates} candidates differ")
        return found

    def __str__(self) -> str:
        sizes = ", ".join(f"{height}x{width}" for height, width in self.sizes)
        labels = f"differ in {self.labels_or_kept}" if self.labels_or_kept else "equal"
        more = f" ({self.outliers:.1%} of masks above {ROUNDING.mask_probs:g})"
        others = f"; {self.ties} by other rounding" if self.ties else ""
        return (
            f"{self.photos} photos ({sizes}{others}), {self.candidates} objects: labels {labels}, "
            f"mask probabilities within {self.mask_probs:.1e}{more if self.outliers else ''}, "
            f"scores within {self.scores:.1e}, {self.pixels:.1e} of mask pixels differ "
            f"(mean IoU {self.mean_iou:.6f})"
        )


def drawn_photos() -> list[np.ndarray]:
    """Draw two scenes, a wide and a high one, which are resized to different padded sizes."""
    wide, high = (shapes.draw_image(0, index, PHOTO_SIZE)[0] for index in (1, 2))
    turned = [wide if wide.shape[0] < wide.shape[1] else wide.swapaxes(0, 1)]
    turned.append(high if high.shape[0] > high.shape[1] else high.swapaxes(0, 1))
    return [np.ascontiguousarray(photo) for photo in turned]


def photos_of_two_sizes(exported: BasePredictor, photos: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The photos, with drawn ones where they would all be padded to one size."""
    sizes = {exported.padded_size(exported.prepare_whole(photo)) for photo in photos}
    return [*photos, *drawn_photos()] if len(sizes) < 2 else list(photos)


class _Found(NamedTuple):
    """What one of the two finds in a photo.

    Attributes:
      probs: float32 [N, h, w], masks on their grid.
      scores: of the kept pairs (query, label), as selected and as they end up at the photo's size.
      masks: of the queries of these pairs, run lengths.
    """

    probs: np.ndarray
    scores: dict[tuple[int, int], tuple[float, float]]
    masks: dict[int, Any]


class _Counts(NamedTuple):
    """What comes of one photo; the counts of several are added, and the largest gaps kept."""

    candidates: int
    different: int
    masks: int
    outliers: int
    pixels: int
    different_pixels: int
    mask_gap: float
    score_gap: float
    ious: list[float]


def compare(
    model: BasePredictor,
    exported: BasePredictor,
    photos: Sequence[np.ndarray],
    progress: TextIO | None = None,
    roundings: int = ROUNDINGS,
) -> Agreement:
    """Compare an exported file with the model.

    Args:
      model: the package's.
      exported: the file's.
      photos: uint8 [h, w, 3].
      progress: where to show how far it is.
      roundings: ways to round the model's weights that are tried where the file does not agree.
    """
    start = time.monotonic()
    sizes, counts, ties = [], [], 0
    for photo in with_progress(photos, len(photos), progress, "compared"):
        item = exported.prepare_whole(photo)
        size = exported.padded_size(item)
        ours, theirs = (_find(each, item, size) for each in (model, exported))
        found = _counted(model.cut, photo, ours, _aligned(ours, theirs))
        if _is_fault(found, size, model.cut):
            for seed in range(roundings):
                with model.rounded_otherwise(seed):
                    ours = _find(model, item, size)
                other = _counted(model.cut, photo, ours, _aligned(ours, theirs))
                if not _is_fault(other, size, model.cut):
                    found, ties = other, ties + 1
                    break
        sizes.append(list(size))
        counts.append(found)
    seconds = round(time.monotonic() - start, 1)
    return _agreement(sizes, counts, model.cut)._replace(ties=ties, seconds=seconds)


def _is_fault(found: _Counts, size: Size, cut: MaskCut) -> bool:
    return bool(_agreement([list(size)], [found], cut).faults())


def _agreement(sizes: list[list[int]], counts: list[_Counts], cut: MaskCut) -> Agreement:
    def total(name: str) -> int:
        return sum(getattr(one, name) for one in counts)

    return Agreement(
        photos=len(counts),
        sizes=sizes,
        candidates=total("candidates"),
        labels_or_kept=total("different"),
        mask_probs=max([one.mask_gap for one in counts], default=0.0),
        outliers=total("outliers") / max(total("masks"), 1),
        scores=max([one.score_gap for one in counts], default=0.0),
        pixels=total("different_pixels") / max(total("pixels"), 1),
        is_behind_cuts=cut.measures,
        mean_iou=float(np.mean([1.0, *(iou for one in counts for iou in one.ious)])),
        ties=0,
        seconds=0.0,
    )


def _counted(cut: MaskCut, photo: np.ndarray, ours: _Found, theirs: _Found) -> _Counts:
    gaps = np.abs(ours.probs - theirs.probs).max((1, 2), initial=0.0)
    pixels, different, score_gap, ious = 0, 0, 0.0, []
    explained: dict[int, float] = {}  # of the difference of scores, for each query
    for query in ours.masks.keys() & theirs.masks.keys():
        rles = [ours.masks[query], theirs.masks[query]]
        a, b = run_lengths.decode_masks(rles, photo.shape[:2])
        flipped = int((a != b).sum())
        pixels, different = pixels + a.size, different + flipped
        ious.append(1 - flipped / max(int((a | b).sum()), 1))
        explained[query] = flipped / max(int(a.sum()), 1)
    if not cut.measures:  # scores are measured on the grid
        explained = dict(enumerate(_flipped_cells(ours.probs, theirs.probs, cut.threshold)))
    for pair in ours.scores.keys() & theirs.scores.keys():
        gap = float(np.abs(np.subtract(ours.scores[pair], theirs.scores[pair])).max())
        score_gap = max(score_gap, gap - explained[pair[0]])
    return _Counts(
        candidates=len(ours.scores),
        different=_different(ours, theirs, cut.measures),
        masks=len(gaps),
        outliers=int((gaps > ROUNDING.mask_probs).sum()),
        pixels=pixels,
        different_pixels=different,
        mask_gap=float(gaps.max(initial=0.0)),
        score_gap=score_gap,
        ious=ious,
    )


def _flipped_cells(ours: np.ndarray, theirs: np.ndarray, cut: float) -> list[float]:
    """The share of each mask's cells that lie at the cut, and on its other side in the other."""
    gap = np.minimum(np.abs(ours - cut), np.abs(theirs - cut))
    moved = ((ours > cut) != (theirs > cut)) & (gap <= AT_THE_CUT)
    return (moved.sum((1, 2)) / np.maximum((ours > cut).sum((1, 2)), 1)).tolist()


def _find(predictor: BasePredictor, item: Prepared, size: Size) -> _Found:
    selection = predictor.select([item], size)
    fetched = predictor.fetch(selection)
    probs = np.asarray(fetched.masks)[0]
    if predictor.cut.are_logits:
        probs = 1 / (1 + np.exp(-probs))
    (found,) = predictor.finish([Pending([0], [item], selection)])
    assert found.query_index is not None  # it is no part
    rles, at_photo_size = found.encode()
    queries, labels = found.query_index.tolist(), found.labels.tolist()
    (kept,) = np.nonzero(fetched.is_kept[0])
    all_pairs = zip(fetched.query_index[0, kept], fetched.labels[0, kept], strict=True)
    selected = dict(zip(all_pairs, fetched.scores[0, kept].tolist(), strict=True))
    pairs = list(zip(queries, labels, strict=True))
    ends = [(selected[pair], float(end)) for pair, end in zip(pairs, at_photo_size, strict=True)]
    scores = dict(zip(pairs, ends, strict=True))
    return _Found(probs, scores, dict(zip(queries, rles, strict=True)))


def _aligned(ours: _Found, theirs: _Found) -> _Found:
    """Bring queries into our order, where a family sorts them and rounding changed it."""
    if np.abs(ours.probs - theirs.probs).max(initial=0.0) <= ROUNDING.mask_probs:
        return theirs
    from scipy.optimize import linear_sum_assignment  # slow to import

    flat = [found.probs.reshape(len(found.probs), -1)[:, ::7] for found in (ours, theirs)]
    cost = np.stack([np.abs(flat[1] - row).mean(1) for row in flat[0]])
    _, order = linear_sum_assignment(cost)
    place = np.argsort(order).tolist()  # of each of their queries among ours
    return _Found(
        theirs.probs[order],
        {(place[query], label): score for (query, label), score in theirs.scores.items()},
        {place[query]: rle for query, rle in theirs.masks.items()},
    )


def _different(ours: _Found, theirs: _Found, is_sorted: bool) -> int:
    """Count pairs that only one has; of a sorted list, those that tie for its end are no fault."""
    only = [a.scores.keys() - b.scores.keys() for a, b in ((ours, theirs), (theirs, ours))]
    if is_sorted and ours.scores and len(ours.scores) == len(theirs.scores):
        last = min(selected for selected, _ in ours.scores.values())
        only = [
            {pair for pair in pairs if abs(found.scores[pair][0] - last) > ROUNDING.scores}
            for pairs, found in zip(only, (ours, theirs), strict=True)
        ]
    return max(map(len, only))
