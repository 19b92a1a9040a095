"""Compare detections with annotations object by object: found, confused, false and missed.

What AP averages over all scores is counted here at one score threshold, so that single objects can
be shown. In each image, the detections that score at least the threshold go in falling score, and
masks belong together from an IoU of 0.5:

1. Within each class as COCO does: a detection takes, of the objects of its class that are still
   free, the one with the highest IoU. This is a *true positive*, the same that COCO counts at IoU
   0.5. A detection left over that lies in a crowd region of its class by half of its area is
   dropped, as COCO does.
2. The detections left over, again in falling score, take the free object of any other class with
   the highest IoU. This is a *confusion*: the right place, the wrong class.
3. A detection still left over is a *false positive*, an object still free a *miss*.

COCO has no step 2: to it a confusion is one false positive and one miss, and as two errors it
counts here too.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from sparseinst_jax.data.classes import map_category_ids
from sparseinst_jax.data.coco import CocoDataset, ImageRecord, encode_segmentation

IOU_THRESHOLD = 0.5  # lowest IoU of masks that belong together
Pair = tuple[int, int]


@dataclass(frozen=True)
class ImageErrors:
    """What became of the detections and the objects of one image.

    Attributes:
        record: the image with its annotations.
        detections: those that score at least the threshold, in falling score; COCO results.
        labels: of the detections, 0...K-1.
        found: true positives, (place in `detections`, place in `record.targets`).
        confused: the right place and the wrong class, pairs as in `found`.
        false: places in `detections` of the false positives.
        missed: places in `record.targets` of the objects that nothing was found of.
    """

    record: ImageRecord
    detections: tuple[Mapping[str, Any], ...]
    labels: tuple[int, ...]
    found: tuple[Pair, ...]
    confused: tuple[Pair, ...]
    false: tuple[int, ...]
    missed: tuple[int, ...]

    @property
    def num_errors(self) -> int:
        """Misses and false positives; a confusion is one of each."""
        return len(self.false) + len(self.missed) + 2 * len(self.confused)


def find_errors(
    dataset: CocoDataset, results: Sequence[Mapping[str, Any]], score_threshold: float
) -> list[ImageErrors]:
    """Compare the detections of a data set with its annotations.

    Args:
        dataset: with annotations; images need not be there.
        results: COCO results, with the json's own category ids or, where classes were chosen or
            merged, with those of the classes; other categories are left out.
        score_threshold: lowest score that counts.

    Returns:
        One entry for each image, in the order of the data set.
    """
    label_of = {category_id: label for label, category_id in enumerate(dataset.category_ids)}
    of_image: dict[int, list[Mapping[str, Any]]] = collections.defaultdict(list)
    if dataset.classes is not None:
        results = map_category_ids(results, dataset.classes)
    for entry in results:
        if entry["score"] >= score_threshold and entry["category_id"] in label_of:
            of_image[entry["image_id"]].append(entry)
    found = []
    for record in dataset.records:
        # As in COCO, equal scores keep the order of the file.
        detections = sorted(of_image[record.image_id], key=lambda entry: -entry["score"])
        labels = [label_of[entry["category_id"]] for entry in detections]
        found.append(_compare(record, detections, labels))
    return found


def _compare(
    record: ImageRecord, detections: Sequence[Mapping[str, Any]], labels: Sequence[int]
) -> ImageErrors:
    objects, crowd = record.targets, [a for a in record.annotations if a.iscrowd]
    size = record.height, record.width
    found_masks = [encode_segmentation(entry["segmentation"], *size) for entry in detections]
    ious = _ious(found_masks, [encode_segmentation(a.segmentation, *size) for a in objects], 0)
    in_crowd = _ious(found_masks, [encode_segmentation(a.segmentation, *size) for a in crowd], 1)
    is_own = np.equal.outer(np.array(labels, int), np.array([a.label for a in objects], int))
    is_own_crowd = np.equal.outer(np.array(labels, int), np.array([a.label for a in crowd], int))
    free = np.ones(len(objects), bool)
    every = range(len(detections))
    found = _match(ious, is_own, every, free)
    taken = {place for place, _ in found}
    dropped = np.flatnonzero((is_own_crowd & (in_crowd >= IOU_THRESHOLD)).any(axis=1)).tolist()
    left = [place for place in every if place not in taken.union(dropped)]
    confused = _match(ious, ~is_own, left, free)
    taken = {place for place, _ in confused}
    return ImageErrors(
        record,
        tuple(detections),
        tuple(labels),
        tuple(found),
        tuple(confused),
        tuple(place for place in left if place not in taken),
        tuple(np.flatnonzero(free).tolist()),
    )


def _ious(first: Sequence[Any], second: Sequence[Any], iscrowd: int) -> np.ndarray:
    """IoU [first, second]; for a crowd region the intersection over the area of the first."""
    if not first or not second:
        return np.zeros((len(first), len(second)))
    return np.asarray(coco_mask.iou(list(first), list(second), [iscrowd] * len(second)))


def _match(
    ious: np.ndarray, is_allowed: np.ndarray, places: Sequence[int], free: np.ndarray
) -> list[Pair]:
    """Let detections choose objects one by one; what is taken leaves `free` (changed here)."""
    pairs = []
    for place in places:
        candidates = np.where(is_allowed[place] & free, ious[place], -1.0)
        if candidates.size and candidates.max() >= IOU_THRESHOLD:
            # Of equal IoUs the last, as in COCO.
            best = len(candidates) - 1 - int(candidates[::-1].argmax())
            free[best] = False
            pairs.append((place, best))
    return pairs


def confusion_matrix(errors: Sequence[ImageErrors], num_classes: int) -> np.ndarray:
    """Count annotated against predicted classes.

    Returns:
        int64 [K+1, K+1]; the row is the annotated class, the column the predicted one, the last of
        both the background: `[k, K]` counts the misses of class k, `[K, k]` its false positives,
        `[K, K]` is 0. Row k sums to the objects of class k, crowd regions aside.
    """
    counts = np.zeros((num_classes + 1, num_classes + 1), np.int64)
    for image in errors:
        targets = image.record.targets
        for place, target in image.found + image.confused:
            counts[targets[target].label, image.labels[place]] += 1
        for place in image.false:
            counts[num_classes, image.labels[place]] += 1
        for target in image.missed:
            counts[targets[target].label, num_classes] += 1
    return counts


def worst_images(errors: Sequence[ImageErrors], count: int) -> list[ImageErrors]:
    """Sort by falling number of errors and take the first `count`; images without errors never.

    Of equal numbers the image with fewer objects found comes first, then the order of the data set.
    """
    wrong = [image for image in errors if image.num_errors]
    return sorted(wrong, key=lambda image: (-image.num_errors, len(image.found)))[:count]
