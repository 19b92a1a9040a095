"""LabelMe labels: a json for each image, a list of shapes in it.

Source: the files that LabelMe writes, github.com/wkentaro/labelme.
"""

import base64
import binascii
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np

from sparseinst_jax.data.file_search import FileNames, FileSearch
from sparseinst_jax.data.images import read_values
from sparseinst_jax.data.importers.coco_content import found_classes
from sparseinst_jax.data.importers.objects import (
    Imported,
    ImportFaults,
    LabelFault,
    LabelledImage,
    LabelledObject,
    checked_class,
    checked_number,
    files_by_name,
    is_below,
    is_coco,
    list_images,
    make_box,
    make_ellipse,
    make_object,
    make_polygon,
    merge_shapes,
    open_image,
    read_json,
    require_folder,
    with_progress,
)
from sparseinst_jax.runtime.messages import listed

# LabelMe's own labels of what is no object.
_NO_OBJECTS = ("__ignore__", "_background_")
_WITHOUT_AREA = ("point", "points", "line", "linestrip")


class _ShapePart(NamedTuple):
    """A shape of an object: a polygon, or a mask bool [h, w]."""

    class_name: str
    shape: list[float] | np.ndarray
    where: str


class _ImageFolder(NamedTuple):
    """Where the images of jsons are looked for."""

    source: Path
    root: Path
    by_name: Mapping[str, Path]
    by_stem: Mapping[str, Path]
    known: FileNames


def read_labelme(
    source: Path,
    images_dir: Path | None = None,
    names: Sequence[str] | None = None,
    excluded: Iterable[Path] = (),
) -> Imported:
    """Read a folder of LabelMe jsons.

    Polygons, rectangles, circles and masks are objects; those with the same ``group_id`` and label
    are parts of one object. ``imageData`` is not read: the image file is.

    Args:
        source: folder of the jsons, searched with its subfolders.
        images_dir: folder that ``file_name`` becomes relative to; by default the source. A json's
            ``imagePath`` is looked for beside it, then in this folder, then anywhere below it where
            one image has that name.
        names: the classes in their order; by default those found, by the alphabet.
        excluded: jsons that are no labels, such as the file to be written.

    Raises:
        FileNotFoundError: a folder is missing.
        ValueError: there is no json.
    """
    require_folder(source, "the folder of the LabelMe jsons")
    root = source if images_dir is None else images_dir
    require_folder(root, "the image folder")
    left_out = {path.resolve() for path in excluded}
    search = FileSearch()
    paths = [path for path in search.find(source, {".json"}) if path.resolve() not in left_out]
    if not paths:
        raise search.nothing(f"no .json in or below {source}; LabelMe writes one for each image")
    faults = ImportFaults()
    paths_of_images = list_images(root, search)
    by_stem = {path.stem: path for path in paths_of_images}
    by_name = files_by_name(paths_of_images)
    folder = _ImageFolder(source, root, by_name, by_stem, FileNames(root))
    images: list[LabelledImage] = []
    labelled_by: dict[str, Path] = {}
    ignored: Counter[str] = Counter()
    for path in with_progress(paths):
        with faults.at(str(path)):
            image = _read_file(path, folder, names, faults, ignored)
            first = labelled_by.setdefault(image.file_name, path)
            if first is not path:
                raise LabelFault(f"labels {image.file_name}, as {first} does; keep one of them")
            images.append(image)
    notes = search.left_out()
    for label, count in ignored.items():
        notes.append(f"{count} shapes labelled {label} are no objects: left out, as background")
    renamed = [
        f"{path} labels {name}"
        for name, path in labelled_by.items()
        if path.stem != Path(name).stem and path.stem in folder.by_stem
    ]
    if renamed:
        notes.append(
            f"WARNING: {len(renamed)} jsons name another image than the one that is called as they "
            f"are: {listed(renamed, 5)}; what imagePath says counts"
        )
    without = len({p.relative_to(root).as_posix() for p in paths_of_images} - labelled_by.keys())
    if without:
        notes.append(f"{without} images below {root} have no json: left out")
    return Imported(images, found_classes(images, names), root, faults, notes)


def _read_file(
    path: Path,
    folder: _ImageFolder,
    names: Sequence[str] | None,
    faults: ImportFaults,
    ignored: Counter[str],
) -> LabelledImage:
    """Read a json and its shapes; those that are labelled as no objects are counted."""
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        what = "a COCO json, which needs no import" if is_coco(content) else "no list of 'shapes'"
        raise LabelFault(f"is not a LabelMe file: {what}; move it out of the folder")
    image_path = _find_image(path, content.get("imagePath"), folder)
    stated = content.get("imageHeight"), content.get("imageWidth")
    image = open_image(image_path, folder.root, stated if all(stated) else None)
    size = image.height, image.width
    objects: dict[Any, list[_ShapePart | str]] = {}
    for index, shape in enumerate(content["shapes"]):
        shape = shape if isinstance(shape, dict) else {}
        label, group = str(shape.get("label")).strip(), shape.get("group_id")
        if label in _NO_OBJECTS:
            ignored[label] += 1
            continue
        where = f"{path}: shapes[{index}]" + f" ({label})" * ("label" in shape)
        part: _ShapePart | str = where
        with faults.at(where):
            part = _ShapePart(*_read_shape(shape, size, names), where)
        objects.setdefault((index,) if group is None else (label, str(group)), []).append(part)
    image.objects = _merged(objects.values(), size, faults)
    return image


def _find_image(path: Path, stated: Any, folder: _ImageFolder) -> Path:
    """The image of a json: by its path, beside it or in the image folder, then by its name."""
    if not isinstance(stated, str) or not stated.strip():
        raise LabelFault(f"imagePath must name the image, got {stated!r}; set it")
    relative = PureWindowsPath(stated.strip())  # knows both kinds of slashes
    root, below = folder.root, path.parent.relative_to(folder.source)
    candidates = [root / below / relative.name, root / relative.name, path.parent / relative.name]
    if not relative.is_absolute() and not relative.root:
        plain = Path(relative.as_posix())
        candidates = [path.parent / plain, root / below / plain, root / plain, *candidates]
    if relative.name in folder.by_name:
        candidates.append(folder.by_name[relative.name])
    existing = [p for p in candidates if p.is_file()]
    if not existing:
        own = folder.by_stem.get(path.stem)
        namesake = f"; there is {own}, called as the json is: is imagePath wrong?" if own else ""
        raise LabelFault(
            f"the image {relative.as_posix()} is neither beside the json nor below {root}, or "
            "several there have its name; put it there, or name the image folder with --images"
            + (folder.known.hint(relative.as_posix()) or namesake)
        )
    return next((p for p in existing if is_below(p, root)), existing[0])


def _read_shape(
    shape: dict[str, Any], size: tuple[int, int], names: Sequence[str] | None
) -> tuple[str, list[float] | np.ndarray]:
    """Class and form of a shape."""
    if not shape:
        raise LabelFault("is not an object with label, points and shape_type")
    kind = shape.get("shape_type") or "polygon"  # old files have polygons only
    if kind in _WITHOUT_AREA:
        raise LabelFault(f"a {kind} has no area; draw a polygon, or delete it")
    class_name = checked_class(shape.get("label"), names)
    points = shape.get("points")
    if not isinstance(points, list) or not all(isinstance(p, list) and len(p) == 2 for p in points):
        raise LabelFault("points must be a list of [x, y]")
    xs = [checked_number(p[0], "x of a point") for p in points]
    ys = [checked_number(p[1], "y of a point") for p in points]
    if kind == "polygon" or (kind == "rectangle" and len(points) == 4):
        return class_name, make_polygon(xs, ys, size, kind)
    if kind not in ("rectangle", "circle", "mask"):
        raise LabelFault(
            f"shape_type {kind!r} is not read; expected polygon, rectangle, circle or mask: draw "
            "it as a polygon"
        )
    if len(points) != 2:
        raise LabelFault(f"a {kind} has two points, got {len(points)}")
    if kind == "circle":
        radius = math.hypot(xs[1] - xs[0], ys[1] - ys[0])
        return class_name, make_ellipse((xs[0], ys[0]), (radius, radius), size)
    left, right, top, bottom = min(xs), max(xs), min(ys), max(ys)
    if kind == "rectangle":
        return class_name, make_box((left, top, right - left, bottom - top), size)
    return class_name, _read_mask(shape.get("mask"), (left, top, right, bottom), size)


def _read_mask(
    encoded: Any, box: tuple[float, float, float, float], size: tuple[int, int]
) -> np.ndarray:
    """Place the PNG of a mask into the image, at the left and top of its box."""
    if not isinstance(encoded, str):
        raise LabelFault("a mask shape needs 'mask', the text of a PNG in base64")
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise LabelFault(f"the mask is not base64 ({error}); draw it again") from error
    try:
        values = read_values(io.BytesIO(data), "of the mask")
    except ValueError as error:
        raise LabelFault(error) from error
    left, top, right, bottom = (int(value) for value in box)
    # LabelMe has written boxes with the last pixel included, and boxes that end after it.
    height, width = bottom - top, right - left
    if values.shape not in ((height + 1, width + 1), (height, width)):
        raise LabelFault(
            f"the mask is {' x '.join(map(str, values.shape))} (height x width), its box is "
            f"{height + 1} x {width + 1}; draw it again"
        )
    mask = np.zeros(size, bool)
    top_cut, left_cut = max(-top, 0), max(-left, 0)
    inside = values[top_cut : max(size[0] - top, 0), left_cut : max(size[1] - left, 0)] != 0
    rows, columns = inside.shape
    mask[top + top_cut :, left + left_cut :][:rows, :columns] = inside
    return mask


def _merged(
    objects: Iterable[list[_ShapePart | str]], size: tuple[int, int], faults: ImportFaults
) -> list[LabelledObject]:
    """One object for each list of parts; with a part that is faulty (its place) the others go."""
    merged = []
    for found in objects:
        parts = [part for part in found if isinstance(part, _ShapePart)]
        faulty = [part for part in found if isinstance(part, str)]
        for part in parts if faulty else ():
            faults.add(part.where, f"belongs to one object with {faulty[0]}, so it is lost with it")
        if parts and not faulty:
            with faults.at(parts[0].where):
                shape = merge_shapes([part.shape for part in parts], size)
                merged.append(make_object(parts[0].class_name, shape, size))
    return merged
