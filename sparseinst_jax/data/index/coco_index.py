"""What a COCO json says, whatever classes are chosen of it and wherever its images are."""

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sparseinst_jax.data.annotations import coco_json, columns
from sparseinst_jax.data.annotations.annotation_reader import AnnotationFault, AnnotationReader
from sparseinst_jax.data.annotations.columns import Columns
from sparseinst_jax.data.annotations.faults import Fault, Faults


class CocoIndex(NamedTuple):
    """The index of a json.

    Attributes:
        columns: see ``annotations.columns``.
        folder: of their files; None where they are in memory.
        categories: id -> name, in the order of the ids.
        has_annotations: whether the json has a list of them.
        faults: of the categories; of the images; of the annotations.
        num_objects: of each category, also those that are left out for a fault.
        num_without_mask: of each category, objects that had no usable polygon.
    """

    columns: Columns
    folder: str | None
    categories: dict[int, str]
    has_annotations: bool
    faults: tuple[list[Fault], list[Fault], list[AnnotationFault]]
    num_objects: Sequence[int]
    num_without_mask: Sequence[int]


def build_index(path: Path, file: BinaryIO, folder: Path | None) -> CocoIndex:
    """Read a json into columns.

    Args:
        path: for messages.
        file: the json, open at its beginning.
        folder: where the columns become files, empty; None keeps them in memory.

    Raises:
        ValueError: it is no json, or another kind of json.
    """
    collects = gc.isenabled()
    # Every element is dropped before the next is read, without a cycle: looking for one in between
    # takes as long as all the rest.
    gc.disable()
    try:
        index = _read(path, file, folder)
    finally:
        if collects:
            gc.enable()
    if folder is not None:
        save_index(index, folder)
    return index


def save_index(index: CocoIndex, folder: Path) -> None:
    """Write an index to a folder; columns that have their file there already stay."""
    columns.save(index.columns, _describe(index), folder)


def open_index(folder: Path) -> CocoIndex:
    """Map an index that was built into a folder.

    Raises:
        ValueError, KeyError, TypeError, OSError: it is damaged, or of another format.
    """
    opened, description = columns.load(folder)
    categories, images, annotations = description["faults"]
    return CocoIndex(
        opened,
        str(folder),
        {int(number): str(name) for number, name in description["categories"]},
        bool(description["has_annotations"]),
        (
            [Fault(*fault) for fault in categories],
            [Fault(*fault) for fault in images],
            [AnnotationFault(Fault(*fault), category) for fault, category in annotations],
        ),
        [int(number) for number in description["num_objects"]],
        [int(number) for number in description["num_without_mask"]],
    )


def _describe(index: CocoIndex) -> dict[str, Any]:
    """What is not in columns, as `open_index` reads it."""
    return {
        "categories": list(index.categories.items()),
        "has_annotations": index.has_annotations,
        "faults": index.faults,
        "num_objects": index.num_objects,
        "num_without_mask": index.num_without_mask,
    }


def _read(path: Path, file: BinaryIO, folder: Path | None) -> CocoIndex:
    of_categories, of_images = Faults(path), Faults(path)
    categories: Mapping[int, str] = {}
    images, annotations = coco_json.ImageReader(of_images), AnnotationReader(folder)
    has_annotations = False
    for key, value in coco_json.read_lists(path, file):
        # Of a key that occurs twice the last one counts, as with Python's own parser.
        if key == "categories":
            of_categories = Faults(path)
            categories = coco_json.read_categories(value, of_categories)
        elif key == "images":
            of_images = Faults(path)
            images = coco_json.ImageReader(of_images)
            for entry in value:
                images.add(entry)
        elif key == "annotations":
            annotations, has_annotations = AnnotationReader(folder), True
            for entry in value:
                annotations.add(entry)
    image_columns = images.finish()
    read = annotations.finish(image_columns, categories)
    return CocoIndex(
        {**image_columns, **read.columns},
        None if folder is None else str(folder),
        dict(categories),
        has_annotations,
        (list(of_categories), list(of_images), read.faults),
        read.num_objects,
        read.num_without_mask,
    )
