"""The rules of the masks of a COCO json: polygons with corners, run lengths that can be decoded."""

import math
from array import array
from typing import Any

import numpy as np

from sparseinst_jax.data.faults import Fault

MIN_POLYGON = 6  # numbers of a polygon with three corners
# pycocotools walks along a polygon's border: an object that far outside takes all memory.
MAX_COORDINATE = 1e6
MAX_LETTERS = 8  # of one run length in compressed form, more than any image needs


def usable_polygons(polygons: list) -> tuple[list[array], Fault | None]:
    """The polygons that have three corners, and what is wrong; where that is fatal, none."""
    usable = []
    for polygon in polygons:
        if not isinstance(polygon, list):
            text = "not a list of polygons [[x, y, x, y, ...], ...]"
            return [], Fault("segmentation", text)
        try:
            coordinates = array("d", polygon)
            # Far faster than a look at each number: NaN and infinity survive a sum.
            is_finite = math.isfinite(sum(polygon))
        except (TypeError, OverflowError):
            return [], Fault("coordinates", "a polygon's coordinates must be numbers")
        if not is_finite:
            return [], Fault("NaN or infinity", "a coordinate is NaN or infinite")
        if len(polygon) < MIN_POLYGON or len(polygon) % 2:
            continue
        if max(polygon) > MAX_COORDINATE or min(polygon) < -MAX_COORDINATE:
            worst = max(polygon, key=abs)
            return [], Fault("coordinates", f"a polygon has the coordinate {worst:g} px")
        usable.append(coordinates)
    if len(usable) == max(len(polygons), 1):
        return usable, None
    return usable, _left_out(polygons, bool(usable))


def _left_out(polygons: list, is_usable: bool) -> Fault:
    """Say which polygons are passed over, as detectron2 does."""
    odd = sum(len(polygon) % 2 for polygon in polygons)
    short = sum(len(polygon) % 2 == 0 and len(polygon) < MIN_POLYGON for polygon in polygons)
    what = [f"{short} with fewer than 3 points"] * bool(short)
    what += [f"{odd} with an odd number of coordinates"] * bool(odd)
    outcome = "these are left out" if is_usable else "the object is left out"
    return Fault(
        "polygon with fewer than 3 points" if short or not polygons else "odd polygon",
        f"{len(polygons)} polygons, {' and '.join(what) or 'not one'}; {outcome}",
        is_fatal=False,
    )


def sum_runs(counts: Any) -> tuple[int, str | None]:
    """Add up run lengths; also says what is wrong with them."""
    if isinstance(counts, str):
        total = compressed_length(counts)
        return total or 0, "compressed run lengths that cannot be decoded" * (total is None) or None
    if not isinstance(counts, list):
        return 0, "run lengths without counts"
    if not all(type(count) is int and count >= 0 for count in counts):
        return 0, "run lengths must be integers of 0 or more"
    return sum(counts), None


def compressed_length(counts: str | bytes) -> int | None:
    """Add up compressed run lengths; None where the text is none.

    pycocotools does not ask: it leaves pixels past the end of a short text as memory held them.

    Source: `rleFrString` of cocoapi's maskApi: five bits a letter from "0" on, the lowest first,
    the sixth bit says that more follow; from the fourth on each run is stored as the difference
    to the one two before.
    """
    raw = counts.encode("utf-8", "replace") if isinstance(counts, str) else counts
    letters = np.frombuffer(raw, np.uint8).astype(np.int64) - 48
    if not len(letters) or letters.min() < 0 or letters.max() > 63 or letters[-1] & 32:
        return None
    is_last = (letters & 32) == 0
    starts = np.concatenate([[0], np.flatnonzero(is_last)[:-1] + 1])
    place = np.arange(len(letters)) - np.repeat(starts, np.diff([*starts, len(letters)]))
    if place.max() > MAX_LETTERS:
        return None
    values = np.add.reduceat((letters & 31) << 5 * place, starts)
    is_negative = (letters[is_last] & 16) != 0
    values -= is_negative.astype(np.int64) << 5 * (place[is_last] + 1)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return None if values.min() < 0 else int(values.sum())
