"""The masks of a COCO json: which polygons and run lengths can be used, and how to draw them."""

import math
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as rle

from sparseinst_jax.data.faults import Fault
from sparseinst_jax.runtime.messages import brief

Segmentation = list | dict
BoxXYXY = tuple[float, float, float, float]

MIN_POLYGON = 6  # numbers of a polygon with three corners
# pycocotools walks along a polygon's border in fifths of a pixel and remembers each step: an object
# that goes far outside, or to and fro without end, takes all memory.
MAX_COORDINATE = 1e6  # pixels
MAX_BORDER = 2e6  # pixels, of one object: 0.3 GB while it is drawn
MAX_MOVED_COORDINATE = 1e8  # after a resize; in fifths of a pixel still a 32-bit number
MAX_MOVED_BORDER = 1e7  # after a resize: 1.2 GB while it is drawn
MAX_CORNERS = 1_000_000  # of one object; annotators draw tens, segmentation networks thousands
MIN_LISTED_PIXELS = 16  # fewer are never taken for a list of pixels
SHARES = (
    "all coordinates lie between 0 and 1: shares of the image's sides; COCO's are pixels, multiply "
    "them by its width and height"
)
MAX_LETTERS = 8  # characters of one run length in compressed form, more than any image needs
MAX_RUN = 2**31 - 1  # pixels; a sum that ran over 64 bits would have passed it on its way
MAX_TEXT = 1 << 22  # characters of the run lengths of one object: a million runs or more


def usable_polygons(polygons: list) -> tuple[list[array], Fault | None]:
    """The polygons that have three corners, and what is wrong; where that is fatal, none."""
    usable: list[array] = []
    bound = most = 0.0
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
        largest, smallest = max(polygon), min(polygon)
        if largest > MAX_COORDINATE or smallest < -MAX_COORDINATE:
            worst = max(polygon, key=abs)
            return [], Fault("coordinates", f"a polygon has the coordinate {worst:g} px")
        bound += len(polygon) * (largest - smallest)
        most = max(most, largest)
        usable.append(coordinates)
    wrong = other_form(polygons) or _vast(usable, bound, MAX_BORDER)
    if wrong is not None:
        return [], Fault("segmentation", wrong)
    if usable and most <= 1 and are_shares(polygons):
        return [], Fault("coordinates in 0...1", f"{SHARES}; the object is left out", False)
    if len(usable) == max(len(polygons), 1):
        return usable, None
    return usable, _left_out(polygons, bool(usable))


def encode_polygons(polygons: list, height: int, width: int) -> dict[str, Any]:
    """Compressed run lengths of the pixels that the polygons of an object cover.

    They are [[x, y, x, y, ...], ...] in pixels; any part may lie outside of the picture. A
    ValueError: they would exhaust the memory of pycocotools, or it would misread them.
    """
    _refuse_polygons(polygons)
    return rle.merge(rle.frPyObjects(polygons, height, width))


def _refuse_polygons(polygons: list) -> None:
    """Refuse what `encode_polygons` must not draw."""
    drawn: list[np.ndarray] = []
    bound = 0.0
    if not polygons:
        raise ValueError("an object without a polygon")
    for polygon in polygons:
        # A list in a list is meant; pycocotools takes dicts for run lengths of any size.
        if not isinstance(polygon, list | tuple | np.ndarray):
            raise ValueError(f"polygons must be lists of numbers, got {brief(polygon)}")
        try:
            points = np.asarray(polygon, np.float64)
        except (TypeError, ValueError, OverflowError):
            points = np.zeros(0)
        if points.ndim != 1 or len(points) < MIN_POLYGON:  # pycocotools takes four for a box
            raise ValueError(
                f"polygons must be lists of {MIN_POLYGON} numbers or more, got {brief(polygon)}"
            )
        largest = np.abs(points).max(initial=0)
        if not largest <= MAX_MOVED_COORDINATE:  # NaN is not either
            raise ValueError(f"a polygon has the coordinate {largest:g} px")
        bound += 2 * len(points) * float(largest)
        drawn.append(points)
    if (wrong := _vast(drawn, bound, MAX_MOVED_BORDER)) is not None:
        raise ValueError(wrong)


def _vast(polygons: Sequence[array | np.ndarray], bound: float, most: float) -> str | None:
    """What is wrong with polygons that would exhaust the memory of pycocotools.

    The length of their border does not exceed `bound` (pixels); only one above `most`, what is
    allowed, makes it worth measuring.
    """
    num_corners = sum(map(len, polygons)) // 2
    border = sum(map(_border, polygons)) if bound > most else 0.0
    if num_corners <= MAX_CORNERS and border <= most:
        return None
    return (
        f"the polygons of an object have {num_corners} corners and a border of {border:.3g} "
        f"px, expected at most {MAX_CORNERS} and {most:g}; draw it with fewer, or as run lengths"
    )


def _border(coordinates: array | np.ndarray) -> float:
    """Length of a polygon's border in pixels, each side as long as its longer axis."""
    numbers = np.asarray(coordinates, np.float64)
    points = numbers[: len(numbers) // 2 * 2].reshape(-1, 2)
    return float(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1, initial=0).sum())


def are_shares(polygons: Sequence[Sequence[float]]) -> bool:
    """Whether coordinates are shares of the image's sides: fractions, all of them in 0...1."""
    return all(0 <= min(part) and max(part) <= 1 for part in polygons if len(part)) and any(
        number not in (0, 1) for part in polygons for number in part
    )


def other_form(polygons: Sequence[Sequence[float]]) -> str | None:
    """What lists of numbers are where they are no polygons: they would be drawn as nonsense."""
    num, length = len(polygons), len(polygons[0]) if len(polygons) else 0
    found = None
    if num > 2 and all(len(part) == length for part in polygons):
        if length == 2:
            found = f"{num} points [x, y]"
        elif len(set(polygons[0])) <= 2:
            values = set().union(*polygons)
            if 0 in values and len(values) <= 2:
                found = f"the {num} rows of a mask with {length} pixels in each"
    elif num == 2 and length == len(polygons[1]) > MIN_POLYGON:
        if any(list(part) == sorted(part) for part in polygons):
            found = f"the rows and the columns of {length} pixels"
    if found is None:
        if not any(map(_lists_pixels, polygons)):
            return None
        found = f"a list of every pixel, {sum(map(len, polygons)) // 2} in all"
    return (
        f"{found}, not polygons [[x, y, x, y, ...], ...] of corners; give these, or encode the "
        "mask: pycocotools.mask.encode(numpy.asfortranarray(mask))"
    )


def _lists_pixels(numbers: Sequence[float]) -> bool:
    """Whether coordinates list the pixels of a mask, row by row or column by column.

    The last corner of an outline lies beside the first, the last pixel at the other end.
    """
    num = len(numbers) // 2
    if num < MIN_LISTED_PIXELS or len(numbers) % 2:
        return False
    quarter = num // 4 * 2
    for axis in (0, 1):
        first, last = numbers[axis], numbers[axis - 2]
        # Asked of four numbers first: there are a million outlines in a json.
        if not first <= numbers[quarter + axis] <= numbers[-quarter + axis] <= last > first:
            continue
        steps = np.diff(np.asarray(numbers, np.float64).reshape(-1, 2), axis=0)
        line, along = steps[:, axis], steps[:, 1 - axis]
        is_next = line > 0  # the first of another line
        is_sorted = (line >= 0).all() and (along[~is_next] > 0).all() and (steps % 1 == 0).all()
        # A staircase goes on where another line begins, a list of pixels goes back.
        if is_sorted and 2 * is_next.sum() < num and 2 * (along[is_next] < 0).sum() > is_next.sum():
            return True
    return False


def _left_out(polygons: list, is_usable: bool) -> Fault:
    """The fault of polygons that are skipped, as in the original."""
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
    """Add up run lengths; also returns what is wrong with them, if anything."""
    if isinstance(counts, str | bytes | list) and len(counts) > MAX_TEXT:
        return 0, f"run lengths of {len(counts)} characters or numbers, expected {MAX_TEXT} at most"
    if isinstance(counts, str | bytes):
        total = compressed_length(counts)
        return total or 0, "compressed run lengths that cannot be decoded" * (total is None) or None
    if not isinstance(counts, list):
        return 0, "run lengths without counts"
    if not all(type(count) is int and count >= 0 for count in counts):
        return 0, "run lengths must be integers of 0 or more"
    return sum(counts), None


def compressed_length(counts: str | bytes) -> int | None:
    """Add up compressed run lengths; None if the text is not valid.

    pycocotools does not ask: it leaves pixels past the end of a short text as memory held them.
    """
    runs = read_runs(counts)
    return None if runs is None else int(runs.sum())


def read_runs(counts: str | bytes) -> np.ndarray | None:
    """Read compressed run lengths, int64 [runs]; None if the text is not valid.

    Source: `rleFrString` of cocoapi's maskApi: from the fourth on each run is stored as the
    difference to the one two before.
    """
    read = read_numbers(counts.encode("utf-8", "replace") if isinstance(counts, str) else counts)
    if read is None:
        return None
    values, _ = read
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return None if values.min() < 0 or values.max() > MAX_RUN else values


def read_numbers(text: bytes) -> tuple[np.ndarray, np.ndarray] | None:
    """Read the numbers of compressed run lengths, and where each ends: int64 [numbers] both.

    None if the text is not valid. It may be several texts, if each ends with a number's end.

    Source: `rleFrString`: five bits a character from "0" on, the lowest first; the sixth bit is set
    where more follow; the fifth of the last is the sign.
    """
    letters = np.frombuffer(text, np.uint8) - np.uint8(48)  # what is below "0" becomes large
    if not len(letters) or letters.max() > 63 or letters[-1] & 32:
        return None
    (ends,) = (letters < 32).nonzero()
    num_letters = ends + 1
    num_letters[1:] -= ends[:-1] + 1
    most = int(num_letters.max())
    if most > MAX_LETTERS + 1:
        return None
    values = letters[ends].astype(np.int64)
    values -= (values & 16) << 1
    for number in range(1, most):  # most have one; the others take those before it, from the right
        (longer,) = (num_letters > number).nonzero()
        values[longer] = values[longer] << 5 | letters[ends[longer] - number] & 31
    return values, ends


def decode_columns(rle: Mapping[str, Any]) -> tuple[int, np.ndarray]:
    """Decode the columns of a valid compressed RLE from the first to the last that have pixels.

    Returns:
      The place of the first, and bool [columns, height]: masks are small parts of photos.
    """
    height, runs = rle["size"][0], read_runs(rle["counts"])
    assert runs is not None
    ends = runs.cumsum()  # those of the mask's pixels are every second
    inside = np.flatnonzero(runs[1::2])
    if not inside.size:
        return 0, np.zeros((0, height), bool)
    first, last = ends[2 * inside[0]], ends[2 * inside[-1] + 1]
    left, right = int(first // height), int(-(-last // height))
    ends = np.clip(ends - left * height, 0, (right - left) * height)
    is_inside = np.arange(len(ends)) % 2 == 1
    return left, np.repeat(is_inside, np.diff(ends, prepend=0)).reshape(right - left, height)


def encode_segmentation(segmentation: Segmentation, height: int, width: int) -> dict[str, Any]:
    """Compressed run lengths of polygons (any part may lie outside) or of any run lengths.

    Every mask of a data set or a results file goes through here before pycocotools sees it.

    Raises:
        ValueError: polygons that are too large, lists of numbers that are none, or run lengths
            that are not of this size.
    """
    if isinstance(segmentation, list):
        _refuse_polygons(segmentation)
        if (wrong := other_form(segmentation)) is not None:
            raise ValueError(wrong)
        return rle.merge(rle.frPyObjects(segmentation, height, width))
    # Of other run lengths pycocotools would read and write past the end of its memory.
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(size, list | tuple) or list(size) != [height, width]:
        raise ValueError(
            f"run lengths of size {brief(size)} for an image of {[height, width]}; "
            "they must be equal"
        )
    total, wrong = sum_runs(counts)
    if wrong is not None:
        raise ValueError(wrong)
    if total != height * width:
        raise ValueError(f"run lengths sum to {brief(total)}, not to {height} x {width}")
    if isinstance(counts, list):
        return rle.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return {
        "size": [height, width],
        "counts": counts.encode() if isinstance(counts, str) else counts,
    }


def decode_mask(segmentation: Segmentation, height: int, width: int) -> np.ndarray:
    """Rasterise polygons or decode run lengths, by pycocotools.

    Returns:
        bool [height, width].
    """
    return rle.decode(encode_segmentation(segmentation, height, width)).astype(bool)
