"""What mmdetection learns from a json: it filters by boxes, not by masks.

Source: mmdet/datasets/coco.py (``parse_data_info``, ``filter_data``) and ``LoadAnnotations`` with
``poly2mask=False``, as its SparseInst sets it.
"""

import numpy as np

from sparseinst_jax.data._index.columns import POLYGONS, Columns, has_area, read_boxes
from sparseinst_jax.data.rules import AnnotationFilter


def _keeps(columns: Columns) -> np.ndarray:
    boxes = read_boxes(columns)
    sizes = np.stack([columns["widths"], columns["heights"]], axis=1)
    sizes = np.repeat(sizes, np.diff(columns["annotation_ends"]), axis=0)
    top_left, bottom_right = boxes[:, :2], boxes[:, 2:]
    inside = np.minimum(bottom_right, sizes) - np.maximum(top_left, 0)
    return (
        (columns["is_ignored"] == 0)
        & (columns["kinds"] == POLYGONS)  # run lengths are passed over
        & (inside > 0).all(axis=1)
        & has_area(columns)
        & (bottom_right - top_left >= 1).all(axis=1)
    )


FILTER = AnnotationFilter(_keeps, smallest_side=32)
