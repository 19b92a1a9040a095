"""The rules of PaddleDetection's SparseInst: what it learns, how it resizes, how it was tested.

An object is left out by the json's box, area and `ignore`, whatever its mask. In training sizes
are rounded down; pixels are OpenCV's, without antialias; with crops, masks are made at the original
size and moved by nearest neighbour; a crop may be one pixel larger than the image and lies one
pixel further at most, where it loses its last row or column; objects are kept by their box,
whatever is left of their mask; a crop without any object is not made.

The published numbers were measured with another resize, without the images that have no object to
learn, and with two slips: the cut of masks is not rounded as the image is, and the last kept query
of each image is lost.

Source: PaddlePaddle/PaddleDetection, pull request 7357, ppdet/data/transform/operators.py
(``Resize``, ``RandomShortSideResize``, ``RandomSizeCrop``), ppdet/data/source/coco.py
(``parse_dataset``), the readers of configs/sparseinst, ``SparseInstDecoder.inference_single`` and
``get_seg_res`` (ppdet/metrics/json_results.py).
"""

import numpy as np
from PIL import Image

from sparseinst_jax.data._index.columns import Columns, has_area, read_boxes
from sparseinst_jax.data.ecosystems import opencv_resize
from sparseinst_jax.data.rules import AnnotationFilter, EvalProtocol, ResizeRule
from sparseinst_jax.data.transforms import (
    CROP_RESIZE_SIZES,
    PixelRule,
    Recipe,
    Size,
    Transform,
    boxes_in_crop,
    draw_window,
)

AUGMENTATIONS = ("flip_resize", "flip_resize_crop")
SHORTEST_BOX_SIDE = 1e-5  # pixels


def _keeps(columns: Columns) -> np.ndarray:
    boxes = read_boxes(columns)
    sides = boxes[:, 2:] - boxes[:, :2]
    has_box = ~np.isnan(columns["boxes"].reshape(-1, 4)).any(axis=1)
    return (
        (columns["is_ignored"] == 0)
        & has_box
        & has_area(columns)
        & (sides.min(axis=1, initial=np.inf) > SHORTEST_BOX_SIDE)
    )


def _resize_picture(picture: Image.Image, size: Size) -> Image.Image:
    return Image.fromarray(opencv_resize.resize_bilinear(np.asarray(picture), size))


PIXELS = PixelRule(_resize_picture, opencv_resize.nearest_indices, keeps_empty=True)


def resized_size(size: Size, shortest: int, longest: int | None = None) -> Size:
    """Size after a resize to ``shortest``, unless the longer side would pass ``longest``.

    The short side is whole first, the long one is rounded down from it; for images longer than
    twenty times their short side it may pass ``longest`` a little.
    """
    short, long = min(size), max(size)
    if longest is not None and long / short * shortest > longest:
        shortest = max(round(longest * short / long), 1)
    other = shortest * long // short
    return (shortest, other) if size[0] <= size[1] else (other, shortest)


def draw_transform(
    draws: np.ndarray, original_size: Size, recipe: Recipe, boxes_xyxy: np.ndarray | None = None
) -> Transform:
    """Draw the training transform of one image; arguments as of ``transforms.draw_transform``.

    Boxes are read with crops only.
    """
    flip = bool(draws[0] < 0.5)
    shortest = recipe.sizes[int(draws[1] * len(recipe.sizes))]
    has_crop = recipe.augmentation == "flip_resize_crop"
    if not has_crop or draws[2] < 0.5:
        size = resized_size(original_size, shortest, recipe.max_size)
        return Transform(flip, None, None, size, PIXELS, rasterizes_first=has_crop)
    first = resized_size(original_size, CROP_RESIZE_SIZES[int(draws[3] * 3)])
    y, x, height, width = draw_window(draws[4:], first, later=1)
    if (height, width) == first:
        y = x = 0
    # All that the window holds of the image: it may hang over by one row and one column.
    crop = y, x, min(height, first[0] - y), min(width, first[1] - x)
    size = resized_size(crop[2:], shortest, recipe.max_size)
    transform = Transform(flip, first, crop, size, PIXELS, rasterizes_first=True)
    boxes = np.zeros((0, 4)) if boxes_xyxy is None else boxes_xyxy
    if boxes_in_crop(boxes, original_size, transform).any():
        return transform
    size = resized_size(first, shortest, recipe.max_size)
    return transform._replace(crop=(0, 0, *first), size=size)


def _resize_for_test(image: np.ndarray, eval_size: Size) -> tuple[np.ndarray, Size]:
    """Resize by bicubic with a factor; the cut is not rounded as the image is, but down."""
    height, width = image.shape[:2]
    factor = min(eval_size[0] / min(height, width), eval_size[1] / max(height, width))
    # Stored as float32 there: 853 must not become 852 by a rounding error.
    mask_size = (
        max(int(np.float32(height * factor)), 1),
        max(int(np.float32(width * factor)), 1),
    )
    return opencv_resize.resize_bicubic_by_factor(image, factor), mask_size


FILTER = AnnotationFilter(_keeps)
RESIZE = ResizeRule(resized_size, draw_transform, AUGMENTATIONS, needs_boxes=True)
PROTOCOL = EvalProtocol(_resize_for_test, drops_last=True, keeps=_keeps)
