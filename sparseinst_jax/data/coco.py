"""Index a COCO instance json, and read its images.

Labels are 0 ... K-1 in the order of the sorted category ids, so any category ids will do; the names
come from the json. DatasetFaults of the file are collected and raised once.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from sparseinst_jax.data._index.cache import read_index
from sparseinst_jax.data._index.columns import CocoIndex
from sparseinst_jax.data._index.reader import refuse_missing_files
from sparseinst_jax.data.classes import Classes, choose_classes
from sparseinst_jax.data.ecosystems import DEFAULT_RULES, find_filter
from sparseinst_jax.data.faults import MISSING_IMAGE, DatasetFaults
from sparseinst_jax.data.file_search import FileNames
from sparseinst_jax.data.images import FolderRule, read_header, read_image, read_picture
from sparseinst_jax.data.records import (
    Annotation,
    CocoDataset,
    ImageRecord,
    IndexedRecords,
    StoredImages,
)
from sparseinst_jax.data.segmentations import Segmentation, decode_mask, encode_segmentation

__all__ = [
    "Annotation",
    "CocoDataset",
    "ImageRecord",
    "Segmentation",
    "decode_mask",
    "encode_segmentation",
    "index_coco",
    "load_coco",
    "read_image",
    "read_record",
    "read_record_picture",
    "size_fault",
]


class DatasetSelection(NamedTuple):
    """What is taken of a data set; see ``load_coco``."""

    classes: Sequence[str] = ()
    class_map: Sequence[str] = ()
    all_classes_known: bool = True
    annotation_filter: str = DEFAULT_RULES
    keeps_boxes: bool = False
    exclude_classes: Sequence[str] = ()


EVERYTHING = DatasetSelection()


def load_coco(
    annotations_path: str | os.PathLike,
    images_dir: str | os.PathLike | None,
    *,
    keep_empty: bool = True,
    check_files: bool = False,
    classes: Sequence[str] = (),
    class_map: Sequence[str] = (),
    all_classes_known: bool = True,
    annotation_filter: str = DEFAULT_RULES,
    keeps_boxes: bool = False,
) -> CocoDataset:
    """Index a COCO instance json.

    Args:
        annotations_path: the json; one without ``annotations`` (a test-dev list) is accepted.
        images_dir: folder that ``file_name`` is relative to; None when no image is read.
        keep_empty: keep images without objects (an image with crowd regions only is empty).
        check_files: also ask for every image file that the json names.
        classes: names to keep, all when empty; see ``classes.choose_classes``.
        class_map: texts ``old=new`` that merge or rename classes before that.
        all_classes_known: refuse a name in these two that the json does not have.
        annotation_filter: whose rules decide what is learned, a key of ``ecosystems.FILTERS``.
        keeps_boxes: keep the boxes of objects.

    Returns:
        the records in the order of the json.

    Raises:
        FileNotFoundError: the json or the folder does not exist.
        ValueError: the file is not COCO; lists every fault with its id.
    """
    selection = DatasetSelection(
        classes, class_map, all_classes_known, annotation_filter, keeps_boxes
    )
    dataset, faults = index_coco(annotations_path, images_dir, selection, check_files=check_files)
    faults.raise_if_fatal()
    return dataset if keep_empty else without_empty(dataset, annotation_filter)


def without_empty(dataset: CocoDataset, annotation_filter: str = DEFAULT_RULES) -> CocoDataset:
    """Leave out the images without objects, where the json has annotations, as a filter does.

    Raises:
        ValueError: no image is left.
    """
    if not dataset.has_annotations:
        return dataset
    has_targets = dataset.num_targets > 0
    if not has_targets.any():
        raise ValueError(
            f"nothing to learn: none of the {len(dataset.records)} images of "
            f"{dataset.annotations_path} has an object, expected at least one (crowd regions and "
            "objects without a mask do not count). Annotate some, or give another json by "
            "--config.data.train.annotations."
        )
    if find_filter(annotation_filter).keeps_annotated:
        has_targets = dataset.records.num_annotations > 0
    dataset.records.choose(has_targets)
    return dataset


def index_coco(
    annotations_path: str | os.PathLike,
    images_dir: str | os.PathLike | None,
    selection: DatasetSelection = EVERYTHING,
    *,
    check_files: bool = False,
) -> tuple[CocoDataset, DatasetFaults]:
    """Index the valid part of a COCO json and collect the faults of the rest; see ``load_coco``.

    Raises:
        FileNotFoundError: the json or the folder does not exist.
        ValueError: the file is no COCO json at all, or the classes cannot be chosen.
    """
    find_filter(selection.annotation_filter)  # refuse a wrong name before the json is read
    path = Path(annotations_path)
    root = None if images_dir is None else Path(images_dir)
    refuse_missing_files(path, root)
    dataset, faults = make_dataset(
        read_index(path), str(path), None if root is None else str(root), selection
    )
    if check_files and root is not None:
        note_missing(dataset, root, faults)
    return dataset, faults


def make_dataset(
    index: CocoIndex, name: str, images: str | StoredImages | None, selection: DatasetSelection
) -> tuple[CocoDataset, DatasetFaults]:
    """Make the data set of an index, and the faults that matter for the chosen classes.

    Args:
        index: of a json.
        name: what messages call it: its path.
        images: the folder that file names are relative to, or where images come from.
        selection: what is taken of it.

    Raises:
        ValueError: the classes cannot be chosen.
    """
    faults = DatasetFaults(Path(name))
    of_categories, of_images, of_annotations = index.faults
    faults.found += of_categories
    _note_equal_names(index.categories, selection.class_map, faults)
    chosen = choose_classes(
        index.categories,
        selection.classes,
        selection.class_map,
        selection.exclude_classes,
        all_known=selection.all_classes_known,
        path=name,
    )
    label_of = _labels(index.categories, chosen)
    # What is wrong with an object of a class that is left out does no harm.
    faults.found += of_images + [
        fault for fault, category in of_annotations if category < 0 or label_of[category] >= 0
    ]
    records = _records(index, images, label_of, selection)
    return CocoDataset(
        records,
        chosen.names,
        chosen.category_ids,
        index.has_annotations,
        name,
        int(np.array(index.num_without_mask, np.int64)[label_of >= 0].sum()),
        chosen if any(selection[:2]) or selection.exclude_classes else None,
        int(np.array(index.num_objects, np.int64)[label_of < 0].sum()),
        records.num_filtered,
    ), faults


def _note_equal_names(
    names: Mapping[int, str], class_map: Sequence[str], faults: DatasetFaults
) -> None:
    """Note categories (id -> name) of one name, by which classes are matched.

    Those that the class map names are merged on purpose.
    """
    mapped = {part.strip() for entry in class_map for part in str(entry).split("=")}
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


def _labels(categories: dict[int, str], chosen: Classes) -> np.ndarray:
    """Label of every category of the json, in their order; -1 where its class is left out."""
    label_of: dict[int | None, int] = {i: label for label, i in enumerate(chosen.category_ids)}
    return np.array([label_of.get(chosen.kept_id[i], -1) for i in categories], np.int64)


def _records(
    index: CocoIndex,
    images: str | StoredImages | None,
    label_of: np.ndarray,
    selection: DatasetSelection,
) -> IndexedRecords:
    """The records of an index as the filter leaves them."""
    kept = find_filter(selection.annotation_filter)
    columns = index.columns
    is_kept = None
    if kept.keeps is not None:
        # Crowd regions are no objects: they pass.
        is_kept = kept.keeps(columns) | (columns["is_crowd"] != 0)
    records = IndexedRecords(
        columns, index.folder, images, label_of, is_kept, selection.keeps_boxes
    )
    if kept.smallest_side:
        records.choose(np.all(records.image_sizes >= kept.smallest_side, axis=1))
    return records


def note_missing(dataset: CocoDataset, root: Path, faults: DatasetFaults) -> None:
    """Note every image file that does not exist, or that may not be opened.

    Where none exists the folder is a wrong one: that is one fault, not thousands.
    """
    names, rule = FileNames(root), FolderRule(str(root))
    missing = []
    files = [(i, name, path) for i, (name, path) in enumerate(dataset.files) if path is not None]
    for place, name, path in files:
        is_there, fault = rule.state(path)
        if not is_there:
            missing.append((dataset.records[place].image_id, name, path))
        elif fault is not None:
            faults.add("file_name", fault)
    if len(missing) == len(files) > 1:
        _, name, path = missing[0]
        inside = len(names.paths)
        faults.add(
            MISSING_IMAGE,
            f"none of the {len(files)} image files is in {root}, which holds {inside} file(s): "
            f"{path} does not exist{names.hint(name)}",
        )
        return
    for image_id, name, path in missing:
        hint = names.hint(name)
        faults.add(MISSING_IMAGE, f"image {image_id}: the file {path} does not exist{hint}")


def read_record(record: ImageRecord) -> np.ndarray:
    """Read the image of a record and check its size against the json, uint8 [h, w, 3]."""
    return np.array(read_record_picture(record))


def read_record_picture(record: ImageRecord) -> Image.Image:
    """Read the image of a record as Pillow's, RGB, and check its size against the json."""
    if not record.has_image:
        raise ValueError(f"image {record.image_id} ({record.file_name}): no image folder was given")
    try:
        image = read_picture(record.open(), record.source)
    except ValueError as error:
        raise ValueError(f"{error}. `sparseinst check-data` finds all such images") from error
    if (image.height, image.width) != (record.height, record.width):
        raise ValueError(size_fault(record, image.height, image.width))
    return image


def size_fault(record: ImageRecord, height: int, width: int) -> str:
    """A message that an upright image does not have the json's size, and what to do about it."""
    expected = (record.height, record.width)
    header = read_header(record.open(), record.source)
    message = (
        f"image {record.source} is {(height, width)} (height, width), the json says {expected}"
    )
    if header.stored_size == expected and header.orientation > 1:
        return (
            f"{message}: that is its size without its EXIF orientation ({header.orientation}). "
            "Images are used upright, as they are shown: if the annotations fit the upright image, "
            "exchange height and width in the json; if they fit the image as it is stored, save it "
            "without EXIF data"
        )
    if expected == (width, height):
        return f"{message}: height and width are exchanged; correct the json"
    return f"{message}; correct the json, or give the images that were annotated"
