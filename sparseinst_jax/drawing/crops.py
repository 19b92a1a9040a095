"""The part of a mask that is not empty: all that drawing looks at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from sparseinst_jax.data.segmentations import read_runs


class Crop(NamedTuple):
    """A mask without the empty rows and columns around it.

    Attributes:
        top: its first row in the image.
        left: its first column.
        pixels: bool [h, w]; [0, 0] of an empty mask.
    """

    top: int
    left: int
    pixels: np.ndarray


_EMPTY = Crop(0, 0, np.zeros((0, 0), bool))


def crop(mask: np.ndarray) -> Crop:
    """Cut a mask, bool [h, w], to its pixels."""
    rows = np.flatnonzero(mask.any(axis=1))
    if not rows.size:
        return _EMPTY
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    columns = np.flatnonzero(mask[top:bottom].any(axis=0))
    left, right = int(columns[0]), int(columns[-1]) + 1
    return Crop(top, left, mask[top:bottom, left:right])


def decode_crop(rle: Mapping[str, Any]) -> Crop:
    """Decode the pixels of a valid compressed RLE, and no more: masks are small parts of photos."""
    height, runs = rle["size"][0], read_runs(rle["counts"])
    assert runs is not None
    ends = runs.cumsum()  # those of the mask's pixels are every second
    inside = np.flatnonzero(runs[1::2])
    if not inside.size:
        return _EMPTY
    first, last = ends[2 * inside[0]], ends[2 * inside[-1] + 1]
    left, right = int(first // height), int(-(-last // height))
    ends = np.clip(ends - left * height, 0, (right - left) * height)
    is_inside = np.arange(len(ends)) % 2 == 1
    columns = np.repeat(is_inside, np.diff(ends, prepend=0)).reshape(right - left, height)
    found = crop(columns.T)
    return found._replace(left=left, pixels=np.ascontiguousarray(found.pixels))
