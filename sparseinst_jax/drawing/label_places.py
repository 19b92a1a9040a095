"""Choose where the label of each object goes, so that it is read and hides little.

A label lies in its mask or touches it. Among all such places, on a coarse grid, the one with the
least cost is taken: what it hides of other objects counts most, then what it hides of its own, then
its distance from the object. Large objects so get their label inside, small ones beside them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Cost of hiding another object; of hiding its own; of a distance as long as object and label.
_OTHERS, _OWN, _DISTANCE = 3.0, 1.0, 0.2
_MOST_COST = 0.5  # a label that costs more is left out
MOST_COVERED = 0.15  # share of a picture that labels may cover in all
Place = tuple[int, int]


def label_places(
    masks: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]]
) -> list[Place | None]:
    """Place labels one after the other.

    Args:
        masks: D of bool [h, w] on a coarse grid, none empty.
        sizes: (height, width) of the labels in cells of the grid; (0, 0) for an object without.

    Returns:
        The top and left cell of each label; None where none is drawn: it would hide others, or
        enough of the picture is covered already.
    """
    if not masks:
        return []
    areas = [int(mask.sum()) for mask in masks]
    weights = np.zeros(masks[0].shape)
    for mask, area in zip(masks, areas, strict=True):
        weights[mask] += 1 / area
    taken = np.zeros(masks[0].shape, bool)
    places, covered = [], 0
    for mask, area, (height, width) in zip(masks, areas, sizes, strict=True):
        place = None
        covered += height * width
        if height and covered <= MOST_COVERED * taken.size:
            place = _cheapest(mask, area, weights, taken, height, width)
        if place is None:
            covered -= height * width
        else:
            top, left = place
            taken[max(top - 1, 0) : top + height + 1, max(left - 1, 0) : left + width + 1] = True
        places.append(place)
    return places


def _cheapest(
    mask: np.ndarray, area: int, weights: np.ndarray, taken: np.ndarray, height: int, width: int
) -> Place | None:
    """Find the place of a label with the least cost, or None where all cost too much."""
    rows, columns = np.nonzero(mask)
    top, left = max(rows.min() - height, 0), max(columns.min() - width, 0)
    region = np.s_[top : rows.max() + height + 1, left : columns.max() + width + 1]
    own = mask[region]
    if own.shape[0] < height or own.shape[1] < width:
        return None
    inside = _window_sums(own, height, width) / area
    others = _window_sums(weights[region], height, width) - inside
    y = top + np.arange(inside.shape[0])[:, None] + (height - 1) / 2 - rows.mean()
    x = left + np.arange(inside.shape[1]) + (width - 1) / 2 - columns.mean()
    far = np.hypot(y, x) / (np.sqrt(area) + width / 2)
    cost = _OTHERS * others + _OWN * inside + _DISTANCE * far
    cost[_window_sums(np.pad(own, 1), height + 2, width + 2) == 0] = np.inf  # far from its mask
    cost[_window_sums(taken[region], height, width) > 0] = np.inf
    best = np.unravel_index(np.argmin(cost), cost.shape)
    return (int(top + best[0]), int(left + best[1])) if cost[best] <= _MOST_COST else None


def _window_sums(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Add up every window of a size: [h - height + 1, w - width + 1]."""
    sums = np.pad(values.astype(float).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    return (
        sums[height:, width:]
        - sums[:-height, width:]
        - sums[height:, :-width]
        + sums[:-height, :-width]
    )
