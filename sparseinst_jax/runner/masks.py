"""Bring masks from their grid over the padded image to the size of the photo, with NumPy.

The way back of a mask has three steps: bilinear from the mask grid to the padded image, a crop
to the valid part, and a bilinear resize to the original size. Each is linear and works on rows and
columns separately, so the chain is one small operator for each axis: a few taps per output pixel,
composed here in float64. `inference.masks` applies the same operators on a device.

Source: the original's `SparseInst.inference_single` (two `interpolate` calls on probabilities,
`align_corners=False`, no antialias).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from sparseinst_jax.data.taps import bilinear_taps

# Two neighbouring rows of the padded image lean on at most three neighbouring rows of the mask.
NUM_TAPS = 3
MASKNESS_EPSILON = 1e-6
CHUNK = 16  # masks that are handed on together
BAND = 64  # columns that are made together


class AxisOperator(NamedTuple):
    """Weighted taps that make each output row (or column) from rows of the mask grid.

    Attributes:
        index: int32 [P, NUM_TAPS], rows of the mask grid.
        weight: float32 [P, NUM_TAPS], their weights; the rows past the original size are all zero.
    """

    index: np.ndarray
    weight: np.ndarray


def _bilinear_pairs(source_length: int, target_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return index and weight [target_length, 2] of the two source pixels, in float64."""
    lower, upper, fraction = bilinear_taps(source_length, target_length, np.float64)
    return np.stack([lower, upper], axis=1), np.stack([1.0 - fraction, fraction], axis=1)


@functools.lru_cache(maxsize=1024)
def upsampling_operator(
    mask_length: int, stride: int, valid_length: int, original_length: int, bucket_length: int
) -> AxisOperator:
    """Compose upsampling by the stride, crop and resize to the original size along one axis.

    Args:
        mask_length: rows of the mask grid.
        stride: rows of the padded image for each of them.
        valid_length: rows of the padded image that hold the resized image.
        original_length: rows of the original image.
        bucket_length: rows of the result, at least `original_length`; the rest is zero.

    Returns:
        The operator with `bucket_length` output rows.
    """
    outer_index, outer_weight = _bilinear_pairs(valid_length, original_length)
    inner_index, inner_weight = _bilinear_pairs(mask_length, mask_length * stride)
    # [original, 2 rows of the image, 2 rows of the mask]
    index = inner_index[outer_index]
    weight = outer_weight[:, :, None] * inner_weight[outer_index]
    start = np.minimum(index.min(axis=(1, 2)), max(mask_length - NUM_TAPS, 0))
    taps = np.zeros((bucket_length, NUM_TAPS))
    rows = np.broadcast_to(np.arange(original_length)[:, None, None], index.shape)
    np.add.at(taps, (rows, index - start[:, None, None]), weight)
    all_start = np.zeros(bucket_length, np.int64)
    all_start[:original_length] = start
    all_index = np.minimum(all_start[:, None] + np.arange(NUM_TAPS), mask_length - 1)
    return AxisOperator(all_index.astype(np.int32), taps.astype(np.float32))


class MaskCut(NamedTuple):
    """How masks become zeros and ones at the original size.

    Attributes:
        threshold: a pixel belongs to the mask where its probability is larger.
        stride: pixels of the padded image for one of the mask.
        are_logits: the masks are logits until they have the original size.
        measures: whether the mean probability inside each mask is asked for.
    """

    threshold: float
    stride: int
    are_logits: bool = False
    measures: bool = False


def upsample_masks(
    masks: np.ndarray,
    query_index: np.ndarray,
    valid_size: tuple[int, int],
    original_size: tuple[int, int],
    cut: MaskCut,
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Bring some masks of one image to its original size, a chunk at a time.

    Args:
        masks: float32 [N, H/S, W/S] probabilities or logits, at the stride S.
        query_index: int [D], which of the masks, in the order of the result.
        valid_size: (height, width) of the resized image inside the padded one.
        original_size: (height, width) of the original image.
        cut: how they become zeros and ones.

    Yields:
        uint8 [D', width, height] (transposed: the order of COCO's RLE), zeros and ones; and the
        mean probability inside each mask, sum(p [p > t]) / (sum [p > t] + 1e-6), float32 [D'], or
        None where it is not asked for.
    """
    keys = [
        (masks.shape[axis + 1], cut.stride, valid_size[axis], length, length)
        for axis, length in enumerate(original_size)
    ]
    rows, columns = (upsampling_operator(*key) for key in keys)
    for start in range(0, len(query_index), CHUNK):
        chosen = query_index[start : start + CHUNK]
        made = np.zeros((len(chosen), original_size[1], original_size[0]), np.uint8)
        scores = np.zeros(len(chosen), np.float32)
        for place, query in enumerate(chosen):
            scores[place] = _cut_one(masks[query], rows, columns, cut, made[place])
        yield made, scores if cut.measures else None


def _cut_one(
    mask: np.ndarray,
    rows: AxisOperator,
    columns: AxisOperator,
    cut: MaskCut,
    made: np.ndarray,
) -> float:
    """Fill uint8 [width, height] of one mask; returns the mean probability inside, if asked for.

    A pixel that leans on cells below the cut alone is below it too: only others are made.
    """
    reach = np.float32(cut.threshold)
    if cut.are_logits:
        with np.errstate(divide="ignore"):
            reach = np.log(reach) - np.log1p(-reach)
    above = np.asarray(mask > reach - _MARGIN)
    height, width = _touched(rows, above, 1), _touched(columns, above, 0)
    if height.stop == height.start:
        return 0.0
    x = np.ascontiguousarray(_apply(rows, height, mask).T)  # [w, height]
    total, count = np.float32(0), 0
    # Piece by piece, which stays in the cache of a core.
    for start in range(width.start, width.stop, BAND):
        piece = slice(start, min(start + BAND, width.stop))
        values = _apply(columns, piece, x)
        inside = values > reach
        made[piece, height] = inside
        if cut.measures:
            values = values[inside]
            total += np.sum(1 / (1 + np.exp(-values)) if cut.are_logits else values)
            count += len(values)
    return float(total / (np.float32(count) + np.float32(MASKNESS_EPSILON)))


_MARGIN = np.float32(1e-4)  # above what sums of rounded products can be off


def _touched(operator: AxisOperator, above: np.ndarray, across: int) -> slice:
    """The range of outputs that lean on a row (or column) with a cell above the cut."""
    (found,) = np.nonzero(np.any(np.any(above, axis=across)[operator.index], axis=1))
    return slice(int(found[0]), int(found[-1]) + 1) if len(found) else slice(0, 0)


def _apply(operator: AxisOperator, part: slice, x: np.ndarray) -> np.ndarray:
    """Apply a part of an operator to axis 0: [h, w] -> [P, w]."""
    index, weight = operator.index[part], operator.weight[part]
    y = np.empty((len(index), x.shape[1]), np.float32)
    term = np.empty_like(y)
    np.multiply(x.take(index[:, 0], 0, term, "clip"), weight[:, :1], y)
    for tap in range(1, NUM_TAPS):
        np.multiply(x.take(index[:, tap], 0, term, "clip"), weight[:, tap : tap + 1], term)
        y += term
    return y
