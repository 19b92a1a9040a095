"""The part of a mask that is not empty: all that drawing looks at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from sparseinst_jax.data.segmentations import decode_columns


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
    left, columns = decode_columns(rle)
    found = crop(columns.T)
    return found._replace(left=left, pixels=np.ascontiguousarray(found.pixels))
