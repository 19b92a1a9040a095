"""Masks as run lengths, COCO's format: packed, unpacked, measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask


def encode_transposed(masks: np.ndarray) -> list[dict[str, Any]]:
    """Encode uint8 [D, width, height] as D compressed RLEs with `counts` as text (for json)."""
    rles: Any = coco_mask.encode(masks.transpose(2, 1, 0))
    return [
        {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}
        for rle in rles
    ]


def encode_masks(masks: np.ndarray) -> list[dict[str, Any]]:
    """Encode masks [D, height, width] (bool or 0/1) as compressed RLEs, COCO's format."""
    return encode_transposed(np.ascontiguousarray(np.asarray(masks).transpose(0, 2, 1), np.uint8))


def decode_masks(rles: Sequence[Any], size: tuple[int, int]) -> np.ndarray:
    """Decode compressed RLEs to bool [D, height, width]; `size` is needed when there are none."""
    if not rles:
        return np.zeros((0, *size), bool)
    masks = coco_mask.decode(_own(rles))  # [height, width, D]
    return np.ascontiguousarray(masks.transpose(2, 0, 1)).astype(bool)


class LazyMasks(Sequence[np.ndarray]):
    """Masks that are decoded one at a time, each time they are asked for.

    A hundred masks of a photograph of 12 million pixels take 1.2 GB, one of them 12 MB.

    Args:
        segmentations: what stands for each mask.
        decode: makes a mask, bool [height, width], of one.
    """

    def __init__(self, segmentations: Sequence[Any], decode: Callable[[Any], np.ndarray]):
        self._segmentations, self._decode = segmentations, decode

    def __len__(self) -> int:
        return len(self._segmentations)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return LazyMasks(self._segmentations[index], self._decode)
        return self._decode(self._segmentations[index])


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
