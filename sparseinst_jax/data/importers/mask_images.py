"""Folders of mask images: a binary image for each object, or a map of object numbers.

Two layouts, the place of an image without its suffix being ``a/b``:

* ``objects``: a folder ``a/b`` with one binary image for each object (0 is background, one other
  value the object); its class is the subfolder ``a/b/apple/1.png`` or the first part of its name,
  ``a/b/apple_1.png``.
* ``indexed``: one image ``a/b.png`` whose values number the objects, 0 is background; grey with 8
  or 16 bits, palette (the indices count), or RGB (each colour is an object, black is background).
  ``values.json`` beside them gives the classes: ``{"a/b.png": {"1": "apple", "255": null}}``, null
  for a value that is no object.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from sparseinst_jax.data.file_search import FileSearch
from sparseinst_jax.data.images import read_values
from sparseinst_jax.data.importers.coco_content import found_classes
from sparseinst_jax.data.importers.objects import (
    Imported,
    ImportFaults,
    LabelFault,
    LabelledObject,
    check_size,
    checked_class,
    hint_at_place,
    list_images,
    make_object,
    open_image,
    read_json,
    require_folder,
    with_progress,
)
from sparseinst_jax.runtime.messages import listed

LAYOUTS = ("objects", "indexed")
# More different values are a photo, or a mask that was smoothed or saved as JPEG.
MAX_VALUES = 2000
_NUMBERED = re.compile(r"(.+?)[_-]\d+")
_SEMANTIC = (
    "In a semantic map all objects of a class have one value, so that touching ones cannot be "
    "apart. Export instances from the labelling tool instead: a value for each object "
    "(--layout indexed) or an image for each object (--layout objects)."
)


def read_masks(
    source: Path,
    images_dir: Path | None = None,
    names: Sequence[str] | None = None,
    *,
    layout: str,
    class_name: str | None = None,
) -> Imported:
    """Read a folder of mask images; see the module for the two layouts.

    Args:
        source: folder of the masks; by ``images_dir=None`` it has ``images`` and ``masks``.
        images_dir: folder of the images.
        names: the classes in their order; by default those found, by the alphabet.
        layout: one of `LAYOUTS`.
        class_name: class of every object, in place of file names or values.json.

    Raises:
        FileNotFoundError: a folder is missing.
        ValueError: there are no images or no masks, or the maps are semantic.
    """
    require_folder(source, "the folder of the masks")
    if images_dir is None:
        if not ((source / "images").is_dir() and (source / "masks").is_dir()):
            raise ValueError(
                f"{source} does not hold the folders images and masks; name the image folder with "
                "--images, and the folder of the masks as the source"
            )
        source, images_dir = source / "masks", source / "images"
    require_folder(images_dir, "the image folder")
    search = FileSearch()
    masks = list_images(source, search)
    if images_dir.resolve().is_relative_to(source.resolve()):
        inner = images_dir.resolve()
        masks = [path for path in masks if not path.resolve().is_relative_to(inner)]
    if not masks:
        raise search.nothing(f"no mask image in or below {source}; expected PNG files")
    faults = ImportFaults()
    images = _images_by_place(images_dir, source, faults, search)
    read = _read_objects if layout == "objects" else _read_indexed
    result = Imported([], (), images_dir, faults)
    read(source, masks, images, names, class_name, result)
    result.class_names = found_classes(result.images, names)
    result.notes += search.left_out()
    without = len(images) - len(result.images)
    if without and not faults.lines:
        result.notes.append(f"{without} images below {images_dir} have no mask: left out")
    return result


def _images_by_place(
    images_dir: Path, source: Path, faults: ImportFaults, search: FileSearch
) -> dict[Path, Path]:
    """Images by their path below the folder without suffix."""
    found: dict[Path, Path] = {}
    masks_inside = source.resolve() != images_dir.resolve() and source.resolve().is_relative_to(
        images_dir.resolve()
    )
    for path in list_images(images_dir, search):
        if masks_inside and path.resolve().is_relative_to(source.resolve()):
            continue
        first = found.setdefault(path.relative_to(images_dir).with_suffix(""), path)
        if first is not path:
            faults.add(str(path), f"{first} has the same name except for the suffix; rename one")
    if not found:
        raise search.nothing(f"no image in or below {images_dir}; name its folder with --images")
    return found


def _read_objects(
    source: Path,
    masks: list[Path],
    images: dict[Path, Path],
    names: Sequence[str] | None,
    class_name: str | None,
    result: Imported,
) -> None:
    """A folder for each image, a binary image for each object."""
    folders: dict[Path, list[Path]] = {}
    homeless: dict[Path, int] = {}
    for mask in masks:
        parents = mask.relative_to(source).parents
        place = next((parent for parent in parents if parent in images), None)
        if place is not None:
            folders.setdefault(place, []).append(mask)
        else:
            homeless[mask.parent] = homeless.get(mask.parent, 0) + 1
    for folder, count in homeless.items():
        place, example = next(iter(images.items()))
        result.faults.add(
            str(folder),
            f"{count} masks lie in no folder with the name of an image; those of {example} are "
            f"expected in {source / place}{hint_at_place(folder.name, images.values())}",
        )
    for place in with_progress(sorted(folders)):
        with result.faults.at(str(images[place])):
            image = open_image(images[place], result.images_dir)
            size = image.height, image.width
            for path in folders[place]:
                with result.faults.at(str(path)):
                    label = class_name or _class_of_file(path, source / place)
                    found = make_object(checked_class(label, names), _read_binary(path, size), size)
                    image.objects.append(found)
            result.images.append(image)


def _class_of_file(path: Path, folder: Path) -> str:
    """The class of a mask from its subfolder, or from its name up to the number."""
    below = path.relative_to(folder)
    if len(below.parts) > 1:
        return below.parts[0]
    match = _NUMBERED.fullmatch(path.stem)
    name = match[1].strip("_- ") if match else ""
    if not name or name.isdigit():
        raise LabelFault(
            f"the name says no class: expected {folder.name}/apple_1.png or "
            f"{folder.name}/apple/1.png; or give --class NAME if all objects are of one class"
        )
    return name


def _read_numbers(path: Path) -> np.ndarray:
    """Values of a mask image as one integer a pixel, int64 [h, w]; colours as R + 256 G + 256² B.

    Raises:
        LabelFault: the file is broken, partly transparent, or no mask by its number of values.
    """
    try:
        values = read_values(path, str(path)).astype(np.int64)
    except (ValueError, FileNotFoundError) as error:
        raise LabelFault(error) from error
    if values.ndim == 3:
        if values.shape[2] in (2, 4):
            if (values[..., -1] != 255).any():
                raise LabelFault("is partly transparent; save the mask without an alpha channel")
            values = values[..., :-1]
        is_grey = (values == values[..., :1]).all()
        values = values[..., 0] if is_grey else values @ (256 ** np.arange(values.shape[2]))
    num_values = len(np.unique(values))
    if num_values > MAX_VALUES:
        raise LabelFault(
            f"has {num_values} different values: a photo, or a mask that was smoothed or saved as "
            "JPEG; save masks unsmoothed as PNG"
        )
    return values


def _read_binary(path: Path, size: tuple[int, int]) -> np.ndarray:
    numbers = _read_numbers(path)
    check_size(size, numbers.shape, "the mask")
    values = np.unique(numbers)
    if len(values[values != 0]) > 1:
        raise LabelFault(
            f"has {len(values)} values ({listed(values, 6)}), a mask of one object has 0 and one "
            "other; save it unsmoothed as PNG; if each value is an object: --layout indexed"
        )
    return numbers != 0


def _read_indexed(
    source: Path,
    masks: list[Path],
    images: dict[Path, Path],
    names: Sequence[str] | None,
    class_name: str | None,
    result: Imported,
) -> None:
    """A map of object numbers for each image."""
    of_maps = {} if class_name is not None else _read_values_json(source)
    numbers_of: list[tuple[set[int], int]] = []
    for path in with_progress(masks):
        place = path.relative_to(source).with_suffix("")
        with result.faults.at(str(path)):
            if place not in images:
                raise LabelFault(
                    f"there is no image {place} below {result.images_dir}; add it, or delete this"
                    + hint_at_place(place.name, images.values())
                )
            image = open_image(images[place], result.images_dir)
            size = image.height, image.width
            numbers = _read_numbers(path)
            check_size(size, numbers.shape, "the map")
            key = path.relative_to(source).as_posix()
            classes = class_name or of_maps.get(key, {})
            image.objects = _objects_of_map(path, numbers, classes, names, result.faults)
            numbers_of.append(_parts(numbers))
            result.images.append(image)
    if class_name is not None:
        _refuse_semantic(source, numbers_of)


def _objects_of_map(
    path: Path,
    numbers: np.ndarray,
    classes: str | dict[str, Any],
    names: Sequence[str] | None,
    faults: ImportFaults,
) -> list[LabelledObject]:
    """An object for each value, in the order of the values."""
    objects: list[LabelledObject] = []
    size = numbers.shape[0], numbers.shape[1]
    for value in np.unique(numbers[numbers != 0]).tolist():
        with faults.at(f"{path}, value {value}"):
            label = classes if isinstance(classes, str) else classes.get(str(value), "")
            if label is None:
                continue
            if label == "":
                raise LabelFault(
                    "values.json does not say its class; add it (null if it is no object)"
                )
            found = make_object(checked_class(label, names), numbers == value, size)
            objects.append(found)
    return objects


def _read_values_json(source: Path) -> dict[str, dict[str, Any]]:
    """The class of each value of each map."""
    path = source / "values.json"
    form = '{"sub/a.png": {"1": "apple", "2": "pear", "255": null}}'
    if not path.is_file():
        raise ValueError(
            f"the classes of the objects are unknown: give --class NAME if all are of one class, "
            f"or write {path} like {form}"
        )
    try:
        content = read_json(path)
    except LabelFault as fault:
        raise ValueError(f"{path}: {fault}") from fault
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object like {form}")
    if content and all(isinstance(value, str | None) for value in content.values()):
        raise ValueError(
            f"{path} gives a class to each value for all maps at once, which is a semantic map; "
            f"expected the objects of each map, like {form}. {_SEMANTIC}"
        )
    wrong = [key for key, value in content.items() if not isinstance(value, dict)]
    if wrong:
        raise ValueError(f"{path}: entry {wrong[0]!r} is no object; expected {form}")
    return content


def _parts(numbers: np.ndarray) -> tuple[set[int], int]:
    """The values of a map, and in how many separate parts they lie."""
    values = set(np.unique(numbers[numbers != 0]).tolist())
    labelled: Any = ndimage.label(numbers != 0, np.ones((3, 3)))
    return values, labelled[1]


def _refuse_semantic(source: Path, maps: list[tuple[set[int], int]]) -> None:
    """Refuse maps that have one and the same value everywhere, mostly in several parts."""
    filled = [(values, parts) for values, parts in maps if values]
    several = sum(parts > 1 for _, parts in filled)
    all_values = set[int]().union(*(values for values, _ in filled))
    if len(all_values) == 1 and 2 * several > len(filled):
        raise ValueError(
            f"{source}: all maps have one value besides 0 ({min(all_values)}), and in {several} "
            f"of {len(filled)} it lies in several separate parts: they look semantic, not like a "
            f"number for each object. {_SEMANTIC}"
        )
