"""Masks as polygons that enclose the same pixels again."""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

# Pixels. A corner that lies nearer to the line between its neighbours changes no pixel.
EXACT = 0.3


def outlines(mask: np.ndarray, tolerance: float = EXACT) -> list[np.ndarray] | None:
    """Trace a mask: the corners [P, 2] as x, y in pixels of each of its parts.

    The lines run between the centres of pixels inside and outside. Coordinates are those of COCO:
    the upper left pixel reaches from 0 to 1.

    Args:
        mask: bool [h, w].
        tolerance: pixels that the outline may be off; with the default it encloses the same pixels.

    Returns:
        None where no polygons can say it: a part has a hole, or (with the default) other pixels
        would come back.
    """
    from contourpy import FillType, contour_generator  # Matplotlib's

    height, width = mask.shape
    padded = np.pad(mask, 1).astype(np.float32)  # so that outlines close at the image's border
    traced = contour_generator(z=padded, fill_type=FillType.OuterOffset, corner_mask=False)
    found: Any = traced.filled(0.5, 2.0)
    parts, offsets = found
    if any(len(of_part) > 2 for of_part in offsets):
        return None
    polygons = [_simplified(part, tolerance)[:-1] - 0.5 for part in parts]
    polygons = [polygon for polygon in polygons if len(polygon) > 2]
    if tolerance > EXACT:
        return polygons or None
    flat = [polygon.ravel().tolist() for polygon in polygons]
    again = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(flat, height, width)))
    return polygons if np.array_equal(again, mask) else None


def _simplified(corners: np.ndarray, tolerance: float) -> np.ndarray:
    """Leave out corners of a closed line that are off by no more than the tolerance.

    Source: Douglas and Peucker, 1973.
    """
    last = len(corners) - 1
    far = int(np.argmax(np.hypot(*(corners - corners[0]).T)))
    is_kept = np.zeros(len(corners), bool)
    is_kept[[0, far, last]] = True
    open_parts = [(0, far), (far, last)]
    while open_parts:
        start, end = open_parts.pop()
        if end - start < 2:
            continue
        line, between = corners[end] - corners[start], corners[start + 1 : end] - corners[start]
        off = np.abs(between[:, 0] * line[1] - between[:, 1] * line[0]) / np.hypot(*line)
        worst = start + 1 + int(np.argmax(off))
        if off.max() > tolerance:
            is_kept[worst] = True
            open_parts += [(start, worst), (worst, end)]
    return corners[is_kept]
