"""What the values of a mask image are: numbers of objects, or something that only looks so."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from sparseinst_jax.data.images import read_values
from sparseinst_jax.data.importers.objects import LabelFault
from sparseinst_jax.runtime.messages import listed

# More different values are a photo, or a mask that was smoothed or saved as JPEG.
MAX_VALUES = 2000
MAX_DIRECT = 0.1  # share of an object's border that a smoothed map leaves unsmoothed
MAX_SPECK = 0.1  # of a value's largest part
MIN_OUTLINE = 0.9  # share of the other objects' borders along which a void border lies
VOID = (255, 65535, 224 + 256 * 224 + 256**2 * 192)  # in grey, and Pascal VOC's colour
SEMANTIC_CURE = (
    "In a semantic map all objects of a class have one value, so that touching ones cannot be "
    "apart. Export instances from the labelling tool instead: a value for each object "
    "(--layout indexed) or an image for each object (--layout objects)."
)


def parse_value(text: str) -> int:
    """Read a value of a map: a number, or a colour such as 224,224,192; else a ValueError."""
    return sum(int(channel) * 256**place for place, channel in enumerate(text.split(",")))


def read_numbers(path: Path, ignored: Sequence[int] = ()) -> np.ndarray:
    """Values of a mask image as one integer a pixel, int64 [h, w]; colours as R + 256 G + 256² B.

    Ignored values become 0. A LabelFault: the file is broken, partly transparent, or no mask by its
    number of values.
    """
    try:
        values = read_values(path, str(path)).astype(np.int64)
    except (ValueError, FileNotFoundError) as error:
        raise LabelFault(error) from error
    if values.ndim == 3:
        if values.shape[2] in (2, 4):
            if (values[..., -1] != 255).any():
                raise LabelFault("is partly transparent; save the mask without an alpha channel")
            values = values[..., :-1]
        is_grey = (values == values[..., :1]).all()
        values = values[..., 0] if is_grey else values @ (256 ** np.arange(values.shape[2]))
    values = np.where(np.isin(values, ignored), 0, values) if len(ignored) else values
    num_values = len(np.unique(values))
    if num_values > MAX_VALUES:
        raise LabelFault(
            f"has {num_values} different values: a photo, or a mask that was smoothed or saved as "
            "JPEG; save masks unsmoothed as PNG"
        )
    if thin := _values_of_edges(values):
        which = " ".join(map(str, thin)) if len(thin) < 4 else "N"
        raise LabelFault(
            f"has {len(thin)} of {num_values} values ({listed(thin, 6)}) only in thin lines around "
            "the others: a map that was smoothed, resized or saved as JPEG. Save it unsmoothed as "
            "PNG; if they are borders that were drawn, as in Pascal VOC, leave them out: "
            f"--ignore-value {which}"
        )
    return values


def _values_of_edges(values: np.ndarray) -> list[int]:
    """The values that interpolation has put between the others; empty in a map of objects.

    There, what fills squares of 3 x 3 pixels mostly touches other such places; in a smoothed map
    thin lines lie in between.
    """
    places = np.unique(values, return_inverse=True)[1].reshape(values.shape).astype(np.int32)
    is_middle = ndimage.minimum_filter(places, 3) == ndimage.maximum_filter(places, 3)
    is_thick = ndimage.maximum_filter(is_middle, 3)
    # Twice the value, and 1 where it is a part of something thick.
    pairs = _neighbours(2 * values + is_thick)
    pairs = pairs[pairs[:, 0] // 2 != pairs[:, 1] // 2]
    pairs = pairs[((pairs % 2 == 1) & (pairs > 1)).any(axis=1)]
    if not len(pairs) or (pairs % 2).all(axis=1).mean() > MAX_DIRECT:
        return []
    return np.unique(pairs[(pairs % 2 == 0) & (pairs > 0)] // 2).tolist()


def _neighbours(values: np.ndarray) -> np.ndarray:
    """The pairs of different values that touch, [pairs, 2], from every side of a pixel."""
    beside = [(values[1:], values[:-1]), (values[:, 1:], values[:, :-1])]
    return np.concatenate([np.stack([a[a != b], b[a != b]], axis=1) for a, b in beside])


def which_are_split(numbers: np.ndarray) -> dict[int, bool]:
    """Of each value of a map, whether it lies in several parts; specks are none."""
    values, places = np.unique(numbers, return_inverse=True)
    places = places.reshape(numbers.shape) + 1
    is_split = {}
    for place, (value, box) in enumerate(
        zip(values.tolist(), ndimage.find_objects(places), strict=True), start=1
    ):
        if value == 0:
            continue
        labelled: Any = ndimage.label(places[box] == place, np.ones((3, 3)))[0]  # type: ignore
        areas = np.sort(np.bincount(labelled.ravel())[1:])
        is_split[value] = len(areas) > 1 and bool(areas[-2] > MAX_SPECK * areas[-1])
    return is_split


def looks_semantic(source: Path, maps: list[dict[int, bool]]) -> str | None:
    """Say so of maps whose values mostly lie in several parts each."""
    values = {value for of_map in maps for value in of_map}
    found = [is_split for of_map in maps for is_split in of_map.values()]
    if 2 * sum(found) <= len(found):
        return None
    several = sum(any(of_map.values()) for of_map in maps)
    if len(values) == 1:
        have = f"all maps have one value besides 0 ({min(values)}), and in {several} of "
        have += f"{len(maps)} it lies"
    else:
        have = f"of {len(found)} values in {len(maps)} maps {sum(found)} lie"
    return (
        f"{source}: {have} in several separate parts: they look semantic, not like a number for "
        f"each object. {SEMANTIC_CURE}"
    )


def outlining_value(numbers: np.ndarray) -> list[int]:
    """The value that lies around all other objects of a map, if there is one."""
    pairs = _neighbours(numbers)
    values = np.unique(numbers[numbers != 0])
    touched = np.bincount(np.searchsorted(values, pairs[np.isin(pairs, values)]), minlength=1)
    if len(values) < 2:
        return []
    value = values[touched.argmax()]
    of_others = pairs[((pairs != value) & (pairs != 0)).any(axis=1)]
    return [int(value)] if (of_others == value).any(axis=1).mean() >= MIN_OUTLINE else []
