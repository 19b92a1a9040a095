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
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparseinst_jax.data.file_search import FileSearch
from sparseinst_jax.data.importers.coco_content import found_classes
from sparseinst_jax.data.importers.mask_values import (
    SEMANTIC_CURE,
    VOID,
    looks_semantic,
    outlining_value,
    read_numbers,
    which_are_split,
)
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
MIN_OUTLINED = 3  # maps that are enough where the value is not a usual one
_NUMBERED = re.compile(r"(.+?)[_-]\d+")


def read_masks(
    source: Path,
    images_dir: Path | None = None,
    names: Sequence[str] | None = None,
    *,
    layout: str,
    class_name: str | None = None,
    ignored: Sequence[int] = (),
) -> Imported:
    """Read a folder of mask images; see the module for the two layouts.

    Args:
        source: folder of the masks; by ``images_dir=None`` it has ``images`` and ``masks``.
        images_dir: folder of the images.
        names: the classes in their order; by default those found, by the alphabet.
        layout: one of `LAYOUTS`.
        class_name: class of every object, in place of file names or values.json.
        ignored: values of maps that are no objects, beside 0.

    Raises:
        FileNotFoundError: a folder is missing.
        ValueError: there are no images or no masks, the maps are semantic, or the names of the
            masks are those of their images.
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
    result = Imported([], (), images_dir, faults)
    if layout == "objects":
        _read_objects(source, masks, images, names, class_name, result)
    else:
        _read_indexed(source, masks, images, names, class_name, result, ignored)
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
    places = sorted(folders)
    for place in with_progress(places):
        with result.faults.at(str(images[place])):
            image = open_image(images[place], result.images_dir)
            size = image.height, image.width
            for path in folders[place]:
                with result.faults.at(str(path)):
                    label = class_name or _class_of_file(path, source / place)
                    found = make_object(checked_class(label, names), _read_binary(path, size), size)
                    image.objects.append(found)
            result.images.append(image)
    named = [
        (found.class_name, Path(image.file_name).stem)
        for image in result.images
        for found in image.objects
    ]
    if class_name is None and named and all(map(_begins_alike, named)):
        label, stem = named[0]
        raise ValueError(
            f"{source}: the names of the masks begin with those of their images, such as {label!r} "
            f"for an object of {stem}: they say no class. Give --class NAME if all objects are of "
            f"one class, or name the masks by it: {stem}/apple_1.png or {stem}/apple/1.png"
        )


def _begins_alike(names: tuple[str, str]) -> bool:
    """Whether the class of an object is the name of its image, or that and more words."""
    label, stem = names
    return re.match(rf"{re.escape(stem)}(?![^\W_])", label, re.IGNORECASE) is not None


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


def _read_binary(path: Path, size: tuple[int, int]) -> np.ndarray:
    numbers = read_numbers(path)
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
    ignored: Sequence[int],
) -> None:
    """A map of object numbers for each image."""
    of_maps = {} if class_name is not None else _read_values_json(source)
    map_of: dict[Path, Path] = {}
    is_split: list[dict[int, bool]] = []
    outlining: list[int] = []
    for path in with_progress(masks):
        place = path.relative_to(source).with_suffix("")
        with result.faults.at(str(path)):
            if place not in images:
                raise LabelFault(
                    f"there is no image {place} below {result.images_dir}; add it, or delete this"
                    + hint_at_place(place.name, images.values())
                )
            if (first := map_of.setdefault(place, path)) is not path:
                raise LabelFault(f"is a map of {images[place]}, as {first} is; keep one of them")
            image = open_image(images[place], result.images_dir)
            size = image.height, image.width
            of_map = of_maps.get(path.relative_to(source).as_posix(), {})
            null = [int(value) for value in of_map if of_map[value] is None and value.isdecimal()]
            numbers = read_numbers(path, [*ignored, *null])
            check_size(size, numbers.shape, "the map")
            classes = class_name or of_map
            image.objects = _objects_of_map(path, numbers, classes, names, result.faults)
            is_split.append(which_are_split(numbers))
            outlining += outlining_value(numbers)
            result.images.append(image)
    if semantic := looks_semantic(source, is_split):
        if class_name is not None:
            raise ValueError(semantic)
        result.notes.append(f"WARNING: {semantic}")
    result.notes += [
        f"WARNING: the value {value} lies around all other objects in {count} maps, as the border "
        f"in Pascal VOC's does; it was read as an object. If it is none: --ignore-value {value}"
        for value, count in Counter(outlining).items()
        if value in VOID or count >= MIN_OUTLINED
    ]


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
            f"expected the objects of each map, like {form}. {SEMANTIC_CURE}"
        )
    wrong = [key for key, value in content.items() if not isinstance(value, dict)]
    if wrong:
        raise ValueError(f"{path}: entry {wrong[0]!r} is no object; expected {form}")
    return content
