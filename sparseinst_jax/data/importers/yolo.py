"""YOLO segmentation labels: a text file for each image, an outline on each line.

A line is ``class x y x y ...``: the number of the class and three or more corners as shares of the
image's width and height.
Source: the format of Ultralytics' segmentation data sets, docs.ultralytics.com/datasets/segment.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import yaml

from sparseinst_jax.data.file_search import FileSearch
from sparseinst_jax.data.importers.objects import (
    Imported,
    ImportFaults,
    LabelFault,
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

# Tools round, and draw a little across the border; pixels instead of shares are far larger.
OUTSIDE_TOLERANCE = 0.05
MAX_NAMES_FILE = 1 << 20  # bytes: thousands of classes
_FORMS = "names: [apple, pear], or a line '  - apple' or '  0: apple' for each class"


def read_yolo(
    source: Path, images_dir: Path | None = None, names: Sequence[str] | None = None
) -> Imported:
    """Read a folder of YOLO segmentation labels.

    The label of an image is looked for below the source at the image's place, in ``labels`` of the
    source, where the last folder ``images`` of its path reads ``labels``, and beside it. An
    image without a label file has no objects.

    Args:
        source: the data set, or its labels' folder.
        images_dir: folder of the images; by default ``images`` of the source where there is one
            and else the source.
        names: names of the classes 0, 1, ...; by default those of data.yaml, or of classes.txt, in
            the source, the folder of the images, or the two folders above either.

    Raises:
        FileNotFoundError: a folder is missing.
        ValueError: there are no images, no labels or no names.
    """
    require_folder(source, "the data set")
    if images_dir is None:
        images_dir = source / "images" if (source / "images").is_dir() else source
    require_folder(images_dir, "the image folder")
    number_to_name = dict(enumerate(names)) if names else _find_names(source, images_dir)
    search = FileSearch()
    paths = list_images(images_dir, search)
    if not paths:
        raise search.nothing(f"no image in or below {images_dir}; name its folder with --images")
    labels = {path: _label_path(path, source, images_dir) for path in paths}
    if not any(labels.values()):
        example = source / "labels" / paths[0].relative_to(images_dir).with_suffix(".txt")
        stems = {path.stem for path in source.rglob("*.txt")}
        stem = next((path.stem for path in paths if path.stem in stems), "")
        raise ValueError(
            f"no label file for any of the {len(paths)} images below {images_dir}; expected for "
            f"example {example}{hint_at_place(stem, paths)}"
        )
    faults = ImportFaults()
    used = Counter(label for label in labels.values() if label is not None)
    class_names = tuple(number_to_name[i] for i in sorted(number_to_name))
    result = Imported([], class_names, images_dir, faults, search.left_out())
    for path in with_progress(paths):
        label = labels[path]
        with faults.at(str(label or path)):
            if label is not None and used[label] > 1:
                raise LabelFault(f"belongs to several images, {path} is one; keep one of them")
            image = open_image(path, images_dir)
            if label is not None:
                size = image.height, image.width
                image.objects = _read_labels(label, size, number_to_name, faults)
            result.images.append(image)
    for path in _orphans(used):
        faults.add(str(path), f"no image of this name below {images_dir}; add it, or delete this")
    without = sum(label is None for label in labels.values())
    if without:
        result.notes.append(f"{without} images have no label file: taken as without objects")
    return result


def _find_names(source: Path, images_dir: Path) -> dict[int, str]:
    """Names from the first file that has some, from the source upwards."""
    folders: list[Path] = []
    for start in (source.absolute(), images_dir.absolute()):
        folders += [start, *list(start.parents)[:2]]
    for folder in dict.fromkeys(folders):
        for name in ("data.yaml", "data.yml", "dataset.yaml", "classes.txt", "obj.names"):
            if (folder / name).is_file():
                return read_names(folder / name)
    raise ValueError(
        f"no class names: there is no data.yaml and no classes.txt in {source} or above it; put "
        "one there, or give the names of the classes 0, 1, ...: --names APPLE PEAR"
    )


def read_names(path: Path) -> dict[int, str]:
    """Read the names of the classes: number to name.

    Args:
        path: a data.yaml, or a text file with one name a line, numbered from 0.

    Raises:
        ValueError: the file has no names, or in a form that is not read; gives the line.
    """
    try:
        if path.stat().st_size > MAX_NAMES_FILE:
            raise ValueError(f"it has more than {MAX_NAMES_FILE} bytes")
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); give --names APPLE PEAR") from error
    if path.suffix.lower() in (".yaml", ".yml"):
        names, num_classes = _yaml_names(text, path)
    else:
        lines = [line.strip() for line in text.splitlines()]
        names, num_classes = dict(enumerate(line for line in lines if line)), None
    if not names:
        raise ValueError(f"{path} has no class names; expected {_FORMS}, or give --names APPLE")
    if num_classes is not None and num_classes != len(names):
        raise ValueError(f"{path} says nc: {num_classes} and has {len(names)} names; correct it")
    twice = sorted(name for name, count in Counter(names.values()).items() if count > 1)
    if twice:
        raise ValueError(
            f"{path} gives the name {', '.join(map(repr, twice))} to several classes; names must "
            "differ: correct the file, or give --names"
        )
    return names


def _yaml_names(text: str, path: Path) -> tuple[dict[int, str], int | None]:
    """Read `names` and `nc` from the nodes of YAML: names as they are written, and their lines."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except RecursionError:
        raise ValueError(f"{path} is not read: it is nested too deeply; give --names") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = path if mark is None else f"{path}:{mark.line + 1}"
        reason = getattr(error, "problem", None) or error
        raise ValueError(f"{where}: is not read as YAML ({reason}); or give --names") from error
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    found = [value for key, value in pairs if key.value == "names"]
    counts = [value.value for key, value in pairs if key.value == "nc"]
    if len(found) != 1:
        raise ValueError(
            f"{path} has {len(found)} entries 'names:', expected one: {_FORMS}; or give --names"
        )
    (node,) = found
    names: dict[int, str] = {}
    if isinstance(node, yaml.SequenceNode):
        entries = [(str(number), value) for number, value in enumerate(node.value)]
    elif isinstance(node, yaml.MappingNode):
        entries = [(key.value, value) for key, value in node.value]
    else:
        entries = [("", node)] if node.value else []
    for number, value in entries:
        where = f"{path}:{value.start_mark.line + 1}"
        if not (isinstance(number, str) and number.isascii() and number.isdecimal()):
            raise ValueError(f"{where}: this form of names is not read; expected {_FORMS}")
        if not isinstance(value, yaml.ScalarNode):
            raise ValueError(
                f"{where}: the name of class {number} is not read, it is a list or a mapping; "
                "quote it or give --names"
            )
        if not value.value.strip():
            raise ValueError(f"{where}: class {number} has an empty name; give it one")
        if int(number) in names:
            raise ValueError(f"{where}: class {number} occurs more than once; correct the file")
        names[int(number)] = value.value.strip()
    is_count = len(counts) == 1 and isinstance(counts[0], str) and counts[0].isdecimal()
    return names, int(counts[0]) if is_count else None


def _label_path(image: Path, source: Path, images_dir: Path) -> Path | None:
    """The label file of an image, None where there is none."""
    relative = image.relative_to(images_dir).with_suffix(".txt")
    candidates = [source / "labels" / relative, source / relative]
    parts = list(image.with_suffix(".txt").parts)
    places = [i for i, part in enumerate(parts[:-1]) if part == "images"]
    if places:
        parts[places[-1]] = "labels"
        candidates.append(Path(*parts))
    candidates.append(image.with_suffix(".txt"))
    return next((path for path in candidates if path.is_file()), None)


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
            f"class {label:g} has no name: the names are "
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
            "the image's width and y by its height"
        )
    height, width = size
    # Rounded so that a tenth of 30 pixels is 3, not 3.0000000000000004.
    xs = [round(x * width, 4) for x in coordinates[::2]]
    ys = [round(y * height, 4) for y in coordinates[1::2]]
    return make_object(names[int(label)], [make_polygon(xs, ys, size)], size)


def _orphans(used: Counter[Path]) -> list[Path]:
    """Text files beside the label files that look like labels and belong to no image."""
    folders = sorted({path.parent for path in used})
    others = [path for folder in folders for path in sorted(folder.glob("*.txt"))]
    return [path for path in others if path not in used and _looks_like_labels(path)]


def _looks_like_labels(path: Path) -> bool:
    try:
        words = path.read_text(errors="replace").split("\n", 1)[0].split()
        return len([float(word) for word in words]) >= 5
    except (OSError, ValueError):
        return False
