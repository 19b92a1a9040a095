"""Read annotations and detections into columns, every mask checked and measured.

* A detection's own `bbox` and `area` are left out: small, medium and large are sizes of masks.
* An annotation without `area` or `iscrowd` gets one.
* What is of an image or a class that the annotations do not name is left out.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from sparseinst_jax.data.coco import encode_segmentation
from sparseinst_jax.data.segmentations import MAX_TEXT
from sparseinst_jax.evaluation.average_precision import Columns
from sparseinst_jax.evaluation.run_lengths import lengths_and_areas
from sparseinst_jax.runtime.messages import brief, printable

MAX_SHOWN_FAULTS = 10
MAX_SCORE = 1e30  # of a detection, either side of 0; probabilities are meant, logits are taken
# Numbers of a polygon with three corners. pycocotools takes four numbers for a box and fails on an
# empty list, so polygons with fewer corners are left out, as they are when the data is read.
MIN_POLYGON = 6
_KEYS = {"image_id", "category_id", "score", "segmentation"}
Size = tuple[int, int]


class Places:
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

    def columns(
        self,
        entries: Sequence[Mapping[str, Any]],
        rles: list[Any],
        areas: np.ndarray,
        values: np.ndarray,
    ) -> Columns:
        """Put entries of known images and classes into columns."""
        images = np.array([self.images[entry["image_id"]] for entry in entries], np.int64)
        classes = np.array([self.classes[entry["category_id"]] for entry in entries], np.int64)
        return Columns(images, classes, rles, areas, values)


def read_annotations(content: Mapping[str, Any], places: Places) -> Columns:
    """Read the annotations that are scored against.

    Raises:
        ValueError: masks cannot be read.
    """
    entries, masks = [], []
    for entry in content["annotations"]:
        if entry["image_id"] not in places.images or entry["category_id"] not in places.classes:
            continue
        mask = entry["segmentation"]
        if isinstance(mask, list):
            mask = [part for part in mask if len(part) >= MIN_POLYGON]
            if not mask:
                continue
        entries.append(entry)
        masks.append((mask, places.sizes[entry["image_id"]]))
    rles, measured, faults = _encode(masks)
    _refuse(
        [f"annotation {entries[place]['id']} {faults[place]}" for place in sorted(faults)],
        f"{len(faults)} of {len(entries)} annotations cannot be scored against",
    )
    areas = np.array(
        [
            area if entry.get("area") is None else entry["area"]
            for entry, area in zip(entries, measured, strict=True)
        ],
        np.float64,
    )
    is_crowd = np.array([int(entry.get("iscrowd") or 0) for entry in entries], np.int64)
    return places.columns(entries, rles, areas, is_crowd)


def read_detections(results: Sequence[Mapping[str, Any]], places: Places) -> Columns:
    """Read a COCO results file.

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


def _refuse(faults: Sequence[str], title: str) -> None:
    if faults:
        shown = "\n  ".join(faults[:MAX_SHOWN_FAULTS])
        raise ValueError(f"{title}\n  {shown}")


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


def _misfit(entry: Mapping[str, Any], places: Places) -> str | None:
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
    # Polygons and plain run lengths; and what is broken, which is told in words there.
    for place in np.flatnonzero(~is_whole).tolist():
        mask, size = masks[place]
        try:
            rles[place] = encode_segmentation(mask, *size)
            areas[place] = float(coco_mask.area(rles[place]))
        except Exception as error:  # pycocotools raises whatever it trips over
            faults[place] = f"has a mask that cannot be read: {printable(str(error), 300)}"
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
