"""The rules of a COCO instance json: what it must hold, its categories and its images.

Those of its annotations are in `annotation_reader`. `load_coco` raises the fatal faults,
`check_data` tells them all.
"""

import math
from array import array
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sparseinst_jax.data.annotations.columns import Columns, decode_name, encode_name
from sparseinst_jax.data.annotations.faults import Faults
from sparseinst_jax.data.annotations.json_stream import JsonError, read_object
from sparseinst_jax.data.images.decoding import MAX_PIXELS
from sparseinst_jax.data.images.paths import name_fault
from sparseinst_jax.runtime.files import broken_json, check_json_file
from sparseinst_jax.runtime.messages import brief, class_name_fault, printable

WHAT = "annotations file"
CURE = "set config.data.train.annotations or config.data.val.annotations to a COCO instance json"
LISTS = ("images", "annotations", "categories")
MAX_INTEGER = 2**63 - 1  # of ids, which are kept as 64-bit numbers
MAX_SIDE = 2**31 - 1  # of an image in pixels; height times width stays a 64-bit number
_IMAGE_KEYS = ("id", "file_name", "height", "width")


def read_lists(path: Path, file: BinaryIO) -> Iterator[tuple[str, Any]]:
    """Read the keys and values of a COCO json; `images` and `annotations` come element by element.

    Other sections come as they are, and may be passed over.

    Args:
        path: for messages.
        file: the same, open at its beginning.

    Raises:
        ValueError: it is no json, or another kind of json.
    """
    content: dict[str, Any] = {}  # without the elements of the two long lists
    try:
        for key, value in read_object(file, ("images", "annotations")):
            if not key and not isinstance(value, dict):
                content = value
                break
            is_list = isinstance(value, list | Iterator)
            content[key] = value if key not in LISTS else [] if is_list else None
            if key not in LISTS or is_list:
                yield key, _elements(path, value) if isinstance(value, Iterator) else value
    except JsonError as error:
        raise _broken(path, error) from error
    _refuse_other_kinds(path, content)


def _elements(path: Path, elements: Iterator[Any]) -> Iterator[Any]:
    """The elements of a list; what is wrong between them names the file."""
    try:
        yield from elements
    except JsonError as error:
        raise _broken(path, error) from error


def _broken(path: Path, error: JsonError) -> ValueError:
    place = f"line {error.line}, column {error.column}" if error.line else ""
    return ValueError(broken_json(path, WHAT, CURE, error.reason, place, error.is_cut))


def refuse_no_file(path: Path) -> None:
    """Refuse a path that is no file, or an empty one.

    Raises:
        FileNotFoundError, ValueError: say what it is.
    """
    check_json_file(path, WHAT, CURE)
    with open(path, "rb") as file:
        if not file.read(1 << 16).strip() and not path.stat().st_size > 1 << 16:
            size = path.stat().st_size
            raise ValueError(f"{WHAT} {path} is empty ({size} bytes); {CURE}")


def refuse_no_folder(root: Path | None, path: Path) -> None:
    """Refuse an image folder that does not exist; `path` is the json."""
    if root is not None and not root.is_dir():
        raise FileNotFoundError(
            f"image folder {root} does not exist (asked for by the annotations {path}); set "
            "config.data.train.images or config.data.val.images to the folder of the images"
        )


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
        got = f"it has the keys {', '.join(keys[:20])}" if keys else "it is an empty object, {}"
        raise ValueError(
            f"{path} is not a COCO annotation file: expected lists under 'images', 'annotations' "
            f"and 'categories', got no list under {' and '.join(map(repr, wrong))}; {got}. "
            f"{_cure(content)}"
        )


def _cure(content: Collection[str]) -> str:
    """Say how to get a COCO json from what was given."""
    if "shapes" in content and "imagePath" in content:
        return "It is LabelMe's: `sparseinst import-data labelme FOLDER --output train.json`."
    if any(str(key).startswith("_via_") for key in content):
        return "It is VIA's: `sparseinst import-data via FILE --output train.json`."
    return "Export it as COCO instances, or convert it: `sparseinst import-data --help`."


def read_categories(entries: list, faults: Faults) -> dict[int, str]:
    """Read the categories: id -> name, in the order of the ids."""
    names: dict[int, str] = {}
    for index, entry in enumerate(entries):
        if lacks(entry, ("id", "name"), "categories", index, faults):
            continue
        if entry["id"] in names:
            faults.add("duplicate id", f"category id {entry['id']} occurs more than once")
        fault = class_name_fault(entry["name"])
        if fault is not None:
            faults.add("class name", f"category {entry['id']}: {fault}")
        # What is told of it later is not to hold what is wrong with it.
        names[entry["id"]] = str(entry["name"]) if fault is None else f"category {entry['id']}"
    if not entries:
        faults.add("empty list", "'categories' is empty: no class to learn")
    return {category_id: names[category_id] for category_id in sorted(names)}


def refuse_equal_names(names: Mapping[int, str], mapped: set[str], faults: Faults) -> None:
    """Note categories of one name: classes are matched by it.

    Args:
        names: id -> name.
        mapped: names that config.data.class_map speaks of; these are merged on purpose.
        faults: is added to.
    """
    ids_of: dict[str, list[int]] = {}
    for category_id, name in names.items():
        ids_of.setdefault(name, []).append(category_id)
    for name, ids in ids_of.items():
        if len(ids) > 1 and name not in mapped:
            faults.add(
                "categories of one name",
                f"the categories {', '.join(map(str, ids))} are all called {name!r}; rename them, "
                f"or merge them: --config.data.class_map='(\"{name}={name}\",)'",
            )


class ImageReader:
    """Reads the images into columns, in the order of the json."""

    def __init__(self, faults: Faults) -> None:
        self.faults = faults
        self._number = 0  # of entries, also of those left out
        self._place_of: dict[int, int] = {}
        self._ids, self._heights, self._widths = array("q"), array("q"), array("q")
        self._names, self._name_ends = bytearray(), array("q", [0])

    def add(self, entry: Any) -> None:
        """Read one element of the list."""
        index, self._number = self._number, self._number + 1
        if lacks(entry, _IMAGE_KEYS, "images", index, self.faults):
            return
        image_id, height, width = entry["id"], entry["height"], entry["width"]
        name = entry["file_name"]
        if image_id in self._place_of:
            other = self._name(self._place_of[image_id])
            self.faults.add(
                "duplicate id",
                f"image id {image_id} occurs more than once: {other} and {brief(name)[1:-1]}",
            )
            return
        if (fault := name_fault(name)) is not None:
            self.faults.add("file_name", f"image {image_id}: {fault}")
            return
        if not (_is_side(height) and _is_side(width)):
            self.faults.add(
                "image size",
                f"image {image_id} ({name}): height {brief(height)} and width {brief(width)} must "
                "be > 0" + f" and at most {MAX_SIDE}" * (_is_vast(height) or _is_vast(width)),
            )
            return
        if int(height) * int(width) > MAX_PIXELS:
            self.faults.add(
                "image size",
                f"image {image_id} ({name}): {brief(height)} x {brief(width)} (height x width) are "
                f"more than {MAX_PIXELS} pixels: such images are not read; cut it into parts",
            )
            return
        self._place_of[image_id] = len(self._ids)
        self._ids.append(image_id)
        self._heights.append(int(height))
        self._widths.append(int(width))
        self._names += encode_name(name)
        self._name_ends.append(len(self._names))

    def _name(self, place: int) -> str:
        return decode_name(self._names[self._name_ends[place] : self._name_ends[place + 1]])

    def finish(self) -> Columns:
        """The columns of images."""
        if not self._number:
            self.faults.add("empty list", "'images' is empty")
        return {
            "image_ids": np.asarray(self._ids, np.int64),
            "heights": np.asarray(self._heights, np.int64),
            "widths": np.asarray(self._widths, np.int64),
            "name_ends": np.asarray(self._name_ends, np.int64),
            "names": np.frombuffer(bytes(self._names), np.uint8),
        }


def lacks(entry: Any, keys: tuple[str, ...], what: str, index: int, faults: Faults) -> bool:
    """Note the keys that an entry lacks, and ids that are no integers."""
    what = f"{what}[{index}]"
    if not isinstance(entry, dict):
        faults.add("entry", f"{what}: expected an object, got {brief(entry)}")
        return True
    found = True
    for key in keys:
        value = entry.get(key)
        if value is None:
            hint = "; boxes alone cannot be learned from" if key == "segmentation" else ""
            faults.add("missing key", f"{what} (id {brief(entry.get('id'))}): no {key}{hint}")
            found = False
        elif key.endswith("id") and type(value) is not int:  # True is an int
            faults.add("id", f"{what}: {key} must be an integer, got {brief(value)}")
            found = False
        elif key.endswith("id") and abs(value) > MAX_INTEGER:
            faults.add("id", f"{what}: {key} must be at most {MAX_INTEGER}, got {brief(value)}")
            found = False
        elif key == "file_name" and not isinstance(value, str):
            faults.add("file_name", f"{what}: file_name must be a text, got {brief(value)}")
            found = False
    return not found


def _is_side(value: Any) -> bool:
    return type(value) in (int, float) and 1 <= value <= MAX_SIDE  # NaN is neither


def _is_vast(value: Any) -> bool:
    return type(value) in (int, float) and MAX_SIDE < value < math.inf
