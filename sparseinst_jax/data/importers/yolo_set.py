"""What a YOLO data set says of itself: the names of its classes, its task and its parts.

Source: the data.yaml of Ultralytics and Roboflow, and the classes.txt that labelling tools write.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sparseinst_jax.runtime.messages import listed

MAX_NAMES_FILE = 1 << 20  # bytes: thousands of classes
_YAML_FILES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
_NAMES_FILES = (*_YAML_FILES, "classes.txt", "obj.names")
_FORMS = "names: [apple, pear], or a line '  - apple' or '  0: apple' for each class"
_PARTS = {"train": "train", "val": "val", "valid": "val", "test": "test"}  # keys of a data.yaml


class SetDescription(NamedTuple):
    """What a data set says of itself."""

    names: dict[int, str]  # number -> name of the classes
    notes: list[str]  # lines on where the names are from
    # path of an image -> "train", "val" or "test", or "" where nothing says it
    part_of: Callable[[Path], str]


def describe_set(
    source: Path, images_dir: Path, label_folders: set[Path], names: Sequence[str] | None = None
) -> SetDescription:
    """Read what the files of a data set say of it; see `yolo.read_yolo` for the arguments.

    Raises:
        ValueError: there are no names, or several that differ, or it is one of another task.
    """
    files = _names_files(source, images_dir, label_folders)
    nearest = files[0] if files else []
    for path in nearest:
        _refuse_other_task(path)
    return SetDescription(*_choose_names(files, names, source), _parts(nearest))


def _names_files(source: Path, images_dir: Path, label_folders: set[Path]) -> list[list[Path]]:
    """Files that name the classes: those of the data set, then those one and two folders above."""
    here = Path.cwd()
    ends = [source.absolute(), images_dir.absolute()]
    inside = dict.fromkeys(ends)
    for folder in sorted(path.absolute() for path in label_folders):
        between = [path for path in folder.parents if path.is_relative_to(ends[0])]
        inside |= dict.fromkeys([folder, *between])
    levels = [list(inside)]
    levels += [[end.parents[up] for end in ends if len(end.parents) > up] for up in (0, 1)]
    seen: set[Path] = set()
    found = []
    for level in levels:
        folders = [folder for folder in dict.fromkeys(level) if folder not in seen]
        seen.update(folders)
        # As short as the user would write it.
        folders = [f.relative_to(here) if f.is_relative_to(here) else f for f in folders]
        known = [{path.name.lower(): path for path in folder.iterdir()} for folder in folders]
        found.append([names[name] for names in known for name in _NAMES_FILES if name in names])
    return [level for level in found if level]


def _choose_names(
    files: list[list[Path]], names: Sequence[str] | None, source: Path
) -> tuple[dict[int, str], list[str]]:
    """Names of the classes from the nearest files, and lines on where they are from."""
    if names:
        origin, chosen, others = "--names", dict(enumerate(names)), list(chain(*files))
    elif files:
        origin, *equals = files[0]
        chosen, others = read_names(origin), list(chain(*files[1:]))
        for path in equals:
            if (found := read_names(path)) != chosen:
                raise ValueError(
                    f"{origin} and {path} name the classes differently: {_numbered(chosen)} "
                    f"against {_numbered(found)}; delete the wrong file, or give --names"
                )
    else:
        raise ValueError(
            f"no class names: there is no data.yaml and no classes.txt in {source} or above it; "
            "put one there, or give the names of the classes 0, 1, ...: --names APPLE PEAR"
        )
    notes = [f"class names from {origin}: {_numbered(chosen)}"]
    for path in others:
        try:
            differs = read_names(path) != chosen
        except ValueError:  # of no use, so nobody meant it
            continue
        if differs:
            notes.append(f"WARNING: {path} is not used and names the classes differently")
    return chosen, notes


def _numbered(names: dict[int, str]) -> str:
    return listed((f"{number} {names[number]}" for number in sorted(names)), 20)


def read_names(path: Path) -> dict[int, str]:
    """Read the names of the classes, number to name, from a data.yaml or a text of a name a line.

    Raises:
        ValueError: the file has no names, or in a form that is not read; gives the line.
    """
    if path.name.lower() in _YAML_FILES:
        names, num_classes = _yaml_names(path)
    else:
        names, num_classes = _line_names(path), None
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


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_NAMES_FILE:
            raise ValueError(f"it has more than {MAX_NAMES_FILE} bytes")
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); give --names APPLE PEAR") from error


def _line_names(path: Path) -> dict[int, str]:
    """The names of a text file, by their lines, or by the numbers that all lines begin with."""
    lines = [line.strip() for line in _read_text(path).rstrip().splitlines()]
    for number, line in enumerate(lines, 1):
        if not line or line.startswith("#"):
            raise ValueError(
                f"{path}:{number}: the line {'is empty' if not line else 'is a comment'}, and "
                "classes are numbered by their lines: write the name there, or take the line out "
                "if the labels were numbered without it; or give --names"
            )
    found = [re.fullmatch(r"(\d{1,9})(\s*:|\s)\s*(\S.*)", line) for line in lines]
    numbered = [match for match in found if match]
    has_colons = all(match[2].endswith(":") for match in numbered)
    in_order = [int(match[1]) for match in numbered] == list(range(len(lines)))
    # Coins may be called "1 euro" and "2 euro".
    if len(numbered) < len(lines) or not (has_colons or in_order):
        return dict(enumerate(lines))
    names = {int(match[1]): match[3] for match in numbered}
    if len(names) < len(lines):
        raise ValueError(f"{path} gives a number to several names; correct it, or give --names")
    return names


def _yaml_entries(path: Path) -> list[tuple[Any, Any]]:
    """The entries of a YAML file as they are written, in nodes that know their lines."""
    text = _read_text(path)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except RecursionError:
        raise ValueError(f"{path} is not read: it is nested too deeply; give --names") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = path if mark is None else f"{path}:{mark.line + 1}"
        reason = getattr(error, "problem", None) or error
        raise ValueError(f"{where}: is not read as YAML ({reason}); or give --names") from error
    return root.value if isinstance(root, yaml.MappingNode) else []


def _yaml_names(path: Path) -> tuple[dict[int, str], int | None]:
    """Read `names` and `nc` of a YAML file."""
    pairs = _yaml_entries(path)
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


def _refuse_other_task(path: Path) -> None:
    """Refuse the labels of a data.yaml that says that they are no outlines."""
    if path.name.lower() not in _YAML_FILES:
        return
    entries = {key.value: value.value for key, value in _yaml_entries(path)}
    task = entries.get("task", "segment")
    what = f"task: {task}" if task != "segment" else "kpt_shape" if "kpt_shape" in entries else ""
    if what:
        raise ValueError(
            f"{path} has {what}: the labels are those of another task (such as a box and keypoints)"
            ", not outlines; export the data set for segmentation (polygons)"
        )


def _parts(files: list[Path]) -> Callable[[Path], str]:
    """Which part of a data set an image is in, as a data.yaml says; "" where it does not."""
    part_of: dict[str, str] = {}  # by the path of an image, or of a folder with / at its end
    for path in files:
        if path.name.lower() not in _YAML_FILES:
            continue
        entries = {key.value: value for key, value in _yaml_entries(path)}
        roots = [path.parent]
        if isinstance(root := getattr(entries.get("path"), "value", None), str):
            roots.append(path.parent / root)
        for key, part in _PARTS.items():
            node = entries.get(key)
            nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
            texts = [n.value for n in nodes if isinstance(n, yaml.ScalarNode) and n.value]
            # Roboflow writes ../train/images and means train/images.
            places = [root / text.removeprefix("../") for text in texts for root in roots]
            for place in places:
                if place.is_dir():
                    part_of.setdefault(os.path.join(os.path.abspath(place), ""), part)
                elif place.suffix.lower() == ".txt" and place.is_file():
                    lines = filter(None, map(str.strip, _read_text(place).splitlines()))
                    images = [root / line for line in lines for root in (place.parent, *roots)]
                    part_of.update({os.path.abspath(image): part for image in reversed(images)})

    def find(image: Path) -> str:
        name = os.path.abspath(image)
        above = (os.path.join(folder, "") for folder in map(str, Path(name).parents))
        return next((part_of[place] for place in (name, *above) if place in part_of), "")

    return find
