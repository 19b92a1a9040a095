"""COCO's matching and accumulation as array operations over a whole data set.

The numbers are those of pycocotools' `COCOeval` (iouType "segm"), bit for bit: the IoUs come from
its C code, and what is done with them is the same arithmetic in the same order. What is left out is
work that cannot change a number: an IoU is computed once for all sizes and thresholds, pairs of an
image and a class without both objects and detections are not visited, and a detection whose IoUs
all lie below the lowest threshold is not matched.

Source: pycocotools 2.0.11, `COCOeval.computeIoU`, `evaluateImg` and `accumulate`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # T
RECALLS = np.linspace(0.0, 1.0, 101)  # R
# Smallest and largest area in px², both inclusive: all, small, medium, large.
SIZES = np.array([(0, 1e5**2), (0, 32**2), (32**2, 96**2), (96**2, 1e5**2)], np.float64)  # S
# The surest detections of an image and class that count; the last holds for precision.
MOST_DETECTIONS = (1, 10, 100)
# Value of what is not defined: the annotations hold no object of the kind.
UNDEFINED = -1.0
# Cells of one step of the matching [pairs, S, T, G]: bounds the memory, and stays in the cache.
MAX_CELLS = 1 << 20


class Columns(NamedTuple):
    """Masks of a data set, in the order of its json or of the results.

    Attributes:
        images: int64 [N], place of the image among the sorted ids.
        classes: int64 [N], place of the class among the sorted ids.
        rles: N compressed run lengths.
        areas: float64 [N], px².
        values: of annotations int64 [N], whether it is a crowd region; of detections the score.
    """

    images: np.ndarray
    classes: np.ndarray
    rles: list[Any]
    areas: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.rles)

    def take(self, order: np.ndarray) -> Columns:
        """Some of the masks, in this order."""
        rles = [self.rles[place] for place in order.tolist()]
        images, classes, areas, values = (
            column[order] for column in (self.images, self.classes, self.areas, self.values)
        )
        return Columns(images, classes, rles, areas, values)


class Curves(NamedTuple):
    """What the twelve numbers are means of; `UNDEFINED` where there is no such object.

    Attributes:
        precision: [T, R, K, S] at most 100 detections an image and class.
        recall: [T, K, S, 3] for each of `MOST_DETECTIONS`.
    """

    precision: np.ndarray
    recall: np.ndarray


class _Pair(NamedTuple):
    """An image and a class that have objects and detections that overlap them.

    Attributes:
        detections: int64 [D], places of those with an IoU that counts, in falling score.
        objects: slice of the annotations.
        ious: float64 [D, G].
    """

    detections: np.ndarray
    objects: slice
    ious: np.ndarray


def curves(truth: Columns, found: Columns, num_classes: int) -> Curves:
    """Match detections with annotations and accumulate precision over recall.

    Args:
        truth: annotations, of all K classes.
        found: detections of the same images and classes.
        num_classes: K.
    """
    truth = truth.take(np.lexsort((truth.images, truth.classes)))
    # Both sorts are stable: equal scores keep the order of the results, as in COCO.
    found = found.take(np.lexsort((-found.values, found.images, found.classes)))
    rank = _places_in_runs(_pair_keys(truth, found)[1])
    kept = np.flatnonzero(rank < MOST_DETECTIONS[-1])
    found, rank = found.take(kept), rank[kept]
    is_ignored = (truth.values != 0)[:, None] | _is_outside(truth.areas)  # [objects, S]
    is_match, is_match_ignored = _match(truth, found, is_ignored)
    # A detection of another size that matches nothing is no false positive.
    does_count = ~(is_match_ignored | (~is_match & _is_outside(found.areas)[:, :, None]))
    every = np.arange(num_classes)
    ends = [np.searchsorted(columns.classes, every, "right") for columns in (truth, found)]
    starts = [np.searchsorted(columns.classes, every, "left") for columns in (truth, found)]
    precision = np.full((len(IOU_THRESHOLDS), len(RECALLS), num_classes, len(SIZES)), UNDEFINED)
    recall = np.full(
        (len(IOU_THRESHOLDS), num_classes, len(SIZES), len(MOST_DETECTIONS)), UNDEFINED
    )
    for label in range(num_classes):
        objects, detections = (slice(a[label], b[label]) for a, b in zip(starts, ends, strict=True))
        num_objects = np.count_nonzero(~is_ignored[objects], axis=0)
        order = detections.start + np.argsort(-found.values[detections], kind="stable")
        for size in np.flatnonzero(num_objects):
            precision[:, :, label, size], recall[:, label, size] = _accumulate(
                is_match[order, size].T,
                does_count[order, size].T,
                rank[order],
                int(num_objects[size]),
            )
    return Curves(precision, recall)


def _pair_keys(truth: Columns, found: Columns) -> list[np.ndarray]:
    """A number for each image and class, in the order in which both are sorted."""
    num_images = 1 + max(columns.images.max(initial=0) for columns in (truth, found))
    return [columns.classes * num_images + columns.images for columns in (truth, found)]


def _places_in_runs(keys: np.ndarray) -> np.ndarray:
    """Count 0, 1, 2, ... within each run of equal keys."""
    is_first = np.ones(len(keys), bool)
    is_first[1:] = keys[1:] != keys[:-1]
    every = np.arange(len(keys))
    return every - np.maximum.accumulate(np.where(is_first, every, 0))


def _is_outside(areas: np.ndarray) -> np.ndarray:
    """Which masks are not of each size: bool [N, S]."""
    return (areas[:, None] < SIZES[:, 0]) | (areas[:, None] > SIZES[:, 1])


def _match(truth: Columns, found: Columns, is_ignored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Let detections in falling score choose objects, separately for each size and threshold.

    A detection takes the free object with the highest IoU, the last of equal ones; an object that
    is ignored only where no other fits. Crowd regions stay free.

    Args:
        truth: sorted annotations.
        found: sorted detections.
        is_ignored: bool [objects, S].

    Returns:
        is_match: bool [detections, S, T].
        is_match_ignored: the same, matches with ignored objects.
    """
    shape = len(found), len(SIZES), len(IOU_THRESHOLDS)
    is_match, is_match_ignored = np.zeros(shape, bool), np.zeros(shape, bool)
    for pairs in _batches(_overlaps(truth, found)):
        _match_batch(pairs, truth.values != 0, is_ignored, is_match, is_match_ignored)
    return is_match, is_match_ignored


def _overlaps(truth: Columns, found: Columns) -> Iterator[_Pair]:
    """IoUs of every image and class with objects and detections, where one of them counts."""
    truth_keys, found_keys = _pair_keys(truth, found)
    shared = np.intersect1d(truth_keys, found_keys)
    sides = [
        np.searchsorted(keys, shared, side).tolist()
        for keys in (truth_keys, found_keys)
        for side in ("left", "right")
    ]
    is_crowd = truth.values.tolist()
    for first_object, end_object, first, end in zip(*sides, strict=True):
        objects = slice(first_object, end_object)
        ious: Any = coco_mask.iou(found.rles[first:end], truth.rles[objects], is_crowd[objects])
        does_overlap = np.flatnonzero((ious >= IOU_THRESHOLDS[0]).any(axis=1))
        if len(does_overlap):
            yield _Pair(first + does_overlap, objects, ious[does_overlap])


def _batches(pairs: Iterator[_Pair]) -> Iterator[list[_Pair]]:
    """Put pairs together whose numbers of objects round up to the same power of two."""
    widths: dict[int, list[_Pair]] = {}
    for pair in pairs:
        widths.setdefault((pair.ious.shape[1] - 1).bit_length(), []).append(pair)
    for bits, members in widths.items():
        # Those with many detections first: the others end before them.
        members.sort(key=lambda pair: -len(pair.detections))
        most = max(1, MAX_CELLS // (len(SIZES) * len(IOU_THRESHOLDS) << bits))
        for first in range(0, len(members), most):
            yield members[first : first + most]


def _match_batch(
    pairs: list[_Pair],
    is_crowd: np.ndarray,
    is_ignored: np.ndarray,
    is_match: np.ndarray,
    is_match_ignored: np.ndarray,
) -> None:
    """Match pairs side by side, the detections of each one by one; fills in the last two."""
    width = max(pair.ious.shape[1] for pair in pairs)
    lengths = np.array([len(pair.detections) for pair in pairs])
    ious = np.full((len(pairs), lengths[0], width), UNDEFINED)
    places = np.zeros((len(pairs), lengths[0]), np.int64)
    crowd, ignored = np.zeros((len(pairs), width), bool), np.zeros((len(pairs), 4, width), bool)
    for row, pair in enumerate(pairs):
        length, number = pair.ious.shape
        ious[row, :length, :number] = pair.ious
        places[row, :length] = pair.detections
        crowd[row, :number] = is_crowd[pair.objects]
        ignored[row, :, :number] = is_ignored[pair.objects].T
    # The place of each IoU among those of its detection; of equal ones the last is the highest.
    order = np.argsort(ious, axis=2, kind="stable")
    preference = np.argsort(order, axis=2).astype(np.int32)
    bonus = np.where(ignored, 1, 1 + width).astype(np.int32)  # [P, S, G]
    taken = np.zeros((len(pairs), len(SIZES), len(IOU_THRESHOLDS), width), bool)
    for turn in range(lengths[0]):
        number = int(np.count_nonzero(lengths > turn))
        fits = ious[:number, turn, None, :] >= IOU_THRESHOLDS[:, None]  # [P, T, G]
        is_free = ~taken[:number] | crowd[:number, None, None]  # [P, S, T, G]
        rating = preference[:number, turn, None, :] + bonus[:number]  # [P, S, G]
        rating = np.where(fits[:, None] & is_free, rating[:, :, None], 0)
        best = rating.argmax(axis=3)[..., None]
        has_match = np.take_along_axis(rating, best, 3) > 0
        now_taken = np.take_along_axis(taken[:number], best, 3) | has_match
        np.put_along_axis(taken[:number], best, now_taken, 3)
        is_match[places[:number, turn]] = has_match[..., 0]
        on_ignored = np.take_along_axis(ignored[:number, :, None], best, 3) & has_match
        is_match_ignored[places[:number, turn]] = on_ignored[..., 0]


def _accumulate(
    is_match: np.ndarray, does_count: np.ndarray, rank: np.ndarray, num_objects: int
) -> tuple[np.ndarray, np.ndarray]:
    """Precision over recall of one class and size.

    Args:
        is_match: bool [T, N], detections of all images in falling score.
        does_count: bool [T, N].
        rank: int64 [N], place of each within its image.
        num_objects: at least 1.

    Returns:
        precision [T, R], recall [T, 3].
    """
    is_right = is_match & does_count
    right = np.cumsum(is_right, axis=1).astype(np.float64)
    wrong = np.cumsum(~is_match & does_count, axis=1).astype(np.float64)
    recall = right / num_objects
    precision = right / (wrong + right + np.spacing(1))
    # What is reached at a higher recall counts at lower ones too.
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    padded = np.concatenate([precision, np.zeros((len(precision), 1))], axis=1)
    at_recalls = [
        values[np.searchsorted(reached, RECALLS, "left")]
        for values, reached in zip(padded, recall, strict=True)
    ]
    recalls = [
        np.count_nonzero(is_right[:, rank < most], axis=1) / num_objects for most in MOST_DETECTIONS
    ]
    return np.array(at_recalls), np.stack(recalls, axis=1)
