"""The training transforms of PaddleDetection's SparseInst, drawn instead of detectron2's.

What differs: sizes are rounded down; pixels are OpenCV's, without antialias; with crops, masks are
made at the original size and moved by nearest neighbour; a crop may be one pixel larger than the
image and lies one pixel further at most, where it loses its last row or column; objects are kept by
their box, whatever is left of their mask; a crop without any object is not made.

Source: PaddlePaddle/PaddleDetection, pull request 7357, ppdet/data/transform/operators.py
(``RandomShortSideResize``, ``RandomSizeCrop``) and the readers of configs/sparseinst.
"""

import numpy as np

from sparseinst_jax.data.transforms import CROP_RANGE, CROP_RESIZE_SIZES, Size, Transform

RULE = "paddledetection"


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
    draws: np.ndarray,
    original_size: Size,
    sizes: tuple[int, ...],
    max_size: int,
    augmentation: str,
    boxes_xyxy: np.ndarray,
) -> Transform:
    """Draw the training transform of one image; see ``transforms.draw_transform``.

    Args:
        draws: float64 [NUM_DRAWS], uniform in [0, 1).
        original_size: (height, width).
        sizes: choices of the shortest side.
        max_size: limit of the longest side.
        augmentation: "flip_resize" or "flip_resize_crop".
        boxes_xyxy: float32 [objects, 4] in the original image; read with crops only.
    """
    flip = bool(draws[0] < 0.5)
    shortest = sizes[int(draws[1] * len(sizes))]
    has_crop = augmentation == "flip_resize_crop"
    if not has_crop or draws[2] < 0.5:
        size = resized_size(original_size, shortest, max_size)
        return Transform(flip, None, None, size, RULE, rasterizes_first=has_crop)
    first = resized_size(original_size, CROP_RESIZE_SIZES[int(draws[3] * 3)])
    window = _draw_window(draws[4:8], first)
    # All that the window holds of the image: it may hang over by one row and one column.
    y, x, height, width = window
    crop = y, x, min(height, first[0] - y), min(width, first[1] - x)
    size = resized_size(crop[2:], shortest, max_size)
    transform = Transform(flip, first, crop, size, RULE, rasterizes_first=True)
    if boxes_in_crop(boxes_xyxy, original_size, transform).any():
        return transform
    return transform._replace(crop=(0, 0, *first), size=resized_size(first, shortest, max_size))


def _draw_window(draws: np.ndarray, size: Size) -> tuple[int, int, int, int]:
    """Draw (y, x, height, width) of a crop; both ranges end one later than detectron2's."""
    smallest, largest = CROP_RANGE
    sides = []
    for side, draw in zip(size, draws[:2], strict=True):
        low, high = min(side, smallest), min(side, largest) + 1
        sides.append(low + int(draw * (high - low + 1)))
    if tuple(sides) == size:
        return 0, 0, sides[0], sides[1]
    y, x = (
        int(draw * (side - length + 2))
        for side, length, draw in zip(size, sides, draws[2:], strict=True)
    )
    return y, x, sides[0], sides[1]


def boxes_in_crop(boxes_xyxy: np.ndarray, original_size: Size, transform: Transform) -> np.ndarray:
    """Tell which boxes keep an area in a transform's crop.

    Args:
        boxes_xyxy: [objects, 4] in the original image.
        original_size: (height, width).
        transform: of the image.

    Returns:
        bool [objects]; all True where nothing is cropped.
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
