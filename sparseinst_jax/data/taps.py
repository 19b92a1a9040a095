"""Bilinear resizing along one axis, as numbers: which pixels are read, and with which weight."""

from __future__ import annotations

from typing import Any

import numpy as np


def bilinear_taps(
    source: int, target: int, dtype: Any = np.float32
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Place every pixel of an axis between two of another length: half-pixel centres.

    Args:
      source: number of pixels that are read.
      target: number of pixels that are made.
      dtype: of all numbers on the way: float32, as the reference computes its coordinates, or
        float64 for operators that are composed of others.

    Returns:
      lower and upper index, int32 [target], both inside the axis, and the upper one's weight.
    """
    scale, half = dtype(source) / dtype(target), dtype(0.5)
    position = np.maximum((np.arange(target, dtype=dtype) + half) * scale - half, dtype(0))
    lower = np.minimum(position.astype(np.int32), source - 1)
    return lower, np.minimum(lower + 1, source - 1), position - lower.astype(dtype)


def bilinear_matrix(source: int, target: int) -> np.ndarray:
    """Return the [target, source] matrix of bilinear resizing along one axis.

    Half-pixel centres, no antialiasing: `align_corners=False` of PyTorch's `interpolate`.
    """
    lower, upper, weight = bilinear_taps(source, target)
    matrix = np.zeros((target, source), np.float32)
    np.add.at(matrix, (np.arange(target), lower), 1 - weight)
    np.add.at(matrix, (np.arange(target), upper), weight)
    return matrix
