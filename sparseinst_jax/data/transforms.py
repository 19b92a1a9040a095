"""Resize, flip and crop images and move their masks with them, exactly as the original does.

Polygons move as coordinates and are rasterised at the final size; run lengths are decoded at the
original size and move by nearest neighbour. The targets then travel in one of the forms of
``target_masks``.

Source: detectron2/data/transforms and detection_utils.py; ``ResizeScale``, ``FixedSizeCrop``.
sparseinst/dataset_mapper.py of the original. Large-scale jitter: Ghiasi et al., arXiv:2012.07177,
section 3.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as rle

from sparseinst_jax.data.segmentations import (
    Segmentation,
    encode_polygons,
    encode_segmentation,
    read_runs,
)
from sparseinst_jax.data.target_masks import InnerPixels, inner_pixels, levels_of_runs

Size = tuple[int, int]
PADDING_MULTIPLE = 32
AUGMENTATIONS = ("flip_resize", "flip_resize_crop", "lsj")
# The published crop recipe: shortest side of the first resize, and the range of the crop's sides.
CROP_RESIZE_SIZES = (400, 500, 600)
CROP_RANGE = (384, 600)
LSJ_RANGE = (0.1, 2.0)
NUM_DRAWS = 8  # uniform numbers that one transform is drawn from


def _resize(picture: Image.Image, size: Size) -> Image.Image:
    if (picture.height, picture.width) == tuple(size):
        return picture
    return picture.resize((size[1], size[0]), Image.Resampling.BILINEAR)


def nearest_indices(length: int, new_length: int) -> np.ndarray:
    """Source index of each pixel in Pillow's NEAREST resize of an axis, int64 [new_length]."""
    # Asked from Pillow itself: it accumulates the position in floating point, so a formula differs
    # where a position falls on a pixel border.
    axis = Image.fromarray(np.arange(length, dtype=np.int32)[None])
    return np.asarray(axis.resize((new_length, 1), Image.Resampling.NEAREST))[0].astype(np.int64)


class PixelRule(NamedTuple):
    """How one implementation moves pixels."""

    # picture of Pillow's, RGB, and (height, width) -> the picture at that size
    resize: Callable[[Image.Image, Size], Image.Image]
    # length and new length of an axis -> source index of each pixel of masks
    nearest_indices: Callable[[int, int], np.ndarray]
    keeps_empty: bool  # whether an object of which no pixel is left stays a target


ORIGINAL_PIXELS = PixelRule(_resize, nearest_indices, keeps_empty=False)


class Transform(NamedTuple):
    """What happens to one image, in this order; sizes are (height, width) in pixels.

    ``flip``: horizontal. ``first_size`` and ``crop`` (y, x, height, width) are None unless the crop
    recipe or the jitter drew them. ``size``: the final one. ``pixels``: how they are moved.
    ``rasterizes_first``: polygons too become masks at the original size and move by nearest
    neighbour.
    """

    flip: bool
    first_size: Size | None
    crop: tuple[int, int, int, int] | None
    size: Size
    pixels: PixelRule = ORIGINAL_PIXELS
    rasterizes_first: bool = False


class Recipe(NamedTuple):
    """What the transforms of training images are drawn from."""

    sizes: tuple[int, ...]  # choices of the shortest side, pixels
    max_size: int  # limit of the longest side, pixels
    augmentation: str  # one of AUGMENTATIONS
    lsj_range: tuple[float, float] = LSJ_RANGE  # smallest and largest factor of ``lsj``


def resized_size(size: Size, shortest: int, longest: float = math.inf) -> Size:
    """Size after a resize to ``shortest``, unless the longer side would pass ``longest``.

    Both sides stay unrounded until the end, then int(x + 0.5).
    Source: detectron2 ``ResizeShortestEdge.get_output_shape``.
    """
    height, width = size
    scale = shortest / min(height, width)
    if height < width:
        new_height, new_width = float(shortest), scale * width
    else:
        new_height, new_width = scale * height, float(shortest)
    if max(new_height, new_width) > longest:
        scale = longest / max(new_height, new_width)
        new_height, new_width = new_height * scale, new_width * scale
    return max(int(new_height + 0.5), 1), max(int(new_width + 0.5), 1)


def padded_size(size: Size, multiple: int = PADDING_MULTIPLE) -> Size:
    """The size rounded up to the next multiple."""
    return -(-size[0] // multiple) * multiple, -(-size[1] // multiple) * multiple


def resize_image(image: np.ndarray, size: Size) -> np.ndarray:
    """Resize uint8 [h, w, 3] to (height, width) by Pillow's bilinear filter, which antialiases."""
    if image.shape[:2] == tuple(size):
        return image
    return np.asarray(_resize(Image.fromarray(image), size))


def draw_transform(
    draws: np.ndarray, original_size: Size, recipe: Recipe, boxes_xyxy: np.ndarray | None = None
) -> Transform:
    """Draw the training transform of one image.

    Flip with probability one half, then a resize to a shortest side chosen from ``sizes``; for
    ``flip_resize_crop`` one half of the images are first resized to 400, 500 or 600 and cropped;
    for ``lsj`` see ``_draw_jitter``.

    Args:
        draws: float64 [NUM_DRAWS], uniform in [0, 1).
        original_size: (height, width).
        recipe: what is drawn from.
        boxes_xyxy: of the objects; read by other rules only, here a crop may hold none of them.
    """
    del boxes_xyxy
    flip = bool(draws[0] < 0.5)
    if recipe.augmentation == "lsj":
        return _draw_jitter(draws, flip, original_size, recipe)
    shortest = recipe.sizes[int(draws[1] * len(recipe.sizes))]
    if recipe.augmentation == "flip_resize" or draws[2] < 0.5:
        return Transform(flip, None, None, resized_size(original_size, shortest, recipe.max_size))
    first = resized_size(original_size, CROP_RESIZE_SIZES[int(draws[3] * 3)])
    crop = draw_window(draws[4:], first)
    return Transform(flip, first, crop, resized_size(crop[2:], shortest, recipe.max_size))


def draw_window(draws: np.ndarray, size: Size, later: int = 0) -> tuple[int, int, int, int]:
    """Draw (y, x, height, width) of a crop; both ranges end `later` pixels after the original's."""
    smallest, largest = CROP_RANGE
    height, width = (
        min(side, smallest) + int(draw * (min(side, largest) + later - min(side, smallest) + 1))
        for side, draw in zip(size, draws[:2], strict=True)
    )
    y = int(draws[2] * (size[0] - height + later + 1))
    x = int(draws[3] * (size[1] - width + later + 1))
    return y, x, height, width


def _draw_jitter(draws: np.ndarray, flip: bool, original_size: Size, recipe: Recipe) -> Transform:
    """Large-scale jitter: resize to fit the window, times a factor, and cut what does not fit.

    The window has the largest shortest side and the longest one, and lies as the image does. A
    factor of 1 gives the largest image that fits it, as ``resized_size`` does; the factor is
    uniform in ``lsj_range``. A larger image is cut to the window at a uniformly drawn place; a
    smaller one stays at the top left, and the batch pads it.

    Differs from the reference, which draws one number for the crop's place on both axes and flips
    after padding, so that its padding may be on the left.
    """
    height, width = original_size
    window = max(recipe.sizes), recipe.max_size
    window = window if height <= width else window[::-1]
    smallest, largest = recipe.lsj_range
    factor = smallest + draws[1] * (largest - smallest)
    scale = factor * min(window[0] / height, window[1] / width)
    first = max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)
    size = min(first[0], window[0]), min(first[1], window[1])
    y = int(draws[6] * (first[0] - size[0] + 1))
    x = int(draws[7] * (first[1] - size[1] + 1))
    return Transform(flip, first, (y, x, *size), size)


def transform_image(image: np.ndarray, transform: Transform) -> np.ndarray:
    """Apply a transform to an image uint8 [h, w, 3]; returns uint8 [*transform.size, 3]."""
    return transform_picture(Image.fromarray(image), transform)


def transform_picture(picture: Image.Image, transform: Transform) -> np.ndarray:
    """Apply a transform to a picture of Pillow's, RGB; returns uint8 [*transform.size, 3]."""
    resize = transform.pixels.resize
    if transform.flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if transform.crop is not None and transform.first_size is not None:
        y, x, height, width = transform.crop
        picture = resize(picture, transform.first_size).crop((x, y, x + width, y + height))
    return np.asarray(resize(picture, transform.size))


def move_mask(segmentation: Segmentation, original_size: Size, transform: Transform) -> np.ndarray:
    """Move a mask with its image: uint8 0/1 [h, w] of the transformed size."""
    if isinstance(segmentation, list) and not transform.rasterizes_first:
        polygons = move_polygons(segmentation, original_size, transform)
        return rle.decode(encode_polygons(polygons, *transform.size))
    mask = rle.decode(encode_segmentation(segmentation, *original_size))
    rows, columns = source_indices(original_size, transform)
    return mask[rows][:, columns]


def mask_levels(
    segmentation: Segmentation, original_size: Size, transform: Transform
) -> np.ndarray | None:
    """Move a mask with its image and reduce it to quarter levels.

    Returns uint8 [ceil(h/4), ceil(w/4)] of the transformed size, or None when no pixel of the
    object is left at full size (such an instance is dropped; one that vanishes only at stride 4
    stays). Some rules drop none.
    """
    if isinstance(segmentation, list) and not transform.rasterizes_first:
        polygons = move_polygons(segmentation, original_size, transform)
        original_size = transform.size
        transform = transform._replace(flip=False, first_size=None, crop=None)
        encoded = encode_polygons(polygons, *original_size)
    else:
        encoded = encode_segmentation(segmentation, *original_size)
    runs = read_runs(encoded["counts"])
    assert runs is not None
    levels = levels_of_runs(runs, _inner_pixels(original_size, transform))
    if levels.any() or transform.pixels.keeps_empty:
        return levels
    # The levels say nothing about the other three quarters of the pixels.
    rows, columns = source_indices(original_size, transform)
    return levels if rle.decode(encoded)[rows][:, columns].any() else None


@lru_cache(maxsize=64)
def _inner_pixels(original_size: Size, transform: Transform) -> InnerPixels:
    return inner_pixels(original_size, *source_indices(original_size, transform))


@lru_cache(maxsize=16)  # asked for once per object of an image
def source_indices(original_size: Size, transform: Transform) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of the original that each transformed pixel takes by nearest neighbour."""
    nearest = transform.pixels.nearest_indices
    rows, columns = np.arange(original_size[0]), np.arange(original_size[1])
    if transform.flip:
        columns = columns[::-1]
    if transform.crop is not None and transform.first_size is not None:
        y, x, height, width = transform.crop
        rows = rows[nearest(len(rows), transform.first_size[0])][y : y + height]
        columns = columns[nearest(len(columns), transform.first_size[1])][x : x + width]
    rows = rows[nearest(len(rows), transform.size[0])]
    return rows, columns[nearest(len(columns), transform.size[1])]


def move_polygons(
    polygons: list[list[float]], original_size: Size, transform: Transform
) -> list[list[float]]:
    """Move polygon corners (x, y in pixels) with the image.

    Differs from the reference, which cuts polygons at the crop's border by shapely before they are
    rasterised; here pycocotools leaves out what lies outside.
    """
    height, width = original_size
    moved = []
    for polygon in polygons:
        points = np.asarray(polygon, np.float64).reshape(-1, 2).copy()
        if transform.flip:
            points[:, 0] = width - points[:, 0]
        size = original_size
        if transform.crop is not None and transform.first_size is not None:
            y, x, crop_height, crop_width = transform.crop
            points *= (transform.first_size[1] / width, transform.first_size[0] / height)
            points -= (x, y)
            size = (crop_height, crop_width)
        points *= (transform.size[1] / size[1], transform.size[0] / size[0])
        moved.append(points.reshape(-1).tolist())
    return moved


def boxes_in_crop(boxes_xyxy: np.ndarray, original_size: Size, transform: Transform) -> np.ndarray:
    """Which boxes [objects, 4] of the original image keep an area in a transform's crop.

    Returns bool [objects], all True where nothing is cropped.
    """
    boxes = np.asarray(boxes_xyxy, np.float32).reshape(-1, 4)
    if transform.crop is None or transform.first_size is None:
        return np.ones(len(boxes), bool)
    (height, width), first = original_size, transform.first_size
    if transform.flip:
        boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
    y, x, crop_height, crop_width = transform.crop
    scale = np.array([first[1] / width, first[0] / height], np.float32)
    corners = boxes.reshape(-1, 2, 2) * scale
    corners = np.clip(corners, 0, [first[1], first[0]]) - [x, y]
    corners = np.clip(corners, 0, [crop_width, crop_height])
    return (corners[:, 1] - corners[:, 0]).prod(axis=1) > 0
