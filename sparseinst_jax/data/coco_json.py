"""The rules of a COCO instance json: read its three lists, noting every fault.

The one place where it is decided what a json may hold. `load_coco` raises the fatal faults,
`check_data` tells them all.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparseinst_jax.data.annotation_filter import FILTERS, AnnotationFilter, read_box
from sparseinst_jax.data.faults import MISSING_IMAGE, Faults
from sparseinst_jax.data.records import Annotation, ImageRecord, Segmentation
from sparseinst_jax.files import read_json as read_any_json

MIN_POLYGON = 6  # numbers of a polygon with three corners
# pycocotools walks along a polygon's border: an object that far outside takes all memory.
MAX_COORDINATE = 1e6
MAX_FILES_SEEN = 100_000  # in the search for a file that is not where it should be
MAX_LETTERS = 8  # of one run length in compressed form, more than any image needs


def read_json(path: Path) -> dict[str, Any]:
    """Read a json and make sure that it has the lists of a COCO file.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is no json, or another kind of json.
    """
    content = read_any_json(
        path,
        "annotations file",
        "set config.data.train.annotations or config.data.val.annotations to a COCO instance json",
    )
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
        keys = sorted(map(str, content))
        got = f"it has the keys {', '.join(keys[:20])}" if keys else "it is an empty object, {}"
        raise ValueError(
            f"{path} is not a COCO annotation file: expected lists under 'images', 'annotations' "
            f"and 'categories', got no list under {' and '.join(map(repr, wrong))}; {got}. "
            f"{_cure(content)}"
        )
    return content


def _cure(content: Mapping[str, Any]) -> str:
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
        if _lacks(entry, ("id", "name"), "categories", index, faults):
            continue
        if entry["id"] in names:
            faults.add("duplicate id", f"category id {entry['id']} occurs more than once")
        names[entry["id"]] = str(entry["name"])
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


def read_images(
    entries: list, root: Path | None, faults: Faults, check_files: bool
) -> dict[int, ImageRecord]:
    """Read the images: id -> record, in the order of the json."""
    records: dict[int, ImageRecord] = {}
    # Joining strings, not Path objects: it is ten times faster over 10^5 images.
    prefix = None if root is None else str(root)
    is_first_missing = True
    for index, entry in enumerate(entries):
        if _lacks(entry, ("id", "file_name", "height", "width"), "images", index, faults):
            continue
        image_id, height, width = entry["id"], entry["height"], entry["width"]
        name = entry["file_name"]
        if image_id in records:
            other = records[image_id].file_name
            faults.add(
                "duplicate id", f"image id {image_id} occurs more than once: {other} and {name}"
            )
            continue
        if not (_is_positive(height) and _is_positive(width)):
            faults.add(
                "image size",
                f"image {image_id} ({name}): height {height!r} and width {width!r} must be > 0",
            )
            continue
        path = None if prefix is None else os.path.join(prefix, name)
        if check_files and path is not None and not os.path.isfile(path):
            hint = _where_else(root, name) if is_first_missing and root is not None else ""
            is_first_missing = False
            faults.add(MISSING_IMAGE, f"image {image_id}: the file {path} does not exist{hint}")
        records[image_id] = ImageRecord(image_id, name, path, int(height), int(width))
    if not entries:
        faults.add("empty list", "'images' is empty")
    return records


def _where_else(root: Path, name: str) -> str:
    """Say where below an image folder a missing file lies: mostly the wrong folder was given."""
    wanted = os.path.basename(name.replace("\\", "/"))
    seen = 0
    for folder, folders, files in os.walk(root):
        folders.sort()
        if wanted in files:
            return f", but {os.path.join(folder, wanted)} does: was another folder meant?"
        seen += len(files) + len(folders)
        if seen > MAX_FILES_SEEN:
            break
    return ""


def read_annotations(
    entries: list,
    records: dict[int, ImageRecord],
    label_of: Mapping[int, int | None],
    faults: Faults,
    kept: AnnotationFilter = FILTERS["detectron2"],
    keeps_boxes: bool = False,
) -> tuple[int, int, int]:
    """Append every annotation to its record.

    Args:
        entries: the json's list.
        records: image id -> record.
        label_of: category id -> label; None for a class that is left out.
        faults: is added to.
        kept: which objects are appended.
        keeps_boxes: whether they have boxes.

    Returns:
        the number of objects that had no usable polygon, of objects of classes left out, and of
        those that the filter left out.
    """
    seen: set[int] = set()
    without_mask = left_out = filtered = 0
    needs_box = keeps_boxes or kept is not FILTERS["detectron2"]
    keys = ("id", "image_id", "category_id", "segmentation")
    for index, entry in enumerate(entries):
        if _lacks(entry, keys, "annotations", index, faults):
            continue
        if entry["id"] in seen:
            faults.add("duplicate id", f"annotation id {entry['id']} occurs more than once")
        seen.add(entry["id"])
        record = records.get(entry["image_id"])
        if not _ids_are_known(entry, record, label_of, faults) or record is None:
            continue
        label = label_of[entry["category_id"]]
        if label is None:
            left_out += 1
            continue
        annotation = _read_annotation(entry, label, record, faults)
        if annotation is None:
            without_mask += _has_no_polygon(entry["segmentation"])
            continue
        if needs_box and not annotation.iscrowd:
            box = read_box(entry, annotation.segmentation)
            if not kept.keeps(entry, annotation._replace(box_xyxy=box), record):
                filtered += 1
                continue
            annotation = annotation._replace(box_xyxy=box if keeps_boxes else None)
        record.annotations.append(annotation)
    return without_mask, left_out, filtered


def _ids_are_known(
    entry: dict[str, Any],
    record: ImageRecord | None,
    label_of: Mapping[int, int | None],
    faults: Faults,
) -> bool:
    if record is None:
        faults.add(
            "annotation of an unknown image",
            f"annotation {entry['id']}: unknown image_id {entry['image_id']!r}",
        )
    if entry["category_id"] not in label_of:
        known = ", ".join(map(str, list(label_of)[:10])) + (", ..." if len(label_of) > 10 else "")
        faults.add(
            "unknown category",
            f"annotation {entry['id']}{_of(record)}: unknown category_id "
            f"{entry['category_id']!r}; the categories are {known}",
        )
        return False
    return record is not None


def _read_annotation(
    entry: dict[str, Any], label: int, record: ImageRecord, faults: Faults
) -> Annotation | None:
    where = f"annotation {entry['id']}{_of(record)}"
    area, iscrowd = entry.get("area") or 0, entry.get("iscrowd") or 0
    if not isinstance(area, int | float) or not math.isfinite(area):
        faults.add("area", f"{where}: area must be a number of px², got {area!r}")
        return None
    if iscrowd not in (0, 1):
        faults.add("iscrowd", f"{where}: iscrowd must be 0 or 1, got {iscrowd!r}")
        return None
    segmentation = _usable(entry["segmentation"], record, where, faults)
    if segmentation is None:
        return None
    return Annotation(label, segmentation, bool(iscrowd), float(area), entry["id"])


def _usable(
    segmentation: Any, record: ImageRecord, where: str, faults: Faults
) -> Segmentation | None:
    """The part of a segmentation that has a mask; None and a fault when nothing has."""
    if isinstance(segmentation, list):
        return _usable_polygons(segmentation, where, faults)
    if isinstance(segmentation, dict):
        return _usable_runs(segmentation, record, where, faults)
    kind = type(segmentation).__name__
    faults.add("segmentation", f"{where}: a {kind}, not polygons [[x, y, ...], ...] or run lengths")
    return None


def _usable_polygons(polygons: list, where: str, faults: Faults) -> Segmentation | None:
    if not all(isinstance(polygon, list) for polygon in polygons):
        faults.add("segmentation", f"{where}: not a list of polygons [[x, y, x, y, ...], ...]")
        return None
    usable = []
    for polygon in polygons:
        try:
            # Far faster than a look at each number: NaN and infinity survive a sum.
            is_finite = math.isfinite(sum(polygon))
        except (TypeError, OverflowError):
            faults.add("coordinates", f"{where}: a polygon's coordinates must be numbers")
            return None
        if not is_finite:
            faults.add("NaN or infinity", f"{where}: a coordinate is NaN or infinite")
            return None
        if len(polygon) < MIN_POLYGON or len(polygon) % 2:
            continue
        if max(polygon) > MAX_COORDINATE or min(polygon) < -MAX_COORDINATE:
            worst = max(polygon, key=abs)
            faults.add("coordinates", f"{where}: a polygon has the coordinate {worst:g} px")
            return None
        usable.append(polygon)
    if len(usable) < max(len(polygons), 1):
        _note_left_out(polygons, usable, where, faults)
    return usable or None


def _note_left_out(polygons: list, usable: list, where: str, faults: Faults) -> None:
    """Say which polygons are passed over, as detectron2 does."""
    odd = sum(len(polygon) % 2 for polygon in polygons)
    short = len(polygons) - len(usable) - odd
    what = [f"{short} with fewer than 3 points"] * bool(short)
    what += [f"{odd} with an odd number of coordinates"] * bool(odd)
    outcome = "these are left out" if usable else "the object is left out"
    faults.add(
        "polygon with fewer than 3 points" if short or not polygons else "odd polygon",
        f"{where}: {len(polygons)} polygons, {' and '.join(what) or 'not one'}; {outcome}",
        is_fatal=False,
    )


def _has_no_polygon(segmentation: Any) -> bool:
    return isinstance(segmentation, list) and not any(
        isinstance(polygon, list) and len(polygon) >= MIN_POLYGON and len(polygon) % 2 == 0
        for polygon in segmentation
    )


def _usable_runs(
    runs: dict, record: ImageRecord, where: str, faults: Faults
) -> Segmentation | None:
    size, counts = runs.get("size"), runs.get("counts")
    expected = [record.height, record.width]
    fault = None
    if not isinstance(size, list | tuple) or list(size) != expected:
        fault = f"run lengths of size {size}, image is {expected} (height, width)"
    elif isinstance(counts, str | bytes):
        total = compressed_length(counts)
        if total is None:
            fault = "compressed run lengths that cannot be decoded"
        elif total != record.height * record.width:
            fault = f"run lengths sum to {total}, not to height x width"
    elif not isinstance(counts, list):
        fault = "run lengths without counts"
    elif not all(type(count) is int and count >= 0 for count in counts):
        fault = "run lengths must be integers of 0 or more"
    elif sum(counts) != record.height * record.width:
        fault = f"run lengths sum to {sum(counts)}, not to height x width"
    if fault is None:
        return runs
    faults.add("run lengths", f"{where}: {fault}")
    return None


def compressed_length(counts: str | bytes) -> int | None:
    """Add up compressed run lengths; None where the text is none.

    pycocotools does not ask: it leaves pixels past the end of a short text as memory held them.

    Source: `rleFrString` of cocoapi's maskApi: five bits a letter from "0" on, the lowest first,
    the sixth bit says that more follow; from the fourth on each run is stored as the difference
    to the one two before.
    """
    raw = counts.encode() if isinstance(counts, str) else counts
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


def _lacks(entry: Any, keys: tuple[str, ...], what: str, index: int, faults: Faults) -> bool:
    """Note the keys that an entry lacks, and ids that are no integers."""
    what = f"{what}[{index}]"
    if not isinstance(entry, dict):
        faults.add("entry", f"{what}: expected an object, got {entry!r}"[:200])
        return True
    found = True
    for key in keys:
        value = entry.get(key)
        if value is None:
            hint = "; boxes alone cannot be learned from" if key == "segmentation" else ""
            faults.add("missing key", f"{what} (id {entry.get('id')}): no {key}{hint}")
            found = False
        elif key.endswith("id") and not isinstance(value, int):
            faults.add("id", f"{what}: {key} must be an integer, got {value!r}")
            found = False
        elif key == "file_name" and not isinstance(value, str):
            faults.add("file_name", f"{what}: file_name must be a text, got {value!r}")
            found = False
    return not found


def _of(record: ImageRecord | None) -> str:
    return "" if record is None else f" ({record.file_name})"


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value >= 1
