"""Which objects and images of a json are trained on: what each implementation leaves out.

detectron2 looks at masks after they were moved. PaddleDetection and mmdetection look at the json's
boxes before, so an object can be left out whose mask is fine. Crowd regions are no objects: they
pass.

Source: ppdet/data/source/coco.py (``parse_dataset``); mmdet/datasets/coco.py
(``parse_data_info``, ``filter_data``) and ``LoadAnnotations`` with ``poly2mask=False``, as its
SparseInst sets it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as rle

from sparseinst_jax.data.annotations.columns import LETTERS, POLYGONS, Columns
from sparseinst_jax.data.annotations.image_record import BoxXYXY
from sparseinst_jax.data.annotations.segmentations import refuse_broken_runs

SHORTEST_BOX_SIDE = 1e-5  # pixels; PaddleDetection


class Candidates(NamedTuple):
    """What is asked of n annotations.

    Attributes:
        boxes_xyxy: [n, 4] in pixels.
        has_area: [n], the json gives an area above 0, or none at all.
        is_polygons: [n], run lengths otherwise.
        is_ignored: [n], the json's key "ignore".
        image_sizes: [n, 2], (height, width) in pixels.
    """

    boxes_xyxy: np.ndarray
    has_area: np.ndarray
    is_polygons: np.ndarray
    is_ignored: np.ndarray
    image_sizes: np.ndarray


class AnnotationFilter(NamedTuple):
    """What one implementation learns from.

    Attributes:
        keeps: tells which objects are kept, bool [n]; None for all of them.
        smallest_side: images with a shorter side are left out, pixels.
    """

    keeps: Callable[[Candidates], np.ndarray] | None
    smallest_side: int


def candidates(columns: Columns) -> Candidates:
    """Gather what the filters ask for of the columns of an index, see ``annotations.columns``."""
    number = np.diff(columns["annotation_ends"])
    sizes = np.stack([columns["heights"], columns["widths"]], axis=1)
    areas = columns["areas"]
    return Candidates(
        _read_boxes(columns),
        np.isnan(areas) | (areas > 0),
        columns["kinds"] == POLYGONS,
        columns["is_ignored"] != 0,
        np.repeat(sizes, number, axis=0),
    )


def _read_boxes(columns: Columns) -> np.ndarray:
    """`read_box` of all annotations, [annotations, 4]."""
    boxes = columns["boxes"].reshape(-1, 4).copy()
    boxes[:, 2:] += boxes[:, :2]
    number = np.diff(columns["annotation_ends"])
    owners = np.repeat(np.arange(len(number)), number)
    for row in np.flatnonzero(np.isnan(boxes[:, 0])).tolist():
        boxes[row] = _box_of_mask(columns, row, int(owners[row]))
    return boxes


def read_box(columns: Columns, row: int, image: int) -> BoxXYXY:
    """Read the box of an annotation, (x0, y0, x1, y1) in pixels, from its mask if it has none.

    Args:
        columns: of an index, see ``annotations.columns``.
        row: place of the annotation.
        image: place of its image.
    """
    x, y, width, height = columns["boxes"][4 * row : 4 * row + 4].tolist()
    return (x, y, x + width, y + height) if x == x else _box_of_mask(columns, row, image)


def _box_of_mask(columns: Columns, row: int, image: int) -> BoxXYXY:
    first = int(columns["first_parts"][row])
    end = first + int(columns["num_parts"][row])
    if columns["kinds"][row] == POLYGONS:
        start, stop = columns["polygon_ends"][[first, end]].tolist()
        points = columns["coordinates"][start:stop].reshape(-1, 2)
        (x0, y0), (x1, y1) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
        return x0, y0, x1, y1
    size = [int(columns["heights"][image]), int(columns["widths"][image])]
    is_text = columns["kinds"][row] == LETTERS
    found = columns["letters" if is_text else "runs"][first:end]
    counts = found.tobytes() if is_text else found.tolist()
    refuse_broken_runs(size, counts, *size)  # of shards, nobody has looked at them before
    runs: Any = {"size": size, "counts": counts}
    if not is_text:
        runs = rle.frPyObjects(runs, *size)
    x, y, width, height = rle.toBbox(runs).tolist()
    return x, y, x + width, y + height


def _paddledetection_keeps(found: Candidates) -> np.ndarray:
    sides = found.boxes_xyxy[:, 2:] - found.boxes_xyxy[:, :2]
    return found.has_area & (sides.min(axis=1, initial=np.inf) > SHORTEST_BOX_SIDE)


def _mmdetection_keeps(found: Candidates) -> np.ndarray:
    top_left, bottom_right = found.boxes_xyxy[:, :2], found.boxes_xyxy[:, 2:]
    inside = np.minimum(bottom_right, found.image_sizes[:, ::-1]) - np.maximum(top_left, 0)
    return (
        ~found.is_ignored
        & found.is_polygons  # run lengths are passed over
        & (inside > 0).all(axis=1)
        & found.has_area
        & (bottom_right - top_left >= 1).all(axis=1)
    )


FILTERS = {
    "detectron2": AnnotationFilter(None, 0),
    "paddledetection": AnnotationFilter(_paddledetection_keeps, 0),
    "mmdetection": AnnotationFilter(_mmdetection_keeps, 32),
}


def find_filter(name: str) -> AnnotationFilter:
    """Find the filter of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in FILTERS:
        raise ValueError(
            f"config.data.annotation_filter must be one of {', '.join(FILTERS)}, got {name!r}"
        )
    return FILTERS[name]
