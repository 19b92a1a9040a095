"""A photo in overlapping parts, each looked at as if it were the photo: for small objects.

With a zoom of 2 a part is half as wide and half as high as the photo, so that the network sees its
objects twice as large. An object no wider than `OVERLAP` of a part is whole in at least one; what
several parts find of it is found once in the end. Exists for a network trained on parts that are
as large (`data.augmentation="lsj"`); see docs/own_data.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from sparseinst_jax.runner import run_lengths

OVERLAP = 0.25  # of a part with the next, at least
SAME = 0.5  # of the smaller of two masks of one class: above it they are of one object

Size = tuple[int, int]


class Part(NamedTuple):
    """Where a part lies.

    Attributes:
        corner: (y, x) of its first pixel in the photo.
        size: (height, width).
        photo_size: (height, width).
        number: of parts of this photo.
    """

    corner: Size
    size: Size
    photo_size: Size
    number: int


def parts_of(photo_size: Size, zoom: float) -> list[Part]:
    """Cut a photo of (height, width) into equal parts, row by row."""
    size = math.ceil(photo_size[0] / zoom), math.ceil(photo_size[1] / zoom)
    rows, columns = map(_starts, photo_size, size)
    number = len(rows) * len(columns)
    return [Part((y, x), size, photo_size, number) for y in rows for x in columns]


def _starts(length: int, part: int) -> list[int]:
    steps = math.ceil((length - part) / (part * (1 - OVERLAP)))
    return [round(step * (length - part) / max(steps, 1)) for step in range(steps + 1)]


class Joined(NamedTuple):
    """What is found in a photo by its parts: of the form of `predictor.FoundInstances`.

    Attributes:
        labels: int32 [D] in 0...K-1.
        rles: D compressed RLEs of the photo's size.
        scores: float32 [D].
        original_size: (height, width) of the photo.
        query_index: None: queries of different parts are not the same.
    """

    labels: np.ndarray
    rles: list[dict[str, Any]]
    scores: np.ndarray
    original_size: Size
    query_index: None = None

    def encode(self) -> tuple[list[dict[str, Any]], np.ndarray]:
        """The RLEs and the scores."""
        return self.rles, self.scores

    @property
    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The masks uint8 [1, width, height] and the scores [1], one by one."""
        for rle, score in zip(self.rles, self.scores, strict=True):
            mask = run_lengths.decode_masks([rle], self.original_size)
            yield mask.transpose(0, 2, 1).astype(np.uint8), np.array([score], np.float32)


def join(found: Sequence[tuple[Part, Any]]) -> Joined:
    """Join what is found in the parts of a photo (`predictor.FoundInstances` each).

    Of masks of one class that share more than `SAME` of the smaller one, the surest stays. One that
    ends at the border of its part stays only where there is no whole one, and not at all where the
    next part sees all of it, too.
    """
    rles, scores, labels, are_cut = [], [], [], []
    for (corner, size, photo_size, _), instances in found:
        (y, x), (height, width) = corner, size
        place = np.zeros((width, photo_size[0]), np.uint8)  # the photo's columns of the part
        each_label = iter(instances.labels.tolist())
        for masks, its_scores in instances.chunks:
            for mask, score in zip(masks, its_scores.tolist(), strict=True):
                label = next(each_label)
                columns, rows = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
                if not len(columns):
                    continue
                is_cut, is_seen_beyond = np.logical_or(
                    _ends(columns, width, x > 0, x + width < photo_size[1]),
                    _ends(rows, height, y > 0, y + height < photo_size[0]),
                )
                if is_seen_beyond:
                    continue
                place[:, y : y + height] = mask
                rles.append(run_lengths.encode_columns(place, x, photo_size))
                scores.append(score)
                labels.append(label)
                are_cut.append(is_cut)
    order = np.lexsort((-np.array(scores), are_cut))
    kept = sorted(_unlike(order, rles, np.array(labels)))
    return Joined(
        np.array([labels[i] for i in kept], np.int32),
        [rles[i] for i in kept],
        np.array([scores[i] for i in kept], np.float32),
        found[0][0].photo_size,
    )


def _ends(places: np.ndarray, side: int, is_before: bool, is_behind: bool) -> tuple[bool, bool]:
    """Whether an object ends at a border with other parts beyond, and whether these see all of it.

    Args:
        places: the rows or columns of its part that it has pixels in.
        side: number of rows or columns of the part.
        is_before: other parts begin before this one.
        is_behind: other parts go on behind it.
    """
    first, last, strip = places[0], places[-1], OVERLAP * side
    is_before, is_behind = is_before and first == 0, is_behind and last == side - 1
    is_seen = (is_before and last < strip) or (is_behind and first >= side - strip)
    return is_before or is_behind, is_seen


def _unlike(order: np.ndarray, rles: Sequence[Any], labels: np.ndarray) -> list[int]:
    """Go through masks in an order and keep what is not an earlier one of its class."""
    kept: list[int] = []
    for label in np.unique(labels):
        mine = [int(i) for i in order if labels[i] == label]
        chosen = [rles[i] for i in mine]
        shares = coco_mask.iou(chosen, chosen, [1] * len(chosen))  # of the row's mask
        shares, stays = np.maximum(shares, shares.T), []
        for row in range(len(mine)):
            if not (shares[row, stays] > SAME).any():
                stays.append(row)
        kept += [mine[row] for row in stays]
    return kept
