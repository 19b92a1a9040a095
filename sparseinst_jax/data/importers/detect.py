"""Find out which labels a folder holds: a COCO json, VIA, LabelMe or YOLO, by content."""

from __future__ import annotations

import mmap
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparseinst_jax.data.file_search import FileSearch
from sparseinst_jax.data.images import image_suffixes
from sparseinst_jax.data.importers import coco_content, labelme, via, yolo
from sparseinst_jax.data.importers.objects import Imported, LabelledImage
from sparseinst_jax.runtime.files import read_json
from sparseinst_jax.runtime.messages import listed

# Words that a json of each kind holds, all of one row.
_SIGNS = {
    "coco": ((b'"images"', b'"annotations"', b'"categories"'),),
    "via": ((b'"_via_img_metadata"',), (b'"regions"', b'"shape_attributes"')),
    "labelme": ((b'"shapes"', b'"imagePath"'),),
}
_TITLES = {"coco": "COCO", "via": "VIA", "labelme": "LabelMe", "yolo": "YOLO"}
_SEGMENTATION_WORDS = 7  # of a YOLO line: the class and three corners
_MOST_NAMES = 50  # of images whose folder is looked for


class Labels(NamedTuple):
    """Labels that were found."""

    form: str  # "coco", "via", "labelme" or "yolo"
    sources: tuple[Path, ...]  # the jsons of COCO; else one file or folder
    others: tuple[str, ...]  # what else was found, for a message

    @property
    def title(self) -> str:
        """Name of the tool."""
        return _TITLES[self.form]


def find_labels(folder: Path, excluded: Path | None = None) -> Labels:
    """Find the labels in and below a folder; of several kinds coco, via, labelme, yolo.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: it holds no labels.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is no folder: give the one with your photos and their labels"
        )
    files = FileSearch(excluded=excluded).find(folder, {".json", ".txt"})
    found: dict[str, list[Path]] = {}
    for path in files:
        if kind := _kind(path):
            found.setdefault(kind, []).append(path)
    kinds = [kind for kind in _TITLES if kind in found]
    if not kinds:
        number = len(FileSearch(excluded=excluded).find(folder, image_suffixes()))
        raise ValueError(
            f"{folder} holds {number} photos and no labels that can be read: expected a COCO json,"
            " jsons of LabelMe or VIA, or YOLO segmentation texts, in it or below. Outline the"
            " objects of some photos, in LabelMe for example, and start again; mask images are"
            " read by `sparseinst import-data masks`."
        )
    first, *rest = kinds
    others = tuple(f"{len(found[kind])} of {_TITLES[kind]}" for kind in rest)
    sources = tuple(found["coco"]) if first == "coco" else (folder,)
    if first == "via":
        sources, more = (found["via"][0],), found["via"][1:]
        others += tuple(str(path) for path in more)
    return Labels(first, sources, others)


def read(labels: Labels, excluded: Iterable[Path] = ()) -> Imported:
    """Read labels of another form than COCO's; see the importers."""
    (source,) = labels.sources
    if labels.form == "via":
        return via.read_via(source)
    if labels.form == "labelme":
        return labelme.read_labelme(source, excluded=excluded)
    return yolo.read_yolo(source)


def _kind(path: Path) -> str:
    if path.suffix.lower() == ".txt":
        return "yolo" if yolo.count_numbers(path) >= _SEGMENTATION_WORDS else ""
    if not path.stat().st_size:
        return ""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for kind, rows in _SIGNS.items():
            if any(all(content.find(word) >= 0 for word in row) for row in rows):
                return kind
    return ""


def folder_of_images(content: dict[str, Any], folder: Path, source: Path) -> Path:
    """Find the folder, in or below another, that the file names of a COCO json are relative to.

    Raises a ValueError if its images are not there.
    """
    names = [str(image["file_name"]) for image in content["images"][:_MOST_NAMES]]
    for place in (source.parent, source.parent / "images", folder, folder / "images"):
        if names and all((place / name).is_file() for name in names):
            return place
    paths = [str(path) for path in FileSearch().find(folder, image_suffixes())]
    roots = Counter(
        path[: -len(name) - 1] for name in names for path in paths if path.endswith(f"/{name}")
    )
    if not roots:
        raise ValueError(
            f"the images of {source} are not in {folder} or below: looked for {listed(names, 3)}."
            " Put them there, or give the folder that holds both."
        )
    return Path(roots.most_common(1)[0][0])


def divide_coco(content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide a COCO content into training and validation; see `coco_content.split_images`."""
    with_objects = Counter(entry["image_id"] for entry in content["annotations"])
    images = [
        LabelledImage(str(image["file_name"]), 0, 0, objects=[None] * with_objects[image["id"]])  # type: ignore[list-item]
        for image in content["images"]
    ]

    def part(chosen: list[LabelledImage]) -> dict[str, Any]:
        names = {image.file_name for image in chosen}
        kept = [image for image in content["images"] if str(image["file_name"]) in names]
        ids = {image["id"] for image in kept}
        entries = [entry for entry in content["annotations"] if entry["image_id"] in ids]
        return content | {"images": kept, "annotations": entries}

    share = coco_content.DEFAULT_VAL_SHARE
    train, val = coco_content.split_images(images, share, seed=0)
    return part(train), part(val)


def coco_parts(paths: Sequence[Path], folder: Path) -> tuple[Path, Path | None, list[Path]]:
    """Choose among COCO jsons by their names: that of training, of validation, and those left."""

    def says(path: Path, words: tuple[str, ...]) -> bool:
        parts = re.split(r"[^a-z]+", str(path.relative_to(folder)).lower())
        return any(word in parts for word in words)

    def largest(choice: list[Path]) -> Path | None:
        return max(choice, key=lambda path: path.stat().st_size, default=None)

    tests = [path for path in paths if says(path, ("test", "testing"))]
    vals = [path for path in paths if says(path, ("val", "valid", "validation"))]
    rest = [path for path in paths if path not in tests and path not in vals]
    train = largest([path for path in rest if says(path, ("train", "training"))]) or largest(rest)
    train = train or largest(list(paths))
    val = largest([path for path in vals or tests if path != train])
    assert train is not None  # `find_labels` found one at least
    return train, val, [path for path in paths if path not in (train, val)]


def read_coco(path: Path) -> dict[str, Any]:
    """Read a COCO json as far as it is needed to divide it; a ValueError if that is incomplete."""
    content = read_json(path, "the labels", "export them again")
    try:
        names = [(image["id"], image["file_name"]) for image in content["images"]]
        _ = [(entry["image_id"], entry["category_id"]) for entry in content["annotations"]]
        _ = [(category["id"], category["name"]) for category in content["categories"]]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no complete COCO json ({type(error).__name__}: {error}): `sparseinst"
            f" check-data {path} --images DIR` lists every fault"
        ) from error
    if not names:
        raise ValueError(f"{path} names no image")
    return content
