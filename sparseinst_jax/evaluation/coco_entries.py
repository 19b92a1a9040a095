"""Read annotations and detections into columns, every mask checked and measured.

* A detection's own `bbox` and `area` are left out: small, medium and large are sizes of masks.
* An annotation without `area` or `iscrowd` gets one.
* What is of an image or a class that the annotations do not name is left out.

A results file may hold half a million masks. pycocotools reads past the end of its memory, or never
ends, where the runs of a mask do not sum to its image, so each of them has to be added up first;
one at a time that takes longer than the scoring.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from sparseinst_jax.data.coco import encode_segmentation
from sparseinst_jax.data.segmentations import (
    MAX_RUN,
    MAX_TEXT,
    SHARES,
    are_shares,
    other_form,
    read_numbers,
)
from sparseinst_jax.evaluation.average_precision import Columns
from sparseinst_jax.runtime.messages import brief, printable

MAX_SHOWN_FAULTS = 10
MAX_SCORE = 1e30  # of a detection, either side of 0; probabilities are meant, logits are taken
# Numbers of a polygon with three corners. pycocotools takes four numbers for a box and fails on an
# empty list, so polygons with fewer corners are left out, as they are when the data is read.
MIN_POLYGON = 6
_KEYS = {"image_id", "category_id", "score", "segmentation"}
INVALID = -1
# Characters that are read together: few calls, and what they make stays in the processor's cache.
CHARACTERS_TOGETHER = 1 << 17
Size = tuple[int, int]


class IdPlaces:
    """Where the images and classes of an annotation file stand in columns: sorted by id.

    Args:
        content: of the file.

    Attributes:
        sizes: image id -> (height, width) in pixels.
        images: image id -> place.
        classes: category id -> place.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.sizes: dict[int, Size] = {
            image["id"]: (image["height"], image["width"]) for image in content["images"]
        }
        self.images = {image_id: place for place, image_id in enumerate(sorted(self.sizes))}
        category_ids = sorted({category["id"] for category in content["categories"]})
        self.classes = {category_id: place for place, category_id in enumerate(category_ids)}

    def columns(self, entries: Sequence[Mapping[str, Any]], *rest: Any) -> Columns:
        """Put entries of known images and classes into columns; `rest` are the other columns."""
        images = np.array([self.images[entry["image_id"]] for entry in entries], np.int64)
        classes = np.array([self.classes[entry["category_id"]] for entry in entries], np.int64)
        return Columns(images, classes, *rest)


def read_annotations(
    content: Mapping[str, Any], places: IdPlaces, name: str | None = None
) -> Columns:
    """Read the annotations that are scored against.

    Args:
        content: of their file.
        places: of its images and classes.
        name: of the file, for messages.

    Raises:
        ValueError: masks cannot be read.
    """
    entries, masks = [], []
    for entry in content["annotations"]:
        mask = entry["segmentation"]
        if isinstance(mask, list) and all(isinstance(part, list) for part in mask):
            parts = [part for part in mask if len(part) >= MIN_POLYGON]
            # Pixels and rows of a mask are refused with the rest, not left out.
            mask = mask if len(parts) < len(mask) and other_form(mask) else parts
        is_known = entry["image_id"] in places.images and entry["category_id"] in places.classes
        if is_known and mask != []:
            entries.append(entry)
            masks.append((mask, places.sizes[entry["image_id"]]))
    rles, measured, faults = _encode(masks)
    files = {image["id"]: image.get("file_name") for image in content["images"]} if faults else {}
    _refuse(
        [
            f"annotation {entries[place]['id']} ({files[entries[place]['image_id']]}) {fault}"
            for place, fault in sorted(faults.items())
        ],
        f"{len(faults)} of {len(entries)} annotations cannot be scored against",
        name,
    )
    given = [entry.get("area") for entry in entries]
    areas = [m if area is None else area for area, m in zip(given, measured, strict=True)]
    is_crowd = np.array([int(entry.get("iscrowd") or 0) for entry in entries], np.int64)
    return places.columns(entries, rles, np.array(areas, np.float64), is_crowd)


def read_detections(
    results: Sequence[Mapping[str, Any]], places: IdPlaces, name: str | None = None
) -> Columns:
    """Read a COCO results file; `name` is that of the file, for messages.

    Raises:
        ValueError: detections do not fit the annotations; says so of all of them.
    """
    faults: dict[int, str] = {}
    entries, masks, numbers = [], [], []
    for number, entry in enumerate(results):
        fault = _unreadable(entry) or _misfit(entry, places)
        if fault:
            faults[number] = fault
        else:
            entries.append(entry)
            masks.append((entry["segmentation"], places.sizes[entry["image_id"]]))
            numbers.append(number)
    rles, areas, unread = _encode(masks)
    faults |= {numbers[place]: fault for place, fault in unread.items()}
    _refuse(
        [f"detection {number} {faults[number]}" for number in sorted(faults)],
        f"{len(faults)} of {len(results)} detections do not fit the annotations; are they of this "
        "data set?",
        name,
    )
    foreign = {entry["category_id"] for entry in entries} - places.classes.keys()
    if foreign:
        logging.warning(
            "detections of the category ids %s are left out: the annotations do not name them",
            sorted(foreign),
        )
        kept = [i for i, entry in enumerate(entries) if entry["category_id"] not in foreign]
        entries, rles, areas = [entries[i] for i in kept], [rles[i] for i in kept], areas[kept]
    scores = np.array([entry["score"] for entry in entries], np.float64)
    return places.columns(entries, rles, areas, scores)


def _refuse(faults: Sequence[str], title: str, name: str | None) -> None:
    if faults:
        title = f"{name}: {title}" if name else title
        raise ValueError("\n  ".join([title, *faults[:MAX_SHOWN_FAULTS]]))


def _unreadable(entry: Any) -> str | None:
    """Say why an entry of a results file is no detection, or None."""
    if not isinstance(entry, Mapping):
        return f"is a {type(entry).__name__}, not an object"
    if not entry.keys() >= _KEYS:
        return f"lacks {', '.join(sorted(_KEYS - entry.keys()))}"
    for key in ("image_id", "category_id"):
        number = entry[key]
        # What json makes of a whole number is asked for first: there may be a million of them.
        if type(number) is not int and (
            isinstance(number, bool) or not isinstance(number, int | np.integer)
        ):
            return f"has the {key} {brief(number)}, not an integer"
    score = entry["score"]
    # No score is larger; this also holds back integers that no float can hold.
    if (
        isinstance(score, bool)
        or not isinstance(score, int | float | np.floating)
        or not abs(score) <= MAX_SCORE
    ):
        return f"has the score {brief(score)}, not a number"
    if not isinstance(entry["segmentation"], dict | list | Mapping):
        return "has a mask that is neither run lengths nor polygons"
    return None


def _misfit(entry: Mapping[str, Any], places: IdPlaces) -> str | None:
    """Say why a detection is not of an image of the annotations, or None."""
    size = places.sizes.get(entry["image_id"])
    if size is None:
        return f"is of image {brief(entry['image_id'])}, not in the json"
    mask = entry["segmentation"]
    got = size if isinstance(mask, list) else mask.get("size")
    got = tuple(got) if isinstance(got, list) else got
    if got != size:
        return f"has a mask of (height, width) {brief(got)}, image {entry['image_id']} has {size}"
    return None


def _encode(masks: Sequence[tuple[Any, Size]]) -> tuple[list[Any], np.ndarray, dict[int, str]]:
    """Bring masks into the form that pycocotools takes, and measure them.

    Args:
        masks: polygons or run lengths, and the (height, width) of the image of each.

    Returns:
        The compressed run lengths; areas float64 [N] in px²; what is wrong, by place.
    """
    rles: list[Any] = [mask for mask, _ in masks]
    areas = np.zeros(len(masks))
    packed = np.array([_is_packed(mask, size) for mask, size in masks], bool)
    texts = [rles[place]["counts"] for place in np.flatnonzero(packed)]
    lengths, areas[packed] = lengths_and_areas(
        [text.encode("utf-8", "replace") if isinstance(text, str) else text for text in texts]
    )
    sizes = np.array([size for _, size in masks], np.int64).reshape(-1, 2)
    is_whole = packed.copy()
    is_whole[packed] = lengths == sizes[packed].prod(axis=1)
    faults = {}
    # Polygons and plain run lengths; and what is broken, which gets its message there.
    for place in np.flatnonzero(~is_whole).tolist():
        mask, size = masks[place]
        try:
            rles[place] = encode_segmentation(mask, *size)
            areas[place] = float(coco_mask.area(rles[place]))
        except Exception as error:  # pycocotools raises whatever it trips over
            faults[place] = f"has a mask that cannot be read: {printable(str(error), 300)}"
    drawn = [place for place in range(len(masks)) if isinstance(masks[place][0], list)]
    if drawn and not faults and all(are_shares(masks[place][0]) for place in drawn):
        faults = dict.fromkeys(drawn, f"has a mask that cannot be right: {SHARES}")
    return rles, areas, faults


def _is_packed(mask: Any, size: Size) -> bool:
    """Whether pycocotools takes the mask as it is, as long as its runs sum to the image."""
    if type(mask) is not dict:
        return False
    counts, got = mask.get("counts"), mask.get("size")
    return (
        isinstance(counts, str | bytes)
        and len(counts) <= MAX_TEXT
        and isinstance(got, list | tuple)
        and tuple(got) == size
        and type(got[0]) is type(got[1]) is int
    )


def lengths_and_areas(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Add up compressed run lengths.

    Args:
        texts: `counts` of COCO's compressed RLE, each at most `segmentations.MAX_TEXT` long.

    Returns:
        lengths: int64 [D], pixels of each mask and its background; `INVALID` where the text is none
            that can be decoded (see `segmentations.compressed_length`).
        areas: int64 [D], pixels of each mask; without meaning where the text is invalid.
    """
    lengths = np.full(len(texts), INVALID, np.int64)
    areas = np.zeros(len(texts), np.int64)
    first = num_characters = 0
    for place, text in enumerate(texts, start=1):
        num_characters += len(text)
        if num_characters >= CHARACTERS_TOGETHER or place == len(texts):
            _measure(texts[first:place], lengths[first:place], areas[first:place])
            first, num_characters = place, 0
    return lengths, areas


def _measure(texts: Sequence[bytes], lengths: np.ndarray, areas: np.ndarray) -> None:
    """Fill in lengths and areas; where one text is wrong, one by one."""
    read = _read(texts)
    if read is not None:
        lengths[:], areas[:] = read
    elif len(texts) > 1:
        for place in range(len(texts)):
            one = slice(place, place + 1)
            _measure(texts[one], lengths[one], areas[one])


def _read(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray] | None:
    """Lengths and areas of a few texts; None where one of them is wrong."""
    # No number may go on into the next text.
    are_closed = all(b"0" <= text[-1:] < b"P" for text in texts)
    read = read_numbers(b"".join(texts)) if are_closed else None
    if read is None:
        return None
    values, ends = read
    text_ends = np.cumsum([len(text) for text in texts])
    num_runs = np.diff(np.searchsorted(ends, text_ends), prepend=0)
    runs, starts = _undo_differences(values, num_runs)
    if runs.min() < 0 or runs.max() > MAX_RUN:
        return None
    background, areas = np.add.reduceat(runs, starts, axis=0).T
    return background + areas, areas


def _undo_differences(values: np.ndarray, num_runs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Add to each run the one two before, from the fourth of a text on.

    Returns:
        runs: int64 [rows, 2], background and mask alternately; a text with an odd number of runs is
            filled up with 0.
        starts: first row of each text.
    """
    num_rows = (num_runs + 1) // 2
    starts = np.cumsum(num_rows) - num_rows
    is_odd = num_runs % 2
    filled_up_before = np.cumsum(is_odd) - is_odd
    runs = np.zeros((int(num_rows.sum()), 2), np.int64)
    runs.reshape(-1)[np.arange(len(values)) + np.repeat(filled_up_before, num_runs)] = values
    # The third is stored as it is, so the first stays out of the sum. What a sum over all texts has
    # gathered before a text is taken off again, exactly, even where it ran over 64 bits.
    first_runs = runs[starts, 0]
    runs[starts, 0] = 0
    sums = np.cumsum(runs, axis=0)
    before = np.zeros((len(starts), 2), np.int64)
    before[1:] = sums[starts[1:] - 1]
    sums -= np.repeat(before, num_rows, axis=0)
    sums[starts, 0] = first_runs
    sums[(starts + num_rows - 1)[is_odd == 1], 1] = 0
    return sums, starts
