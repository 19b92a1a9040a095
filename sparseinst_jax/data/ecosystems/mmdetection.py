"""What mmdetection learns from a json, and how it resizes: it filters by boxes, not by masks.

Source: mmdet/datasets/coco.py (``parse_data_info``, ``filter_data``) and ``LoadAnnotations`` with
``poly2mask=False``, as its SparseInst sets it; mmcv/image/geometric.py (``rescale_size``).
"""

import numpy as np

from sparseinst_jax.data._index.columns import POLYGONS, Columns, has_area, read_boxes
from sparseinst_jax.data.rules import AnnotationFilter, ResizeRule
from sparseinst_jax.data.transforms import ORIGINAL_PIXELS, Recipe, Size, Transform

# Pillow's pixels; what lies between them stays a target with an empty mask.
PIXELS = ORIGINAL_PIXELS._replace(keeps_empty=True)


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


def resized_size(size: Size, shortest: int, longest: int) -> Size:
    """Size after a resize by one factor to ``shortest``, unless the longer side passes ``longest``.

    Of images twice as long as wide some differ from the original's by a pixel.
    """
    factor = min(longest / max(size), shortest / min(size))
    return int(size[0] * factor + 0.5), int(size[1] * factor + 0.5)


def draw_transform(
    draws: np.ndarray, original_size: Size, recipe: Recipe, boxes_xyxy: np.ndarray | None = None
) -> Transform:
    """Draw flip and size of one image; see ``transforms.draw_transform``."""
    del boxes_xyxy
    shortest = recipe.sizes[int(draws[1] * len(recipe.sizes))]
    size = resized_size(original_size, shortest, recipe.max_size)
    return Transform(bool(draws[0] < 0.5), None, None, size, PIXELS)


FILTER = AnnotationFilter(_keeps, smallest_side=32, keeps_annotated=True)
RESIZE = ResizeRule(resized_size, draw_transform, ("flip_resize",), needs_boxes=False)
