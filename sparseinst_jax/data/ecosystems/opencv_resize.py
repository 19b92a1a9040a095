"""OpenCV's resize of 8-bit images in NumPy.

Unlike Pillow's it never antialiases: a pixel of the result is made of 2x2 (bilinear) or 4x4
(bicubic) pixels of the source, whatever the scale.

Source: OpenCV 4, modules/imgproc/src/resize.cpp (``resize`` with INTER_LINEAR, INTER_CUBIC and
INTER_NEAREST). Bilinear and nearest are equal to the bit. Bicubic follows the published x86-64
builds, which hand it to a closed library that computes in floating point: about one value in 10^5
differs by one (a build without that library rounds weights to 11 bits: 5 % differ by one).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Size = tuple[int, int]
ONE = 1 << 11  # bilinear weights are integers, parts of this
CUBIC_A = -0.75
CHUNK_ROWS = 32  # of the result at a time, so that what is in between stays in the cache


class _Taps(NamedTuple):
    """Source pixels and weights of each pixel of an axis."""

    index: np.ndarray  # int64 [taps, length], clipped to the axis
    weight: np.ndarray  # [taps, length], int32 parts of ONE (bilinear) or float32 (bicubic)


def resize_bilinear(image: np.ndarray, size: Size) -> np.ndarray:
    """Resize uint8 [h, w, 3] to (height, width) as ``cv2.resize`` with ``cv2.INTER_LINEAR``."""
    if image.shape[:2] == tuple(size):
        return image
    if image.shape[:2] == (2 * size[0], 2 * size[1]):
        return _halved(image)
    columns = _linear_taps(image.shape[1], size[1], True)
    rows = _linear_taps(image.shape[0], size[0], False)
    # Columns first; the shift leaves numbers of 15 bits, and is part of the rounding.
    lines = _resize_columns(image, columns) >> 4
    return _resize_rows(lines, rows, lambda upper, lower: ((upper >> 16) + (lower >> 16) + 2) >> 2)


def resize_bicubic_by_factor(image: np.ndarray, factor: float) -> np.ndarray:
    """Resize uint8 [h, w, 3] as ``cv2.resize`` with ``fx=fy=factor`` and ``cv2.INTER_CUBIC``.

    The result has `size_by_factor`; its pixels are sampled 1 / factor apart, whatever became of the
    rounded sides.
    """
    size = size_by_factor((image.shape[0], image.shape[1]), factor)
    if image.shape[:2] == size:
        return image
    rows = _cubic_taps(image.shape[0], size[0], 1.0 / factor)
    columns = _cubic_taps(image.shape[1], size[1], 1.0 / factor)
    lines = _resize_columns(image, columns)
    return _resize_rows(lines, rows, lambda *parts: np.clip(np.rint(sum(parts)), 0, 255))


def size_by_factor(size: Size, factor: float) -> Size:
    """Size (height, width) after a resize by a factor: rounded, to even at one half."""
    return max(round(size[0] * factor), 1), max(round(size[1] * factor), 1)


def nearest_indices(length: int, new_length: int) -> np.ndarray:
    """Source index of each pixel in OpenCV's INTER_NEAREST resize of an axis, int64 [new_length].

    Pillow takes the source pixel at the new pixel's centre, OpenCV the one at its first edge.
    """
    step = 1.0 / (new_length / length)
    return np.minimum(np.floor(np.arange(new_length) * step).astype(np.int64), length - 1)


def _halved(image: np.ndarray) -> np.ndarray:
    """Mean of 2x2 pixels: what OpenCV makes of bilinear at exactly one half."""
    wide = image.astype(np.uint16)
    total = wide[::2, ::2] + wide[1::2, ::2] + wide[::2, 1::2] + wide[1::2, 1::2]
    return ((total + 2) >> 2).astype(np.uint8)


def _resize_columns(image: np.ndarray, taps: _Taps) -> np.ndarray:
    """Weighted sums of columns: [h, length, 3] of the weights' type."""
    result = np.zeros((image.shape[0], taps.index.shape[1], image.shape[2]), taps.weight.dtype)
    for index, weight in zip(taps.index, taps.weight, strict=True):
        result += image[:, index] * weight[:, None]
    return result


def _resize_rows(lines: np.ndarray, taps: _Taps, add: Callable[..., np.ndarray]) -> np.ndarray:
    """Weighted rows of [h, length, 3], which `add` makes one: uint8 [length of taps, length, 3]."""
    flat = lines.reshape(len(lines), -1)
    result = np.empty((taps.index.shape[1], flat.shape[1]), np.uint8)
    for first in range(0, len(result), CHUNK_ROWS):
        chunk = slice(first, first + CHUNK_ROWS)
        pairs = zip(taps.index[:, chunk], taps.weight[:, chunk, None], strict=True)
        result[chunk] = add(*(flat[index] * weight for index, weight in pairs))
    return result.reshape(-1, *lines.shape[1:])


@functools.lru_cache(maxsize=256)
def _linear_taps(length: int, new_length: int, are_columns: bool) -> _Taps:
    step = 1.0 / (new_length / length)
    centre = ((np.arange(new_length) + 0.5) * step - 0.5).astype(np.float32)
    low = np.floor(centre).astype(np.int64)
    fraction = centre - low.astype(np.float32)
    if are_columns:
        # Past the border one pixel has the whole weight; of rows the border is repeated instead,
        # and the two halves are rounded on their own.
        fraction[(low < 0) | (low >= length - 1)] = 0
        low = np.clip(low, 0, length - 1)
    weight = np.rint(np.stack([1 - fraction, fraction]) * np.float32(ONE)).astype(np.int32)
    return _Taps(np.clip(np.stack([low, low + 1]), 0, length - 1), weight)


@functools.lru_cache(maxsize=256)
def _cubic_taps(length: int, new_length: int, step: float) -> _Taps:
    centre = (np.arange(new_length) + 0.5) * step - 0.5
    low = np.floor(centre).astype(np.int64)
    x = centre - low
    outer = ((CUBIC_A * (x + 1) - 5 * CUBIC_A) * (x + 1) + 8 * CUBIC_A) * (x + 1) - 4 * CUBIC_A
    left, right = (((CUBIC_A + 2) * t - (CUBIC_A + 3)) * t * t + 1 for t in (x, 1 - x))
    weight = np.stack([outer, left, right, 1 - outer - left - right]).astype(np.float32)
    return _Taps(np.clip(low + np.arange(-1, 3)[:, None], 0, length - 1), weight)
