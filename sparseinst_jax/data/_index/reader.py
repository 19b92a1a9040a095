"""Read a COCO json into the columns of its index, noting every fault.

The lists of images and annotations are read one element at a time. What needs the images or the
categories as well (are they there? is the mask of the image's size?) is asked at the end, of all
annotations at once: COCO's own files have the categories last.
"""

import gc
import math
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from sparseinst_jax.data._index.columns import (
    LETTERS,
    POLYGONS,
    RUNS,
    AnnotationFault,
    CocoIndex,
    Columns,
    Growing,
    file_name,
    save_index,
)
from sparseinst_jax.data._index.json_stream import JsonError, read_object
from sparseinst_jax.data.faults import DatasetFaults, Fault
from sparseinst_jax.data.images import MAX_PIXELS, name_fault
from sparseinst_jax.data.segmentations import sum_runs, usable_polygons
from sparseinst_jax.runtime.class_names import MAX_ID, class_name_fault
from sparseinst_jax.runtime.files import broken_json, check_json_file
from sparseinst_jax.runtime.messages import brief, listed, printable

WHAT = "annotations file"
CURE = "set config.data.train.annotations or config.data.val.annotations to a COCO instance json"
LISTS = ("images", "annotations", "categories")
MAX_SIDE = 2**31 - 1  # of an image in pixels; height times width stays a 64-bit number
NO_MASK = 255  # in place of the kind of a mask: the annotation is left out
_IMAGE_KEYS = ("id", "file_name", "height", "width")
_ANNOTATION_KEYS = ("id", "image_id", "category_id", "segmentation")
_NO_BOX = array("d", [math.nan] * 4)
# In which order the faults of one annotation are reported.
_ENTRY, _REPEATED, _IMAGE, _CATEGORY, _CONTENT = range(5)


def refuse_missing_files(path: Path, root: Path | None) -> None:
    """Refuse a json that is no file or empty, and an image folder that does not exist."""
    check_json_file(path, WHAT, CURE)
    with open(path, "rb") as file:
        if not file.read(1 << 16).strip() and not path.stat().st_size > 1 << 16:
            size = path.stat().st_size
            raise ValueError(f"{WHAT} {path} is empty ({size} bytes); {CURE}")
    if root is not None and not root.is_dir():
        raise FileNotFoundError(
            f"image folder {root} does not exist (asked for by the annotations {path}); set "
            "config.data.train.images or config.data.val.images to the folder of the images"
        )


def build_index(path: Path, folder: Path | None) -> CocoIndex:
    """Read a json into columns: files of an empty folder, or in memory.

    Raises:
        ValueError: it is no json, or another kind of json.
    """
    collects = gc.isenabled()
    # Every element is dropped before the next is read, without a cycle: looking for one in between
    # takes as long as all the rest.
    gc.disable()
    try:
        with open(path, "rb") as file:
            index = _read(path, file, folder)
    finally:
        if collects:
            gc.enable()
    if folder is not None:
        save_index(index, folder)
    return index


def _read(path: Path, file: BinaryIO, folder: Path | None) -> CocoIndex:
    of_categories, of_images = DatasetFaults(path), DatasetFaults(path)
    categories: Mapping[int, str] = {}
    images: Columns = {}
    annotations, has_annotations = AnnotationReader(folder), False
    try:
        for key, value in _read_sections(path, file):
            # Of a key that occurs twice the last one counts, as with Python's own parser.
            if key == "categories":
                of_categories = DatasetFaults(path)
                categories = read_categories(value, of_categories)
            elif key == "images":
                of_images = DatasetFaults(path)
                images = read_images(value, of_images)
            elif key == "annotations":
                annotations, has_annotations = AnnotationReader(folder), True
                annotations.read(value)
    except JsonError as error:
        place = f"line {error.line}, column {error.column}" if error.line else ""
        message = broken_json(path, WHAT, CURE, error.reason, place, error.is_cut)
        raise ValueError(message) from error
    columns, faults, *counts = annotations.finish(images, categories)
    return CocoIndex(
        {**images, **columns},
        None if folder is None else str(folder),
        dict(categories),
        has_annotations,
        (list(of_categories), list(of_images), faults),
        *counts,
    )


def _read_sections(path: Path, file: BinaryIO) -> Iterator[tuple[str, Any]]:
    """Read the keys and values of a COCO json; `images` and `annotations` come element by element.

    Other sections come as they are, and may be passed over.

    Raises:
        JsonError: it is no json.
        ValueError: it is another kind of json.
    """
    content: dict[str, Any] = {}  # without the elements of the two long lists
    for key, value in read_object(file, ("images", "annotations")):
        if not key and not isinstance(value, dict):
            content = value
            break
        is_list = isinstance(value, list | Iterator)
        content[key] = value if key not in LISTS else [] if is_list else None
        if key not in LISTS or is_list:
            yield key, value
    _refuse_other_kinds(path, content)


def _refuse_other_kinds(path: Path, content: Any) -> None:
    """Make sure that a json has the lists of a COCO file."""
    if not isinstance(content, dict):
        hint = " (a list of detections is a results file)" if isinstance(content, list) else ""
        raise ValueError(
            f"{path} is not a COCO annotation file: expected an object with 'images', "
            f"'annotations' and 'categories', got a {type(content).__name__}{hint}; give the "
            "annotation json"
        )
    wrong = [key for key in ("images", "categories") if not isinstance(content.get(key), list)]
    if "annotations" in content and not isinstance(content["annotations"], list):
        wrong.append("annotations")
    if wrong:
        keys = [printable(key, 80) for key in sorted(map(str, content))]
        got = f"it has the keys {listed(keys, 20)}" if keys else "it is an empty object, {}"
        raise ValueError(
            f"{path} is not a COCO annotation file: expected lists under 'images', 'annotations' "
            f"and 'categories', got no list under {' and '.join(map(repr, wrong))}; {got}. "
            f"{_cure(content)}"
        )


def _cure(content: Collection[str]) -> str:
    """How to get a COCO json from what was given."""
    if "shapes" in content and "imagePath" in content:
        return "It is LabelMe's: `sparseinst import-data labelme FOLDER --output train.json`."
    if any(str(key).startswith("_via_") for key in content):
        return "It is VIA's: `sparseinst import-data via FILE --output train.json`."
    return "Export it as COCO instances, or convert it: `sparseinst import-data --help`."


def read_categories(entries: list, faults: DatasetFaults) -> dict[int, str]:
    """Read the categories: id -> name, in the order of the ids."""
    names: dict[int, str] = {}
    for index, entry in enumerate(entries):
        if wrong := _faults_of_entry(entry, ("id", "name"), f"categories[{index}]"):
            faults.found += wrong
            continue
        if entry["id"] in names:
            faults.add("duplicate id", f"category id {entry['id']} occurs more than once")
        fault = class_name_fault(entry["name"])
        if fault is not None:
            faults.add("class name", f"category {entry['id']}: {fault}")
        # Later messages are not to hold what is wrong with the name.
        names[entry["id"]] = str(entry["name"]) if fault is None else f"category {entry['id']}"
    if not entries:
        faults.add("empty list", "'categories' is empty: no class to learn")
    return {category_id: names[category_id] for category_id in sorted(names)}


def _faults_of_entry(entry: Any, keys: tuple[str, ...], what: str) -> list[Fault]:
    """The keys that an entry lacks, and ids that are no integers."""
    if not isinstance(entry, dict):
        return [Fault("entry", f"{what}: expected an object, got {brief(entry)}")]
    found = []
    for key in keys:
        value = entry.get(key)
        if value is None:
            hint = "; boxes alone cannot be learned from" if key == "segmentation" else ""
            text = f"{what} (id {brief(entry.get('id'))}): no {key}{hint}"
            found.append(Fault("missing key", text))
        elif key.endswith("id") and type(value) is not int:  # True is an int
            found.append(Fault("id", f"{what}: {key} must be an integer, got {brief(value)}"))
        elif key.endswith("id") and abs(value) > MAX_ID:
            found.append(Fault("id", f"{what}: {key} must be at most {MAX_ID}, got {brief(value)}"))
        elif key == "file_name" and not isinstance(value, str):
            text = f"{what}: file_name must be a text, got {brief(value)}"
            found.append(Fault("file_name", text))
    return found


def read_images(entries: Iterable[Any], faults: DatasetFaults) -> Columns:
    """Read the images into columns, in the order of the json."""
    images: dict[int, tuple[str, int, int]] = {}  # name, height and width by id
    number = 0
    for number, entry in enumerate(entries, start=1):
        wrong = _faults_of_entry(entry, _IMAGE_KEYS, f"images[{number - 1}]")
        if not wrong and (fault := _fault_of_image(entry, images)) is not None:
            wrong = [fault]
        if not wrong:
            size = int(entry["height"]), int(entry["width"])
            images[entry["id"]] = entry["file_name"], *size
        faults.found += wrong
    if not number:
        faults.add("empty list", "'images' is empty")
    # A text of a json may hold surrogates.
    names = [name.encode("utf-8", "surrogatepass") for name, *_ in images.values()]
    sizes = np.array([size for _, *size in images.values()], np.int64).reshape(-1, 2)
    heights, widths = sizes.T.copy()
    return {
        "image_ids": np.array(list(images), np.int64),
        "heights": heights,
        "widths": widths,
        "name_ends": np.cumsum([0, *map(len, names)], dtype=np.int64),
        "names": np.frombuffer(b"".join(names), np.uint8),
    }


def _fault_of_image(entry: dict[str, Any], known: Mapping[int, tuple]) -> Fault | None:
    """What is wrong with the values of an image, also beside those that are known by their ids."""
    image_id, name = entry["id"], entry["file_name"]
    height, width = entry["height"], entry["width"]
    if image_id in known:
        text = f"image id {image_id} occurs more than once: {known[image_id][0]} and "
        return Fault("duplicate id", text + brief(name)[1:-1])
    if (fault := name_fault(name)) is not None:
        return Fault("file_name", f"image {image_id}: {fault}")
    if not (_is_side(height) and _is_side(width)):
        return Fault(
            "image size",
            f"image {image_id} ({name}): height {brief(height)} and width {brief(width)} must "
            "be > 0" + f" and at most {MAX_SIDE}" * (_is_vast(height) or _is_vast(width)),
        )
    if int(height) * int(width) > MAX_PIXELS:
        return Fault(
            "image size",
            f"image {image_id} ({name}): {brief(height)} x {brief(width)} (height x width) are "
            f"more than {MAX_PIXELS} pixels: such images are not read; cut it into parts",
        )
    return None


def _is_side(value: Any) -> bool:
    return type(value) in (int, float) and 1 <= value <= MAX_SIDE  # NaN is neither


def _is_vast(value: Any) -> bool:
    return type(value) in (int, float) and MAX_SIDE < value < math.inf


class _Note(NamedTuple):
    """A fault of the annotation in a row, and when it is reported; see `_ENTRY`."""

    row: int
    order: int
    fault: Fault


class _RunLengths(NamedTuple):
    """Run lengths of the annotation in a row: of which size, and their sum or what is wrong."""

    row: int
    size: Any
    total: int
    wrong: str | None


class AnnotationReader:
    """Reads the annotations into columns."""

    def __init__(self, folder: Path | None) -> None:
        """Start an empty list; with a folder the long columns grow in files."""
        self._ids, self._image_ids, self._category_ids = array("q"), array("q"), array("q")
        self._is_crowd, self._is_ignored, self._kinds = array("B"), array("B"), array("B")
        self._areas, self._boxes = array("d"), array("d")
        self._first_parts, self._num_parts = array("q"), array("q")
        names = ("polygon_ends", "coordinates", "runs", "letters")
        self._long = {name: Growing(name, folder) for name in names}
        self._polygon_ends, self._coordinates, self._runs, self._letters = self._long.values()
        self._polygon_ends.extend(array("q", [0]))
        self._notes: list[_Note] = []
        self._read_runs: list[_RunLengths] = []
        self._without_mask = array("q")  # rows

    def read(self, entries: Iterable[Any]) -> None:
        """Read the elements of the list."""
        for index, entry in enumerate(entries):
            if wrong := _faults_of_entry(entry, _ANNOTATION_KEYS, f"annotations[{index}]"):
                self._notes += [_Note(len(self._ids), _ENTRY, fault) for fault in wrong]
            else:
                self._add(entry)

    def _add(self, entry: dict[str, Any]) -> None:
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
        self._read_runs.append(_RunLengths(len(self._ids) - 1, runs.get("size"), total, wrong))
        if wrong is None and isinstance(counts, str):
            column, values, kind = self._letters, array("B", counts.encode()), LETTERS
        elif wrong is None and isinstance(counts, list) and total <= MAX_ID:  # fits 64 bits
            column, values, kind = self._runs, array("q", counts), RUNS
        else:
            self._append_mask(NO_MASK, 0, 0)
            return
        self._append_mask(kind, len(column), len(values))
        column.extend(values)

    def finish(
        self, images: Columns, categories: Mapping[int, str]
    ) -> tuple[Columns, list[AnnotationFault], list[int], list[int]]:
        """Compare the annotations with the images and categories, and sort them by image.

        Args:
            images: columns of `read_images`.
            categories: id -> name, sorted by id.

        Returns:
            the columns of annotations and masks, and `faults`, `num_objects` and `num_without_mask`
            of `CocoIndex`.
        """
        places = _places(np.asarray(self._image_ids, np.int64), images["image_ids"])
        known = np.array(list(categories), np.int64)
        category = _places(np.asarray(self._category_ids, np.int64), known)
        kinds = np.asarray(self._kinds, np.uint8)
        links = _Links(np.asarray(self._ids, np.int64), places, category, images)
        notes = self._notes + list(links.wrong(self._image_ids, self._category_ids, categories))
        for note in links.wrong_runs(self._read_runs):
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
            "annotation_ids": links.ids[rows],
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
        return (
            columns,
            links.faults(notes),
            np.bincount(category[is_known], minlength=len(categories)).tolist(),
            np.bincount(category[without_mask], minlength=len(categories)).tolist(),
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
    """Index of each number in an array of distinct numbers; -1 if it is not there."""
    if not len(among):
        return np.full(len(wanted), -1)
    order = np.argsort(among)
    places = order[np.minimum(np.searchsorted(among, wanted, sorter=order), len(among) - 1)]
    return np.where(among[places] == wanted, places, -1)


class _Links(NamedTuple):
    """What the annotations refer to: ids, and the places of their images and categories."""

    ids: np.ndarray
    places: np.ndarray
    categories: np.ndarray
    images: Columns

    def wrong(
        self, image_ids: array, category_ids: array, categories: Mapping[int, str]
    ) -> Iterator[_Note]:
        """Annotations with an id of an earlier one, or of no known image or category."""
        order = np.argsort(self.ids, kind="stable")
        is_repeated = self.ids[order][1:] == self.ids[order][:-1]
        for row in order[1:][is_repeated].tolist():
            text = f"annotation id {self.ids[row]} occurs more than once"
            yield _Note(row, _REPEATED, Fault("duplicate id", text))
        for row in np.flatnonzero(self.places < 0).tolist():
            text = f"{self.where(row)}: unknown image_id {image_ids[row]}"
            yield _Note(row, _IMAGE, Fault("annotation of an unknown image", text))
        known = listed(categories)
        for row in np.flatnonzero(self.categories < 0).tolist():
            text = f"{self.where(row)}: unknown category_id {category_ids[row]}"
            fault = Fault("unknown category", f"{text}; the categories are {known}")
            yield _Note(row, _CATEGORY, fault)

    def wrong_runs(self, read: Sequence[_RunLengths]) -> Iterator[_Note]:
        """Run lengths that are not those of a mask of the image's size."""
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
            yield _Note(row, _CONTENT, Fault("run lengths", text))

    def faults(self, notes: Iterable[_Note]) -> list[AnnotationFault]:
        """The faults in the order of the json.

        What is wrong inside an annotation is reported only where its image and category are known.
        """
        reported = []
        for row, order, fault in sorted(notes, key=lambda note: note[:2]):
            if order < _CONTENT:
                reported.append(AnnotationFault(fault))
            elif self.places[row] >= 0 and self.categories[row] >= 0:
                fault = fault._replace(message=f"{self.where(row)}: {fault.message}")
                reported.append(AnnotationFault(fault, int(self.categories[row])))
        return reported

    def where(self, row: int) -> str:
        """Name an annotation and its image, where there is one."""
        place = self.places[row]
        image = f" ({file_name(self.images, place)})" if place >= 0 else ""
        return f"annotation {self.ids[row]}{image}"
