"""The index of a json: plain columns of numbers, in memory or in files that are mapped.

Files are opened where they lie: a second start reads nothing it does not use, and every process
that opens them shares one copy in memory. A file holds the bytes of one column and nothing else;
there is nothing in it that could be run.
"""

import itertools
import json
import os
import zlib
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as rle

from sparseinst_jax.data.faults import Fault
from sparseinst_jax.data.segmentations import BoxXYXY, Segmentation, encode_segmentation

FORMAT = 1  # changes with every change of what is stored
DESCRIPTION = "index.json"
WRITE_ABOVE = 1 << 18  # numbers of a growing column that wait in memory

# Of an annotation's mask: parts of `polygon_ends`, numbers of `runs`, characters of `letters`.
POLYGONS, RUNS, LETTERS = 0, 1, 2

DTYPES: Mapping[str, str] = {
    # of each image
    "image_ids": "<i8",
    "heights": "<i8",
    "widths": "<i8",
    "name_ends": "<i8",  # [images + 1], in `names`
    "annotation_ends": "<i8",  # [images + 1], in the columns of annotations
    # of each annotation, those of an image together, in the order of the json
    "annotation_ids": "<i8",
    "categories": "<i4",  # place among the json's categories, sorted by id
    "is_crowd": "|u1",
    "areas": "<f8",  # px², NaN where the json does not give one
    "boxes": "<f8",  # [annotations * 4] x, y, width, height in pixels, NaN where there is none
    "is_ignored": "|u1",  # the json's key "ignore"
    "kinds": "|u1",
    "first_parts": "<i8",
    "num_parts": "<i8",
    # of masks
    "polygon_ends": "<i8",  # [polygons + 1], in `coordinates`
    "coordinates": "<f8",
    "runs": "<i8",
    "letters": "|u1",
    # of file names
    "names": "|u1",
}
_TYPECODES = {"<i8": "q", "<f8": "d", "|u1": "B"}
Columns = dict[str, np.ndarray]


class AnnotationFault(NamedTuple):
    """A fault that counts only if the category at this place is used; with -1 it always counts."""

    fault: Fault
    category: int = -1


class CocoIndex(NamedTuple):
    """The content of a COCO json, before classes are chosen and images are looked for."""

    columns: Columns  # those of DTYPES
    folder: str | None  # of their files; None where they are in memory
    categories: dict[int, str]  # id -> name, in the order of the ids
    has_annotations: bool  # whether the json has a list of them
    # of the categories; of the images; of the annotations
    faults: tuple[list[Fault], list[Fault], list[AnnotationFault]]
    num_objects: Sequence[int]  # of each category, also those that are left out for a fault
    num_without_mask: Sequence[int]  # of each category, objects that had no usable polygon


class Growing:
    """A column of unknown length; with a folder, what is long goes to its file while it grows."""

    def __init__(self, name: str, folder: Path | None) -> None:
        self.dtype = np.dtype(DTYPES[name])
        self.path = None if folder is None else _path(folder, name)
        if self.path is not None:
            self.path.unlink(missing_ok=True)
        self.waiting = array(_TYPECODES[self.dtype.str])
        self._num_written = 0

    def __len__(self) -> int:
        return self._num_written + len(self.waiting)

    def extend(self, values: array) -> None:
        """Append numbers of the column's own type."""
        self.waiting += values
        if self.path is not None and len(self.waiting) > WRITE_ABOVE:
            self._write(self.path)

    def finish(self) -> np.ndarray:
        """The whole column, mapped where it has a file."""
        if self.path is None:
            return np.asarray(self.waiting, self.dtype)
        self._write(self.path)
        return _mapped(self.path, self.dtype, self._num_written)

    def _write(self, path: Path) -> None:
        with open(path, "ab") as file:
            file.write(memoryview(self.waiting))
        self._num_written += len(self.waiting)
        self.waiting = array(self.waiting.typecode)


def file_name(columns: Columns, place: int) -> str:
    """The file name of an image."""
    first, end = columns["name_ends"][place : place + 2].tolist()
    return columns["names"][first:end].tobytes().decode("utf-8", "surrogatepass")


def read_segmentation(columns: Columns, row: int, image: int) -> Segmentation:
    """Mask of the annotation in a row, as a json has it."""
    kind, first = columns["kinds"][row], int(columns["first_parts"][row])
    end = first + int(columns["num_parts"][row])
    if kind == POLYGONS:
        ends = columns["polygon_ends"][first : end + 1].tolist()
        coordinates = columns["coordinates"]
        return [coordinates[a:b].tolist() for a, b in itertools.pairwise(ends)]
    size = [int(columns["heights"][image]), int(columns["widths"][image])]
    if kind == RUNS:
        return {"size": size, "counts": columns["runs"][first:end].tolist()}
    return {"size": size, "counts": columns["letters"][first:end].tobytes().decode()}


def read_box(columns: Columns, row: int, image: int) -> BoxXYXY:
    """Box of the annotation in a row, (x0, y0, x1, y1) in pixels; its mask's if it has none."""
    x, y, width, height = columns["boxes"][4 * row : 4 * row + 4].tolist()
    if x == x:
        return x, y, x + width, y + height
    if columns["kinds"][row] == POLYGONS:
        first = columns["first_parts"][row]
        start, stop = columns["polygon_ends"][[first, first + columns["num_parts"][row]]].tolist()
        points = columns["coordinates"][start:stop].reshape(-1, 2)
        (x0, y0), (x1, y1) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
        return x0, y0, x1, y1
    mask: Any = read_segmentation(columns, row, image)
    # Run lengths of a TFDS data set were not checked before: they are now.
    x, y, width, height = rle.toBbox(encode_segmentation(mask, *mask["size"])).tolist()
    return x, y, x + width, y + height


def read_boxes(columns: Columns) -> np.ndarray:
    """`read_box` of all annotations, [annotations, 4]."""
    boxes = columns["boxes"].reshape(-1, 4).copy()
    boxes[:, 2:] += boxes[:, :2]
    number = np.diff(columns["annotation_ends"])
    owners = np.repeat(np.arange(len(number)), number)
    for row in np.flatnonzero(np.isnan(boxes[:, 0])).tolist():
        boxes[row] = read_box(columns, row, int(owners[row]))
    return boxes


def has_area(columns: Columns) -> np.ndarray:
    """Which annotations have an area above 0 by the json, or no area at all, bool [annotations]."""
    return np.isnan(columns["areas"]) | (columns["areas"] > 0)


def save_index(index: CocoIndex, folder: Path) -> None:
    """Write an index to an existing folder; columns that have their file there already stay."""
    for name, column in index.columns.items():
        path = _path(folder, name)
        if not path.exists() or path.stat().st_size != column.nbytes:
            column.tofile(path)
    description = {
        "format": FORMAT,
        "lengths": {name: len(index.columns[name]) for name in DTYPES},
        "categories": list(index.categories.items()),
        "has_annotations": index.has_annotations,
        "faults": index.faults,
        "num_objects": index.num_objects,
        "num_without_mask": index.num_without_mask,
    }
    description["checksums"] = _checksums(index.columns, description)
    (folder / DESCRIPTION).write_text(json.dumps(description), encoding="utf-8")


def _checksums(columns: Columns, description: Mapping[str, Any]) -> dict[str, int]:
    """CRC-32 of each column, and of the description without its checksums."""
    known = {name: value for name, value in description.items() if name != "checksums"}
    found = {name: zlib.crc32(np.ascontiguousarray(columns[name]).data) for name in DTYPES}
    return {**found, DESCRIPTION: zlib.crc32(json.dumps(known).encode())}


def open_index(folder: Path) -> CocoIndex:
    """Map an index that was saved to a folder, and check every byte of it.

    Raises:
        ValueError, KeyError, TypeError, OSError: it is damaged, or of another format.
    """
    description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError(f"{folder} is not an index of format {FORMAT}")
    columns = open_columns(folder, description["lengths"])
    for name, found in _checksums(columns, description).items():
        if found != description["checksums"][name]:
            path = folder / DESCRIPTION if name == DESCRIPTION else _path(folder, name)
            raise ValueError(f"{path} is not what was written")
    categories, images, annotations = description["faults"]
    return CocoIndex(
        columns,
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


def open_columns(folder: str | os.PathLike, lengths: Mapping[str, int]) -> Columns:
    """Map the columns of a folder; a ValueError or an OSError if a file is not of its length."""
    if set(lengths) != set(DTYPES):
        raise ValueError(f"{folder} has other columns: {sorted(lengths)}")
    return {
        name: _mapped(_path(Path(folder), name), np.dtype(dtype), lengths[name])
        for name, dtype in DTYPES.items()
    }


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}.bin"


def _mapped(path: Path, dtype: np.dtype, length: int) -> np.ndarray:
    size = path.stat().st_size if path.exists() else 0
    if size != length * dtype.itemsize:
        raise ValueError(f"{path} has {size} bytes, expected {length * dtype.itemsize}")
    if not length:
        return np.zeros(0, dtype)  # an empty file cannot be mapped
    return np.memmap(path, dtype, "r", shape=(length,)).view(np.ndarray)
