"""Masks as run lengths, COCO's format: packed, unpacked, measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from sparseinst_jax.data.segmentations import decode_columns

# Changes along a mask from which on pycocotools' own loop over all pixels is faster: noise.
_MOST_CHANGES = 3500


def encode_transposed(masks: np.ndarray) -> list[dict[str, Any]]:
    """Encode uint8 [D, width, height] as D compressed RLEs with `counts` as text (for json)."""
    size = [masks.shape[2], masks.shape[1]]
    return [{"size": list(size), "counts": _encode(mask)} for mask in masks]


def encode_columns(columns: np.ndarray, first: int, size: tuple[int, int]) -> dict[str, Any]:
    """Encode a mask that lies within some columns of it.

    Args:
        columns: uint8 [number of columns, height], zeros and ones.
        first: the column that they begin with.
        size: (height, width) of the whole mask.
    """
    return {"size": list(size), "counts": _encode(columns, first * size[0], size)}


def _encode(mask: np.ndarray, before: int = 0, size: tuple[int, int] | None = None) -> str:
    """Encode uint8 [width, height], zeros and ones; looks for changes where there are ones.

    It may be a piece of a mask of `size` (height, width), with `before` pixels before it.
    """
    whole, raw = size or mask.shape[::-1], mask.tobytes()
    flat, total = np.frombuffer(raw, np.uint8), whole[0] * whole[1]
    first, end = raw.find(1), raw.rfind(1) + 1
    part = flat[first:end]
    is_changed = part[1:] != part[:-1]
    if size is None and np.count_nonzero(is_changed) > _MOST_CHANGES:
        rle: Any = coco_mask.encode(flat.reshape(mask.shape).T)
    else:
        ends = np.array([-before, total - before])
        if end:
            changes = np.flatnonzero(is_changed) + (first + 1)
            ends = np.concatenate([ends[:1], [first], changes, [end], ends[1:]])
        counts = np.diff(ends)
        counts = counts[: len(counts) - (counts[-1] == 0)]  # no run of zeros after the last pixel
        rle = coco_mask.frPyObjects({"size": whole, "counts": counts}, *whole)
    return rle["counts"].decode("ascii")


def encode_masks(masks: np.ndarray) -> list[dict[str, Any]]:
    """Encode masks [D, height, width] (bool or 0/1) as compressed RLEs, COCO's format."""
    return encode_transposed(np.ascontiguousarray(np.asarray(masks).transpose(0, 2, 1), np.uint8))


def decode_masks(rles: Sequence[Any], size: tuple[int, int]) -> np.ndarray:
    """Decode compressed RLEs to bool [D, height, width]; `size` is needed when there are none."""
    masks = np.zeros((len(rles), *size), bool)
    for mask, rle in zip(masks, rles, strict=True):
        if len(rle["counts"]) > 2 * _MOST_CHANGES:  # about two characters each
            mask[...] = coco_mask.decode(rle)
        else:  # of an object's columns alone: two to five times as fast
            left, columns = decode_columns(rle)
            mask[:, left : left + len(columns)] = columns.T
    return masks


def _own(rles: Sequence[Any]) -> Any:
    """Make the list that pycocotools asks for; its type stubs know single RLEs only."""
    return list(rles)


def areas_of(rles: Sequence[Any]) -> np.ndarray:
    """Count the pixels of each RLE: int [D]."""
    # One by one: with NumPy 2 pycocotools fails on lists of more than 255.
    return np.array([coco_mask.area(rle) for rle in rles], np.int64)


def boxes_of(rles: Sequence[Any]) -> np.ndarray:
    """Enclose each RLE in a box: float32 [D, 4] as x0, y0, x1, y1 in pixels, ends exclusive.

    An empty mask has the box 0, 0, 0, 0.
    """
    if not rles:
        return np.zeros((0, 4), np.float32)
    boxes = coco_mask.toBbox(_own(rles)).astype(np.float32)
    boxes[:, 2:] += boxes[:, :2]
    return boxes
