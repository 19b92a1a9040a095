"""What the importers share: labelled images, the shapes on them, and faults with their place."""

import difflib
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from pycocotools import mask as rle
from tqdm import tqdm

from sparseinst_jax.data.coco import Segmentation, decode_mask, encode_segmentation
from sparseinst_jax.data.file_search import FileNames, FileSearch
from sparseinst_jax.data.images import image_suffixes, read_size, refuse_outside
from sparseinst_jax.runtime.messages import brief

Item = TypeVar("Item")
# Largest distance from a circle or an ellipse to the polygon drawn in its place, in pixels.
CURVE_TOLERANCE = 0.05


class LabelFault(ValueError):
    """Something of a label file that cannot be read: an object, or a whole image."""


class LabelledObject(NamedTuple):
    """One object; ``area`` in px² and ``bbox`` (x, y, width, height) are those of its pixels."""

    class_name: str
    segmentation: Segmentation
    area: int
    bbox: list[float]


@dataclass(slots=True)
class LabelledImage:
    """One image; ``file_name`` is relative to the image folder, sizes are upright, in pixels.

    ``part`` is "train", "val" or "test" in a data set that is divided already, else empty;
    ``crowd`` are regions of several objects of a class that are not told apart.
    """

    file_name: str
    height: int
    width: int
    objects: list[LabelledObject] = field(default_factory=list)
    part: str = ""
    crowd: list[LabelledObject] = field(default_factory=list)


class ImportFaults:
    """The faults of an import, each with its place; ``lines`` in the order they were met."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, where: str, what: object) -> None:
        """Note one fault."""
        self.lines.append(f"{where}: {what}")

    @contextmanager
    def at(self, where: str) -> Iterator[None]:
        """Record a `LabelFault` raised inside and continue after the block."""
        try:
            yield
        except LabelFault as fault:
            self.add(where, fault)


@dataclass(slots=True)
class Imported:
    """What an importer found: the readable part, what is not, and remarks for the summary."""

    images: list[LabelledImage]
    class_names: tuple[str, ...]
    images_dir: Path
    faults: ImportFaults
    notes: list[str] = field(default_factory=list)


def make_object(
    class_name: str, shape: list[list[float]] | np.ndarray, size: tuple[int, int]
) -> LabelledObject:
    """Make an object of polygons, which stay polygons, or of a mask, which becomes run lengths.

    Args:
        class_name: its class.
        shape: polygons [[x, y, x, y, ...], ...] in pixels, or bool [h, w].
        size: (height, width) of the image.

    Raises:
        LabelFault: it covers no pixel, or its polygons cannot be drawn.
    """
    if isinstance(shape, np.ndarray):
        runs = rle.encode(np.asfortranarray(shape.astype(np.uint8)))
        segmentation: Segmentation = {"size": list(size), "counts": runs["counts"].decode()}
    else:
        segmentation = shape
        try:
            runs = encode_segmentation(shape, *size)
        except ValueError as error:
            raise LabelFault(error) from error
    area = int(rle.area(runs))
    if area == 0:
        raise LabelFault(
            "covers no pixel: it is too thin or lies outside the image; draw it again or delete it"
        )
    return LabelledObject(class_name, segmentation, area, rle.toBbox(runs).tolist())


def merge_shapes(
    shapes: Sequence[list[float] | np.ndarray], size: tuple[int, int]
) -> list[list[float]] | np.ndarray:
    """The parts of one object as `make_object` takes them: polygons, or a mask if any is one."""
    polygons = [shape for shape in shapes if not isinstance(shape, np.ndarray)]
    masks = [shape for shape in shapes if isinstance(shape, np.ndarray)]
    if not masks:
        return polygons
    if polygons:
        masks.append(decode_mask(polygons, *size))
    return np.logical_or.reduce(masks)


def checked_number(value: Any, what: str) -> float:
    """A finite number out of a label file, or a `LabelFault` that shows what is there."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise LabelFault(f"{what} must be a number, got {brief(value)}")
    if abs(value) > 1e9 or not math.isfinite(value):
        raise LabelFault(f"{what} must be a finite number of pixels, got {brief(value)}")
    return float(value)


def make_polygon(
    xs: Sequence[float], ys: Sequence[float], size: tuple[int, int], what: str = "polygon"
) -> list[float]:
    """A COCO polygon [x, y, x, y, ...] of the columns and rows of its corners, in pixels.

    Corners may lie outside of the image (height, width), by its size at most. A LabelFault: one
    lies further away, or there are fewer than three.
    """
    if len(xs) < 3:
        raise LabelFault(f"a {what} needs three corners or more, got {len(xs)}")
    height, width = size
    for axis, values, side in (("x", xs, width), ("y", ys, height)):
        for value in (min(values), max(values)):
            if not -side <= value <= 2 * side:
                raise LabelFault(
                    f"{axis} = {value:g} lies far outside of the image, which is {width} x {height}"
                    " (width x height); is it the label of another image, or of another size?"
                )
    return [value for corner in zip(xs, ys, strict=True) for value in corner]


def make_box(box: Sequence[float], size: tuple[int, int]) -> list[float]:
    """The polygon of a box (x, y, width, height) in pixels, (x, y) its upper left corner."""
    x, y, width, height = box
    if not (width > 0 and height > 0):
        raise LabelFault(f"a rectangle needs a width and a height > 0, got {width:g} x {height:g}")
    return make_polygon((x, x + width, x + width, x), (y, y, y + height, y + height), size)


def make_ellipse(
    center: tuple[float, float],
    radii: tuple[float, float],
    size: tuple[int, int],
    angle: float = 0.0,
) -> list[float]:
    """The polygon inscribed in an ellipse, nowhere more than `CURVE_TOLERANCE` from it.

    Args:
        center: (x, y) in pixels.
        radii: along x and y before it is turned, in pixels.
        size: (height, width) of the image.
        angle: by which it is turned from x towards y, in radians.

    Raises:
        LabelFault: a radius is not positive, or the ellipse reaches far out of the image.
    """
    largest = max(radii)
    if not min(radii) > 0:
        raise LabelFault(f"a circle or ellipse needs radii > 0, got {', '.join(map(str, radii))}")
    if largest > 2 * max(size):
        raise LabelFault(f"a radius of {largest:g} pixels is more than twice the image's side")
    num = max(12, math.ceil(math.pi / math.acos(max(0.0, 1 - CURVE_TOLERANCE / largest))))
    turns = 2 * math.pi * np.arange(num) / num
    u, v = radii[0] * np.cos(turns), radii[1] * np.sin(turns)
    xs = center[0] + u * math.cos(angle) - v * math.sin(angle)
    ys = center[1] + u * math.sin(angle) + v * math.cos(angle)
    return make_polygon(xs.round(2).tolist(), ys.round(2).tolist(), size, "circle or ellipse")


def checked_class(label: Any, names: Sequence[str] | None) -> str:
    """The class of a label, one of ``names`` where these are given, without outer spaces.

    A LabelFault: there is none, or it is not among the names.
    """
    if isinstance(label, bool) or not isinstance(label, str | int) or not str(label).strip():
        raise LabelFault(f"the class must be a text that is not empty, got {brief(label)}")
    name = str(label).strip()
    if names is not None and name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise LabelFault(f"the class {name!r} is not among the names {', '.join(names)}{hint}")
    return name


def open_image(
    path: Path,
    images_dir: Path,
    stated_size: tuple[Any, Any] | None = None,
    known: FileNames | None = None,
) -> LabelledImage:
    """An image without objects, its size read from the file with EXIF orientation applied.

    Args:
        path: the image file, below the folder.
        images_dir: what ``file_name`` becomes relative to.
        stated_size: (height, width) in the label file; None where there is none.
        known: of the folder; says which file a missing one may be.

    Raises:
        LabelFault: the image is missing, broken, outside of the folder, or of another size.
    """
    if not is_below(path, images_dir):
        raise LabelFault(
            f"the image {path} is not below the image folder {images_dir}; name with --images a "
            "folder that holds all images"
        )
    if not path.is_file():
        hint = "" if known is None else known.hint(os.path.relpath(path, images_dir))
        raise LabelFault(
            f"the image {path} does not exist{hint}; put it there, or name the image folder with "
            "--images"
        )
    try:
        refuse_outside(str(images_dir), str(path))  # as training will
        size = read_size(path)
    except (ValueError, FileNotFoundError) as error:
        raise LabelFault(error) from error
    check_size(size, stated_size, "the label file")
    return LabelledImage(os.path.relpath(path, images_dir).replace(os.sep, "/"), *size)


def is_below(path: Path, folder: Path) -> bool:
    """Whether a path lies in a folder or below it; links are not followed, ``..`` is."""
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))


def check_size(size: tuple[int, int], stated: tuple[Any, Any] | None, what: str) -> None:
    """Refuse labels of another size than the image's, both (height, width) in pixels."""
    if stated is None or stated == size:
        return
    cure = "label this very file, or put back the one that was labelled"
    if stated == size[::-1]:
        cure = (
            "it was made on the image as stored, without the EXIF rotation that viewers and "
            "training apply; save the image upright and label it again"
        )
    raise LabelFault(
        f"{what} says {stated[0]} x {stated[1]} (height x width), the image is {size[0]} x "
        f"{size[1]}; {cure}"
    )


def with_progress(items: Iterable[Item]) -> Iterable[Item]:
    """The items, one for each image, with a bar in a terminal and silently elsewhere."""
    return tqdm(items, desc="read", unit="image", disable=None, leave=False)


def list_images(folder: Path, search: FileSearch) -> list[Path]:
    """The image files in and below a folder, in the order of their paths."""
    return search.find(folder, image_suffixes())


def files_by_name(paths: Sequence[Path]) -> dict[str, Path]:
    """Each file by its name; names that occur more than once are left out."""
    counts = Counter(path.name for path in paths)
    return {path.name: path for path in paths if counts[path.name] == 1}


def hint_at_place(stem: str, paths: Iterable[Path]) -> str:
    """The end of a message: where there is an image of a name that was looked for elsewhere."""
    found = next((path for path in paths if path.stem.casefold() == stem.casefold()), None)
    if found is None:
        return ""
    if found.stem != stem:
        return f"; there is {found}: it differs in capital letters"
    return f"; there is {found}: is --images {found.parent} meant?"


def require_folder(path: Path, what: str) -> None:
    """Raise a FileNotFoundError unless the folder is there."""
    if not path.is_dir():
        kind = "is a file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{what} {path} {kind}; give a folder")


def is_coco(content: Any) -> bool:
    """Whether the content of a json has the lists of a COCO json."""
    return isinstance(content, dict) and {"images", "annotations"} <= content.keys()


def read_json(path: Path) -> Any:
    """Read a json label file, or raise a `LabelFault` with the line."""
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError, OSError) as error:
        raise LabelFault(f"cannot be read as json ({error}); export it again") from error
