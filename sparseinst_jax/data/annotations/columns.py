"""The index of a data set as plain columns of numbers, in memory or in files that are mapped.

Files are opened where they lie: a second start reads nothing it does not use, and every process
that opens them shares one copy in memory. A file holds the bytes of one column and nothing else;
there is nothing in it that could be run.
"""

import json
import os
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 1  # another number for every change of what is stored
DESCRIPTION = "index.json"
WRITE_ABOVE = 1 << 18  # numbers of a growing column that wait in memory

# Of an annotation's mask: parts of `polygon_ends`, numbers of `runs`, letters of `letters`.
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
    "areas": "<f8",  # px², NaN where the json does not say
    "boxes": "<f8",  # [annotations * 4] x, y, width, height in pixels, NaN where there is none
    "is_ignored": "|u1",  # mmdetection's key "ignore"
    "kinds": "|u1",
    "first_parts": "<i8",
    "num_parts": "<i8",
    # of masks
    "polygon_ends": "<i8",  # [polygons + 1], in `coordinates`
    "coordinates": "<f8",
    "runs": "<i8",
    "letters": "|u1",
    # of texts
    "names": "|u1",
}
_PER_IMAGE = ("heights", "widths")
_PER_ANNOTATION = (
    *("categories", "is_crowd", "is_ignored", "areas", "kinds"),
    *("first_parts", "num_parts"),
)
Columns = dict[str, np.ndarray]


class Growing:
    """A column of unknown length; with a path, what is long goes to the file while it grows."""

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
            self._write()

    def finish(self) -> np.ndarray:
        """The whole column, mapped where it has a file."""
        if self.path is None:
            return np.asarray(self.waiting, self.dtype)
        self._write()
        return _mapped(self.path, self.dtype, self._num_written)

    def _write(self) -> None:
        assert self.path is not None, "only columns with a file are written"
        with open(self.path, "ab") as file:
            file.write(memoryview(self.waiting))
        self._num_written += len(self.waiting)
        self.waiting = array(self.waiting.typecode)


_TYPECODES = {"<i8": "q", "<f8": "d", "|u1": "B"}


def text_at(columns: Columns, place: int) -> str:
    """The file name of an image."""
    first, end = columns["name_ends"][place : place + 2].tolist()
    return decode_name(columns["names"][first:end].tobytes())


def encode_name(name: str) -> bytes:
    """The bytes of a text of a json, which may hold halves of letters beyond 16 bits."""
    return name.encode("utf-8", "surrogatepass")


def decode_name(raw: bytes | bytearray) -> str:
    """The text that `encode_name` was given."""
    return raw.decode("utf-8", "surrogatepass")


def save(columns: Columns, description: Mapping[str, Any], folder: Path) -> None:
    """Write columns and what else is to be remembered; those that have their file already stay.

    Args:
        columns: all of DTYPES.
        description: values that json can hold.
        folder: exists.
    """
    for name, column in columns.items():
        path = _path(folder, name)
        if not path.exists() or path.stat().st_size != column.nbytes:
            column.tofile(path)
    lengths = {name: len(columns[name]) for name in DTYPES}
    text = json.dumps({"format": FORMAT, "lengths": lengths, **description})
    (folder / DESCRIPTION).write_text(text, encoding="utf-8")


def load(folder: Path) -> tuple[Columns, dict[str, Any]]:
    """Map the columns of a folder and check that they fit together.

    Raises:
        ValueError: they do not, or are of another format.
        OSError: a file cannot be read.
    """
    description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError(f"{folder} is not an index of format {FORMAT}")
    columns = open_columns(folder, description["lengths"])
    check(columns, len(description["categories"]))
    return columns, description


def open_columns(folder: str | os.PathLike, lengths: Mapping[str, int]) -> Columns:
    """Map the columns of a folder.

    Raises:
        ValueError: a file is not of its length.
        OSError: it cannot be read.
    """
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


def check(columns: Columns, num_categories: int) -> None:
    """Make sure that no place in one column leads out of another.

    Raises:
        ValueError: names the column.
    """
    num_images, num_annotations = len(columns["image_ids"]), len(columns["annotation_ids"])
    _require(len(columns["boxes"]) == 4 * num_annotations, "boxes")
    for names, number in ((_PER_IMAGE, num_images), (_PER_ANNOTATION, num_annotations)):
        for name in names:
            _require(len(columns[name]) == number, name)
    for name, target, number in (
        ("name_ends", "names", num_images),
        ("annotation_ends", "annotation_ids", num_images),
        ("polygon_ends", "coordinates", None),
    ):
        ends = columns[name]
        _require(len(ends) == (len(ends) or 1 if number is None else number + 1), name)
        _require(ends[0] == 0 and ends[-1] == len(columns[target]), name)
        _require(bool((ends[1:] >= ends[:-1]).all()), name)
    _require(bool((columns["heights"] > 0).all() and (columns["widths"] > 0).all()), "heights")
    categories, kinds = columns["categories"], columns["kinds"]
    _require(bool(((categories >= 0) & (categories < num_categories)).all()), "categories")
    _require(bool((kinds <= LETTERS).all()), "kinds")
    most = [len(columns["polygon_ends"]) - 1, len(columns["runs"]), len(columns["letters"])]
    first, number = columns["first_parts"], columns["num_parts"]
    is_inside = (first >= 0) & (number >= 0) & (first + number <= np.array(most)[kinds])
    _require(bool(is_inside.all()), "first_parts")


def _require(is_right: bool, name: str) -> None:
    if not is_right:
        raise ValueError(f"the column {name} of an index does not fit the others")
