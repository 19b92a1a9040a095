"""Index a COCO instance json, read its masks and images.

Labels are 0 ... K-1 in the order of the sorted category ids, so any category ids will do; the names
come from the json. Faults of the file are collected and raised once.
"""

import gc
import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as rle

from sparseinst_jax.data.images import read_image

MAX_FAULTS_SHOWN = 20
Segmentation = list | dict


class Annotation(NamedTuple):
    """One object: ``label`` in 0 ... K-1, ``area`` in px², ``id`` the json's own."""

    label: int
    segmentation: Segmentation
    iscrowd: bool
    area: float
    id: int


@dataclass(slots=True)
class ImageRecord:
    """One image of the json; ``path`` is None when no image folder was given."""

    image_id: int
    file_name: str
    path: str | None
    height: int
    width: int
    annotations: list[Annotation] = field(default_factory=list)

    @property
    def targets(self) -> list[Annotation]:
        """The objects that training learns from: all but the crowd regions."""
        return [annotation for annotation in self.annotations if not annotation.iscrowd]


@dataclass(slots=True)
class CocoDataset:
    """The records of a COCO json, in its order.

    ``category_ids[label]`` is the json's id of a label. ``num_without_mask`` counts the objects
    that were left out because no polygon of theirs has three corners (as detectron2 does).
    """

    records: list[ImageRecord]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    has_annotations: bool
    annotations_path: str
    num_without_mask: int = 0

    @property
    def num_targets(self) -> np.ndarray:
        """Number of objects without crowd, int64 [images]."""
        return np.array([len(record.targets) for record in self.records], np.int64)

    @property
    def image_sizes(self) -> np.ndarray:
        """(height, width) in pixels, int64 [images, 2]."""
        return np.array([(r.height, r.width) for r in self.records], np.int64).reshape(-1, 2)


class _Faults:
    """Collect what is wrong with a file and raise it once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[str] = []

    def add(self, line: str) -> None:
        self.lines.append(line)

    def raise_if_any(self) -> None:
        if not self.lines:
            return
        shown = "\n  ".join(self.lines[:MAX_FAULTS_SHOWN])
        rest = len(self.lines) - MAX_FAULTS_SHOWN
        more = f"\n  ... and {rest} more" if rest > 0 else ""
        raise ValueError(
            f"{self.path}: {len(self.lines)} fault(s) in a file read as COCO instances:\n"
            f"  {shown}{more}\nCorrect the file (its form: https://cocodataset.org/#format-data)."
        )


def load_coco(
    annotations_path: str | os.PathLike,
    images_dir: str | os.PathLike | None,
    *,
    keep_empty: bool = True,
    check_files: bool = False,
) -> CocoDataset:
    """Index a COCO instance json.

    Args:
        annotations_path: the json; one without ``annotations`` (a test-dev list) is accepted.
        images_dir: folder that ``file_name`` is relative to; None when no image is read.
        keep_empty: keep images without objects (an image with crowd regions only is empty).
        check_files: also ask for every image file that the json names.

    Returns:
        the records in the order of the json.

    Raises:
        FileNotFoundError: the json or the folder does not exist.
        ValueError: the file is not COCO; lists every fault with its id.
    """
    collects = gc.isenabled()
    # Millions of small objects are made and none becomes garbage: looking for it in between takes
    # as long as all the rest.
    gc.disable()
    try:
        return _index(Path(annotations_path), images_dir, keep_empty, check_files)
    finally:
        if collects:
            gc.enable()


def _index(
    path: Path, images_dir: str | os.PathLike | None, keep_empty: bool, check_files: bool
) -> CocoDataset:
    content = _read_json(path)
    root = None if images_dir is None else Path(images_dir)
    if root is not None and not root.is_dir():
        raise FileNotFoundError(
            f"image folder {root} does not exist (asked for by the annotations {path}); set "
            "config.data.train.images or config.data.val.images to the folder of the images"
        )
    faults = _Faults(path)
    class_names, category_ids = _read_categories(content["categories"], faults)
    records = _read_images(content["images"], root, faults, check_files)
    has_annotations = "annotations" in content
    dropped = 0
    if has_annotations:
        label_of = {category_id: label for label, category_id in enumerate(category_ids)}
        dropped = _read_annotations(content["annotations"], records, label_of, faults)
    faults.raise_if_any()
    kept = list(records.values())
    if has_annotations and not keep_empty:
        kept = [record for record in kept if record.targets]
        if not kept:
            raise ValueError(
                f"{path}: none of the {len(records)} images has an object to learn from (crowd "
                "regions do not count); annotate some or set config.data.keep_empty=True"
            )
    return CocoDataset(kept, class_names, category_ids, has_annotations, str(path), dropped)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"annotations file {path} does not exist; set config.data.train.annotations or "
            "config.data.val.annotations to a COCO instance json"
        )
    try:
        with path.open("rb") as file:
            content = json.load(file)
    except ValueError as error:
        raise ValueError(f"{path} is not a json file: {error}; give a COCO json") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: a COCO annotation file is an object with 'images' and 'categories', got a "
            f"{type(content).__name__} (a list is a results file); give the annotation json"
        )
    wrong = [key for key in ("images", "categories") if not isinstance(content.get(key), list)]
    if "annotations" in content and not isinstance(content["annotations"], list):
        wrong.append("annotations")
    if wrong:
        raise ValueError(
            f"{path} is not a COCO annotation file: no list under {wrong}, its keys are "
            f"{sorted(map(str, content))[:20]}; expected images, categories and annotations"
        )
    return content


def _lacks(entry: Any, keys: tuple[str, ...], what: str, index: int, faults: _Faults) -> bool:
    """Note the keys that an entry lacks, and ids that are no integers."""
    what = f"{what}[{index}]"
    if not isinstance(entry, dict):
        faults.add(f"{what}: expected an object, got {entry!r}"[:200])
        return True
    found = True
    for key in keys:
        value = entry.get(key)
        if value is None:
            faults.add(f"{what} (id {entry.get('id')}): no {key}")
            found = False
        elif key.endswith("id") and not isinstance(value, int):
            faults.add(f"{what}: {key} must be an integer, got {value!r}")
            found = False
        elif key == "file_name" and not isinstance(value, str):
            faults.add(f"{what}: file_name must be a text, got {value!r}")
            found = False
    return not found


def _read_categories(entries: list, faults: _Faults) -> tuple[tuple[str, ...], tuple[int, ...]]:
    names: dict[int, str] = {}
    for index, entry in enumerate(entries):
        if _lacks(entry, ("id", "name"), "categories", index, faults):
            continue
        if entry["id"] in names:
            faults.add(f"category id {entry['id']} occurs more than once")
        names[entry["id"]] = str(entry["name"])
    if not entries:
        faults.add("'categories' is empty: no class to learn")
    ids = sorted(names)
    return tuple(names[i] for i in ids), tuple(ids)


def _read_images(
    entries: list, root: Path | None, faults: _Faults, check_files: bool
) -> dict[int, ImageRecord]:
    records: dict[int, ImageRecord] = {}
    # Joining strings, not Path objects: it is ten times faster over 10^5 images.
    prefix = None if root is None else str(root)
    for index, entry in enumerate(entries):
        if _lacks(entry, ("id", "file_name", "height", "width"), "images", index, faults):
            continue
        image_id, height, width = entry["id"], entry["height"], entry["width"]
        if image_id in records:
            faults.add(f"image id {image_id} occurs more than once")
            continue
        if not (_is_positive(height) and _is_positive(width)):
            faults.add(f"image {image_id}: height {height!r} and width {width!r} must be > 0")
            continue
        path = None if prefix is None else os.path.join(prefix, entry["file_name"])
        if check_files and path is not None and not os.path.isfile(path):
            faults.add(f"image {image_id}: the file {path} does not exist")
        records[image_id] = ImageRecord(image_id, entry["file_name"], path, int(height), int(width))
    if not entries:
        faults.add("'images' is empty")
    return records


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and value >= 1


def _read_annotations(
    entries: list, records: dict[int, ImageRecord], label_of: dict[int, int], faults: _Faults
) -> int:
    """Append every annotation to its record; returns how many had no usable polygon."""
    seen: set[int] = set()
    dropped = 0
    keys = ("id", "image_id", "category_id", "segmentation")
    for index, entry in enumerate(entries):
        if _lacks(entry, keys, "annotations", index, faults):
            continue
        annotation_id = entry["id"]
        if annotation_id in seen:
            faults.add(f"annotation id {annotation_id} occurs more than once")
        seen.add(annotation_id)
        record = records.get(entry["image_id"])
        label = label_of.get(entry["category_id"])
        if record is None:
            faults.add(f"annotation {annotation_id}: unknown image_id {entry['image_id']!r}")
        if label is None:
            faults.add(f"annotation {annotation_id}: unknown category_id {entry['category_id']!r}")
        if record is None or label is None:
            continue
        segmentation, fault = _checked_segmentation(entry["segmentation"], record)
        if fault:
            faults.add(f"annotation {annotation_id}: {fault}")
        elif segmentation is None:
            dropped += 1
        else:
            record.annotations.append(
                Annotation(
                    label,
                    segmentation,
                    bool(entry.get("iscrowd", 0)),
                    float(entry.get("area") or 0),
                    annotation_id,
                )
            )
    return dropped


def _checked_segmentation(
    segmentation: Any, record: ImageRecord
) -> tuple[Segmentation | None, str | None]:
    """The usable part of a segmentation (None when nothing is), or what is wrong with it."""
    if isinstance(segmentation, list):
        if not all(isinstance(polygon, list) for polygon in segmentation):
            return None, "segmentation is not a list of polygons [[x, y, x, y, ...], ...]"
        polygons = [p for p in segmentation if len(p) % 2 == 0 and len(p) >= 6]
        return (polygons or None), None
    if isinstance(segmentation, dict):
        size, counts = segmentation.get("size"), segmentation.get("counts")
        if list(size or ()) != [record.height, record.width]:
            return None, f"run lengths of size {size}, image is {[record.height, record.width]}"
        if isinstance(counts, str | bytes):
            return segmentation, None
        if not isinstance(counts, list):
            return None, "run lengths without counts"
        if sum(counts) != record.height * record.width:
            return None, f"run lengths sum to {sum(counts)}, not to height x width"
        return segmentation, None
    return None, f"segmentation is a {type(segmentation).__name__}, not polygons or run lengths"


def encode_segmentation(segmentation: Segmentation, height: int, width: int) -> dict[str, Any]:
    """Compressed run lengths of polygons (any part may lie outside) or of any run lengths."""
    if isinstance(segmentation, list):
        return rle.merge(rle.frPyObjects(segmentation, height, width))
    if list(segmentation["size"]) != [height, width]:
        raise ValueError(
            f"run lengths of size {segmentation['size']} for an image of {[height, width]}; "
            "they must be equal"
        )
    if isinstance(segmentation["counts"], list):
        return rle.frPyObjects(segmentation, height, width)
    counts = segmentation["counts"]
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


def read_record(record: ImageRecord) -> np.ndarray:
    """Read the image of a record and check its size against the json, uint8 [h, w, 3]."""
    if record.path is None:
        raise ValueError(f"image {record.image_id} ({record.file_name}): no image folder was given")
    image = read_image(record.path)
    if image.shape[:2] != (record.height, record.width):
        raise ValueError(
            f"image {record.path} is {image.shape[:2]} (height, width; EXIF orientation applied), "
            f"the json says {(record.height, record.width)}; correct the json or save the image "
            "upright"
        )
    return image


def summarize(dataset: CocoDataset, num_masks: int) -> list[str]:
    """Lines that say what will be trained on, warnings marked by ``WARNING``.

    Args:
        dataset: the index.
        num_masks: masks the model predicts for an image.
    """
    counts = dataset.num_targets
    total = int(counts.sum())
    crowd = sum(len(record.annotations) for record in dataset.records) - total
    lines = [
        f"{dataset.annotations_path}: {len(dataset.records)} images, {total} objects, "
        f"{len(dataset.class_names)} classes"
    ]
    if not dataset.has_annotations:
        return [*lines, "no annotations: the file can be predicted, not trained on or scored"]
    per_class = Counter(a.label for record in dataset.records for a in record.targets)
    shown = [f"{name} {per_class[label]}" for label, name in enumerate(dataset.class_names)]
    extra = f", ... {len(shown) - 20} more" if len(shown) > 20 else ""
    lines.append("objects per class: " + ", ".join(shown[:20]) + extra)
    lines.append(
        f"objects per image: mean {counts.mean():.1f}, most {counts.max()}, "
        f"images without objects {int((counts == 0).sum())}, crowd regions left out {crowd}"
    )
    if dataset.num_without_mask:
        lines.append(
            f"WARNING: {dataset.num_without_mask} objects have no polygon of three corners or more "
            "and are left out"
        )
    unseen = [n for label, n in enumerate(dataset.class_names) if not per_class[label]]
    if unseen:
        lines.append(f"WARNING: {len(unseen)} classes have no object: {', '.join(unseen[:10])}")
    crowded = np.flatnonzero(counts > num_masks)
    if len(crowded):
        worst = dataset.records[int(counts.argmax())]
        lines.append(
            f"WARNING: {len(crowded)} images have more objects than the model has masks "
            f"({num_masks}), {worst.file_name} has {counts.max()}: the best {num_masks} are "
            "matched, the others are not learnt; raise config.model.num_masks"
        )
    return lines
