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
    weights = np.zeros(masks[0].shape)
    areas = [int(np.count_nonzero(mask)) for mask in masks]
    for mask, area in zip(masks, areas, strict=True):
        weights[mask] += 1 / area
    weight_sums, taken = _sums(weights), []
    places, covered = [], 0
    for mask, area, (height, width) in zip(masks, areas, sizes, strict=True):
        place = None
        covered += height * width
        if height and covered <= MOST_COVERED * mask.size:
            place = _cheapest(mask, area, weight_sums, taken, height, width)
        if place is None:
            covered -= height * width
        else:
            taken.append((*place, height, width))
        places.append(place)
    return places


def _cheapest(
    mask: np.ndarray,
    area: int,
    weight_sums: np.ndarray,
    taken: Sequence[tuple[int, int, int, int]],
    height: int,
    width: int,
) -> Place | None:
    """Find the place of a label with the least cost, or None where all cost too much."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, left = max(rows[0] - height, 0), max(columns[0] - width, 0)
    bottom, right = rows[-1] + height + 1, columns[-1] + width + 1
    own = mask[top:bottom, left:right]
    if own.shape[0] < height or own.shape[1] < width:
        return None
    own_sums = _sums(np.pad(own, 1))
    near = _windows(own_sums, height + 2, width + 2)  # a label of which a side touches its mask
    inside = _windows(own_sums[1:-1, 1:-1], height, width) / area
    others = _windows(weight_sums[top : bottom + 1, left : right + 1], height, width) - inside
    y = top + np.arange(inside.shape[0])[:, None] + (height - 1) / 2 - _middle(own, 1, top, area)
    x = left + np.arange(inside.shape[1]) + (width - 1) / 2 - _middle(own, 0, left, area)
    far = np.hypot(y, x) / (np.sqrt(area) + width / 2)
    cost = _OTHERS * others + _OWN * inside + _DISTANCE * far
    cost[near == 0] = np.inf  # far from its mask
    for y0, x0, its_height, its_width in taken:  # and a cell around each
        rows = slice(max(y0 - height - top, 0), max(y0 + its_height + 1 - top, 0))
        cost[rows, max(x0 - width - left, 0) : max(x0 + its_width + 1 - left, 0)] = np.inf
    best = np.unravel_index(np.argmin(cost), cost.shape)
    return (int(top + best[0]), int(left + best[1])) if cost[best] <= _MOST_COST else None


def _middle(mask: np.ndarray, across: int, first: int, area: int) -> float:
    """The mean row (or column) of a mask's cells."""
    counts = np.count_nonzero(mask, axis=across)
    return first + float(counts @ np.arange(len(counts))) / area


def _sums(values: np.ndarray) -> np.ndarray:
    """Add up all that lies above and left of each corner: [h + 1, w + 1]."""
    return np.pad(values.cumsum(0, float).cumsum(1), ((1, 0), (1, 0)))


def _windows(sums: np.ndarray, height: int, width: int) -> np.ndarray:
    """Add up every window of a size: [h - height + 1, w - width + 1]."""
    return (
        sums[height:, width:]
        - sums[:-height, width:]
        - sums[height:, :-width]
        + sums[:-height, :-width]
    )
