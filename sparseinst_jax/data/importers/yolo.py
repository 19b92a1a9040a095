"""YOLO segmentation labels: a text file for each image, an outline on each line.

A line is ``class x y x y ...``: the number of the class and three or more corners as shares of the
image's width and height.
Source: the format of Ultralytics' segmentation data sets, docs.ultralytics.com/datasets/segment.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from sparseinst_jax.data.file_search import FileSearch
from sparseinst_jax.data.importers.objects import (
    Imported,
    ImportFaults,
    LabelFault,
    LabelledImage,
    LabelledObject,
    checked_number,
    hint_at_place,
    list_images,
    make_object,
    make_polygon,
    open_image,
    require_folder,
    with_progress,
)
from sparseinst_jax.data.importers.yolo_set import describe_set
from sparseinst_jax.runtime.messages import listed

# Tools round, and draw a little across the border; pixels instead of shares are far larger.
OUTSIDE_TOLERANCE = 0.05


def read_yolo(
    source: Path, images_dir: Path | None = None, names: Sequence[str] | None = None
) -> Imported:
    """Read a folder of YOLO segmentation labels.

    The label of an image is looked for below the source at the image's place, in ``labels`` of the
    source, where the last folder ``images`` of its path reads ``labels``, and beside it. An
    image without a label file has no objects. The parts that a data.yaml names are kept.

    Args:
        source: the data set, or its labels' folder.
        images_dir: folder of the images; by default ``images`` of the source where there is one
            and else the source.
        names: names of the classes 0, 1, ...; by default those of data.yaml or classes.txt, in
            the source, the folders of images and labels, or the two above the first two.

    Raises:
        FileNotFoundError: a folder is missing.
        ValueError: there are no images, no labels, no names or several that differ, or the labels
            are those of another task.
    """
    require_folder(source, "the data set")
    is_whole = images_dir is None
    if images_dir is None:
        images_dir = source / "images" if (source / "images").is_dir() else source
    require_folder(images_dir, "the image folder")
    search = FileSearch()
    paths = list_images(images_dir, search)
    texts = functools.cache(_texts_by_stem)
    labels = {path: _label_files(path, source, images_dir, texts) for path in paths}
    used = Counter(label for found in labels.values() for label in found)
    said = describe_set(source, images_dir, {label.parent for label in used}, names)
    if not paths:
        raise search.nothing(f"no image in or below {images_dir}; name its folder with --images")
    if not used:
        example = source / "labels" / paths[0].relative_to(images_dir).with_suffix(".txt")
        stems = {path.stem for path in search.find(source, {".txt"})}
        stem = next((path.stem for path in paths if path.stem in stems), "")
        raise search.nothing(
            f"no label file for any of the {len(paths)} images below {images_dir}; expected for "
            f"example {example}{hint_at_place(stem, paths)}"
        )
    class_names = tuple(said.names[number] for number in sorted(said.names))
    result = Imported([], class_names, images_dir, ImportFaults(), said.notes)
    for path in with_progress(paths):
        found = labels[path]
        with result.faults.at(str(found[0] if found else path)):
            if any(used[label] > 1 for label in found):
                raise LabelFault(f"belongs to several images, {path} is one; keep one of them")
            if len(found) > 1 and len({label.read_bytes() for label in found}) > 1:
                others = listed(found[1:], between=" and ")
                raise LabelFault(f"and {others} both belong to {path} and differ; delete one")
            image = open_image(path, images_dir)
            image.part = said.part_of(path)
            if found:
                size = image.height, image.width
                image.objects = _read_labels(found[0], size, said.names, result.faults)
            result.images.append(image)
    beside = {path for label in used for found in texts(label.parent).values() for path in found}
    for path in filter(_looks_like_labels, sorted(beside - used.keys())):
        fault = f"no image of this name below {images_dir}; add it, or delete this"
        result.faults.add(str(path), fault + hint_at_place(path.stem, paths))
    if is_whole:  # otherwise a part of it was chosen
        result.notes += _unused(source, images_dir, {label.parent for label in used})
    result.notes += search.left_out()
    without = sum(not found for found in labels.values())
    if without:
        result.notes.append(f"{without} images have no label file: taken as without objects")
    if _look_like_keypoints(result.images):
        result.notes.append(
            "WARNING: all objects read as a box (x y width height) with points inside it, as pose "
            "labels do: are these keypoints instead of outlines?"
        )
    return result


def _unused(source: Path, images_dir: Path, label_folders: set[Path]) -> list[str]:
    """Lines on images and label files of a data set that lie where none were looked for."""
    images = list_images(source, FileSearch(follows_links=True, excluded=images_dir))
    texts = FileSearch(follows_links=True).find(source, {".txt"})
    texts = [path for path in texts if path.parent not in label_folders]
    texts = [path for path in texts if _looks_like_labels(path)]
    found = (
        (images, "images", f"outside {images_dir}: --images {source} takes all"),
        (texts, "label files", "in folders whose labels no image has: are the images missing?"),
    )
    return [
        f"WARNING: {len(paths)} {what} are left out, such as {paths[0]}, {where}"
        for paths, what, where in found
        if paths
    ]


def _texts_by_stem(folder: Path) -> dict[str, list[Path]]:
    """The .txt files of a folder, whatever the case of their ending; hidden ones are left out."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix.lower() == ".txt" and not path.name.startswith(".") and path.is_file():
            found.setdefault(path.stem, []).append(path)
    return found


def _label_files(
    image: Path,
    source: Path,
    images_dir: Path,
    texts: Callable[[Path], dict[str, list[Path]]],
) -> list[Path]:
    """The label files of an image, each once; several are a fault unless they are equal."""
    relative = image.relative_to(images_dir).with_suffix("")
    places = [source / "labels" / relative, source / relative]
    parts = image.with_suffix("").parts
    if "images" in parts[:-1]:
        last = len(parts) - 2 - parts[-2::-1].index("images")
        places.append(Path(*parts[:last], "labels", *parts[last + 1 :]))
    places.append(image.with_suffix(""))
    found = [path for place in places for path in texts(place.parent).get(place.name, [])]
    return list({path.resolve(): path for path in reversed(found)}.values())[::-1]


def _read_labels(
    path: Path, size: tuple[int, int], names: dict[int, str], faults: ImportFaults
) -> list[LabelledObject]:
    try:
        lines = path.read_bytes().decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LabelFault(f"cannot be read as text ({error}); export it again") from error
    objects = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            with faults.at(f"{path}:{number}"):
                objects.append(_read_line(line, size, names))
    return objects


def _read_line(line: str, size: tuple[int, int], names: dict[int, str]) -> LabelledObject:
    """Read the object of a line."""
    try:
        values = [checked_number(float(word), "a coordinate") for word in line.split()]
    except LabelFault:
        raise
    except ValueError:
        raise LabelFault(
            f"expected numbers, class x y x y ..., got {line.strip()[:60]!r}"
        ) from None
    label, coordinates = values[0], values[1:]
    if label not in names:
        raise LabelFault(
            f"class {line.split()[0]} has no name: the names are "
            + ", ".join(f"{i} {names[i]}" for i in sorted(names))
            + "; correct the number or the names"
        )
    if len(values) == 5:
        raise LabelFault(
            "5 numbers are a box, not an outline: this is a label for detection; export the data "
            "set for segmentation (polygons), masks cannot be made of boxes"
        )
    if len(coordinates) % 2 or len(coordinates) < 6:
        raise LabelFault(
            f"expected a class and three or more pairs x y, got {len(coordinates)} numbers after "
            "the class"
        )
    furthest = max(coordinates, key=lambda value: abs(value - 0.5))
    if abs(furthest - 0.5) > 0.5 + OUTSIDE_TOLERANCE:
        raise LabelFault(
            f"coordinates are shares of width and height, 0 ... 1, got {furthest:g}; divide x by "
            "the image's width and y by its height (or are these keypoints, not outlines?)"
        )
    height, width = size
    # Rounded so that a tenth of 30 pixels is 3, not 3.0000000000000004.
    xs = [round(x * width, 4) for x in coordinates[::2]]
    ys = [round(y * height, 4) for y in coordinates[1::2]]
    return make_object(names[int(label)], [make_polygon(xs, ys, size)], size)


def _look_like_keypoints(images: Sequence[LabelledImage]) -> bool:
    """Whether the first two corners of all outlines would be boxes around their other points."""
    found = [(image, labelled) for image in images for labelled in image.objects]
    for image, labelled in found:
        size = image.width, image.height
        center, side, *points = np.array(labelled.segmentation, float).reshape(-1, 2) / size
        # (0, 0) is a point that is not seen.
        if any((np.abs(p - center) > side / 2 + 0.01).any() for p in points if p.any()):
            return False
    return bool(found)


def _looks_like_labels(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return count_numbers(path) >= 5
    return False


def count_numbers(path: Path) -> int:
    """How many numbers the first line of a text holds; 0 where it holds anything else."""
    with path.open("rb") as file:
        words = file.readline(1 << 16).split()
    try:
        return len([float(word) for word in words])
    except ValueError:
        return 0
