"""Read the annotations of a COCO json into columns, noting every fault.

What needs the images or the categories as well (are they there? is the mask of the image's size?)
is asked at the end, of all annotations at once: COCO's own files have the categories last.
"""

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparseinst_jax.data.annotations.coco_json import MAX_INTEGER, lacks
from sparseinst_jax.data.annotations.columns import (
    LETTERS,
    POLYGONS,
    RUNS,
    Columns,
    Growing,
    text_at,
)
from sparseinst_jax.data.annotations.faults import Fault, Faults
from sparseinst_jax.data.annotations.segmentations import sum_runs, usable_polygons
from sparseinst_jax.runtime.messages import brief, listed

NO_MASK = 255  # in place of the kind of a mask: the annotation is left out
_KEYS = ("id", "image_id", "category_id", "segmentation")
_NO_BOX = array("d", [math.nan] * 4)
# In which order the faults of one annotation are told.
_ENTRY, _REPEATED, _IMAGE, _CATEGORY, _CONTENT = range(5)


class AnnotationFault(NamedTuple):
    """A fault, and the place of the category without which it is none; -1 for all of them."""

    fault: Fault
    category: int = -1


class ReadAnnotations(NamedTuple):
    """What the list came to.

    Attributes:
        columns: those of annotations and masks, and `annotation_ends` of the images.
        faults: in the order of the json.
        num_objects: of each category, also those that are left out for a fault.
        num_without_mask: of each category, objects that had no usable polygon.
    """

    columns: Columns
    faults: list[AnnotationFault]
    num_objects: list[int]
    num_without_mask: list[int]


class _Note(NamedTuple):
    """A fault of the annotation in a row, and when it is told; see `_ENTRY`."""

    row: int
    order: int
    fault: Fault


class _Runs(NamedTuple):
    """Run lengths of the annotation in a row: of which size, and their sum or what is wrong."""

    row: int
    size: Any
    total: int
    wrong: str | None


class AnnotationReader:
    """Reads the annotations into columns."""

    def __init__(self, folder: Path | None) -> None:
        """Start an empty list; with a folder the long columns grow in files."""
        self._number = 0  # of entries, also of those that are none
        self._ids, self._image_ids, self._category_ids = array("q"), array("q"), array("q")
        self._is_crowd, self._is_ignored, self._kinds = array("B"), array("B"), array("B")
        self._areas, self._boxes = array("d"), array("d")
        self._first_parts, self._num_parts = array("q"), array("q")
        names = ("polygon_ends", "coordinates", "runs", "letters")
        self._long = {name: Growing(name, folder) for name in names}
        self._polygon_ends, self._coordinates, self._runs, self._letters = self._long.values()
        self._polygon_ends.extend(array("q", [0]))
        self._notes: list[_Note] = []
        self._read_runs: list[_Runs] = []
        self._without_mask = array("q")  # rows

    def add(self, entry: Any) -> None:
        """Read one element of the list."""
        index, self._number = self._number, self._number + 1
        if not _is_plain(entry):
            found = Faults(Path())
            if lacks(entry, _KEYS, "annotations", index, found):
                self._notes += [_Note(len(self._ids), _ENTRY, fault) for fault in found]
                return
        self._ids.append(entry["id"])
        self._image_ids.append(entry["image_id"])
        self._category_ids.append(entry["category_id"])
        self._boxes.extend(_box(entry.get("bbox")))
        self._is_ignored.append(bool(entry.get("ignore")))
        area, iscrowd = entry.get("area"), entry.get("iscrowd") or 0
        fault = _wrong_value(area, iscrowd)
        if fault is None:
            self._areas.append(math.nan if area is None else float(area or 0))
            self._is_crowd.append(bool(iscrowd))
            self._read_mask(entry["segmentation"])
            return
        self._note(fault)
        self._areas.append(math.nan)
        self._is_crowd.append(0)
        self._append_mask(NO_MASK, 0, 0)

    def _note(self, fault: Fault) -> None:
        self._notes.append(_Note(len(self._ids) - 1, _CONTENT, fault))

    def _append_mask(self, kind: int, first: int, number: int) -> None:
        self._kinds.append(kind)
        self._first_parts.append(first)
        self._num_parts.append(number)

    def _read_mask(self, segmentation: Any) -> None:
        if isinstance(segmentation, list):
            self._read_polygons(segmentation)
        elif isinstance(segmentation, dict):
            self._read_run_lengths(segmentation)
        else:
            kind = type(segmentation).__name__
            text = f"a {kind}, not polygons [[x, y, ...], ...] or run lengths"
            self._note(Fault("segmentation", text))
            self._append_mask(NO_MASK, 0, 0)

    def _read_polygons(self, polygons: list) -> None:
        usable, fault = usable_polygons(polygons)
        if fault is not None:
            self._note(fault)
        first = len(self._polygon_ends) - 1
        for coordinates in usable:
            self._coordinates.extend(coordinates)
            self._polygon_ends.extend(array("q", (len(self._coordinates),)))
        self._append_mask(POLYGONS if usable else NO_MASK, first, len(usable))
        if not usable and fault is not None and not fault.is_fatal:
            self._without_mask.append(len(self._ids) - 1)

    def _read_run_lengths(self, runs: dict) -> None:
        counts = runs.get("counts")
        total, wrong = sum_runs(counts)
        self._read_runs.append(_Runs(len(self._ids) - 1, runs.get("size"), total, wrong))
        if wrong is None and isinstance(counts, str):
            column, values, kind = self._letters, array("B", counts.encode()), LETTERS
        elif wrong is None and isinstance(counts, list) and total <= MAX_INTEGER:
            column, values, kind = self._runs, array("q", counts), RUNS
        else:
            self._append_mask(NO_MASK, 0, 0)
            return
        self._append_mask(kind, len(column), len(values))
        column.extend(values)

    def finish(self, images: Columns, categories: Mapping[int, str]) -> ReadAnnotations:
        """Compare the annotations with the images and categories, and sort them by image.

        Args:
            images: columns of `ImageReader`.
            categories: id -> name, sorted by id.
        """
        places = _places(np.asarray(self._image_ids, np.int64), images["image_ids"])
        known = np.array(list(categories), np.int64)
        category = _places(np.asarray(self._category_ids, np.int64), known)
        kinds = np.asarray(self._kinds, np.uint8)
        context = _Context(np.asarray(self._ids, np.int64), places, category, images)
        notes = self._notes + context.repeated()
        notes += context.unknown_images(self._image_ids)
        notes += context.unknown_categories(self._category_ids, categories)
        for note in context.wrong_runs(self._read_runs):
            kinds[note.row] = NO_MASK
            notes.append(note)
        is_known = (places >= 0) & (category >= 0)
        rows = np.flatnonzero(is_known & (kinds != NO_MASK))
        rows = rows[np.argsort(places[rows], kind="stable")]
        number = len(images["image_ids"])
        ends = np.zeros(number + 1, np.int64)
        np.cumsum(np.bincount(places[rows], minlength=number), out=ends[1:])
        columns = {
            "annotation_ends": ends,
            "annotation_ids": context.ids[rows],
            "categories": category[rows].astype(np.int32),
            "is_crowd": np.asarray(self._is_crowd, np.uint8)[rows],
            "is_ignored": np.asarray(self._is_ignored, np.uint8)[rows],
            "areas": np.asarray(self._areas, np.float64)[rows],
            "boxes": np.asarray(self._boxes, np.float64).reshape(-1, 4)[rows].reshape(-1),
            "kinds": kinds[rows],
            "first_parts": np.asarray(self._first_parts, np.int64)[rows],
            "num_parts": np.asarray(self._num_parts, np.int64)[rows],
            **{name: column.finish() for name, column in self._long.items()},
        }
        without_mask = np.asarray(self._without_mask, np.int64)
        without_mask = without_mask[is_known[without_mask]]
        return ReadAnnotations(
            columns,
            context.faults(notes),
            np.bincount(category[is_known], minlength=len(categories)).tolist(),
            np.bincount(category[without_mask], minlength=len(categories)).tolist(),
        )


def _is_plain(entry: Any) -> bool:
    """Whether an entry surely lacks nothing, asked fast."""
    if type(entry) is not dict:
        return False
    get = entry.get
    first, second, third = get("id"), get("image_id"), get("category_id")
    return (
        type(first) is int
        and type(second) is int
        and type(third) is int
        and 0 <= first <= MAX_INTEGER
        and 0 <= second <= MAX_INTEGER
        and 0 <= third <= MAX_INTEGER
        and get("segmentation") is not None
    )


def _box(value: Any) -> array:
    """A box as the json has it, or four NaN: it is no fault, a box can be had from the mask."""
    if isinstance(value, list) and len(value) == 4:
        try:
            box = array("d", value)
        except (TypeError, OverflowError):
            return _NO_BOX
        if math.isfinite(sum(box)):
            return box
    return _NO_BOX


def _wrong_value(area: Any, iscrowd: Any) -> Fault | None:
    """What is wrong with area and iscrowd, None for nothing."""
    try:
        is_number = isinstance(area or 0, int | float) and math.isfinite(area or 0)
    except OverflowError:  # an integer beyond all floats
        is_number = False
    if not is_number:
        return Fault("area", f"area must be a number of px², got {brief(area)}")
    if iscrowd not in (0, 1):
        return Fault("iscrowd", f"iscrowd must be 0 or 1, got {brief(iscrowd)}")
    return None


def _places(wanted: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Place of each number among others, which differ from each other; -1 where it is not there."""
    if not len(among):
        return np.full(len(wanted), -1)
    order = np.argsort(among)
    places = order[np.minimum(np.searchsorted(among, wanted, sorter=order), len(among) - 1)]
    return np.where(among[places] == wanted, places, -1)


class _Context(NamedTuple):
    """What the annotations refer to: ids, and the places of their images and categories."""

    ids: np.ndarray
    places: np.ndarray
    categories: np.ndarray
    images: Columns

    def repeated(self) -> list[_Note]:
        """Annotations whose id an earlier one has."""
        order = np.argsort(self.ids, kind="stable")
        is_repeated = self.ids[order][1:] == self.ids[order][:-1]
        return [
            _Note(
                row,
                _REPEATED,
                Fault("duplicate id", f"annotation id {self.ids[row]} occurs more than once"),
            )
            for row in order[1:][is_repeated].tolist()
        ]

    def unknown_images(self, image_ids: array) -> list[_Note]:
        """Annotations of images that do not exist."""
        kind = "annotation of an unknown image"
        return [
            _Note(row, _IMAGE, Fault(kind, f"{self.where(row)}: unknown image_id {image_ids[row]}"))
            for row in np.flatnonzero(self.places < 0).tolist()
        ]

    def unknown_categories(self, category_ids: array, categories: Mapping[int, str]) -> list[_Note]:
        """Annotations of categories that do not exist."""
        known = listed(categories)
        return [
            _Note(
                row,
                _CATEGORY,
                Fault(
                    "unknown category",
                    f"{self.where(row)}: unknown category_id {category_ids[row]}; the categories "
                    f"are {known}",
                ),
            )
            for row in np.flatnonzero(self.categories < 0).tolist()
        ]

    def wrong_runs(self, read: Sequence[_Runs]) -> list[_Note]:
        """Run lengths that are not those of a mask of the image's size."""
        notes = []
        heights, widths = self.images["heights"], self.images["widths"]
        for row, size, total, wrong in read:
            place = self.places[row]
            if place < 0:
                continue
            expected = [int(heights[place]), int(widths[place])]
            if not isinstance(size, list) or size != expected:
                text = f"run lengths of size {brief(size)}, image is {expected} (height, width)"
            elif wrong is not None:
                text = wrong
            elif total != expected[0] * expected[1]:
                text = f"run lengths sum to {brief(total)}, not to height x width"
            else:
                continue
            notes.append(_Note(row, _CONTENT, Fault("run lengths", text)))
        return notes

    def faults(self, notes: Iterable[_Note]) -> list[AnnotationFault]:
        """The faults in the order of the json.

        What is wrong inside an annotation is told where its image and category are known only.
        """
        told = []
        for row, order, fault in sorted(notes, key=lambda note: note[:2]):
            if order < _CONTENT:
                told.append(AnnotationFault(fault))
            elif self.places[row] >= 0 and self.categories[row] >= 0:
                fault = fault._replace(message=f"{self.where(row)}: {fault.message}")
                told.append(AnnotationFault(fault, int(self.categories[row])))
        return told

    def where(self, row: int) -> str:
        """Name an annotation and its image, where there is one."""
        place = self.places[row]
        if place < 0:
            return f"annotation {self.ids[row]}"
        return f"annotation {self.ids[row]} ({text_at(self.images, place)})"
