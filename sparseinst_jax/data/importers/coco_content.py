"""Make COCO jsons of labelled images: the content, the division, the files."""

import contextlib
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparseinst_jax.data.importers.objects import LabelledImage
from sparseinst_jax.runtime.files import written_whole
from sparseinst_jax.runtime.messages import counted

DEFAULT_VAL_SHARE = 0.2
# Names of the folders of a data set that is divided already, without a number at their end.
_PART_FOLDERS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_DESCRIPTION = "made by sparseinst import-data"


def found_classes(
    images: Sequence[LabelledImage], names: Sequence[str] | None = None
) -> tuple[str, ...]:
    """The names where given, else the classes of the objects in the order of the alphabet."""
    if names is not None:
        return tuple(names)
    return tuple(sorted({found.class_name for image in images for found in image.objects}))


def make_content(images: Sequence[LabelledImage], class_names: Sequence[str]) -> dict[str, Any]:
    """The COCO content of images; ids from 1 in the order of the file names and the labels."""
    ids = {name: number for number, name in enumerate(class_names, 1)}
    content: dict[str, Any] = {
        "info": {"description": _DESCRIPTION},
        "licenses": [],
        "images": [],
        "annotations": [],
        "categories": [{"id": number, "name": name} for name, number in ids.items()],
    }
    for image_id, image in enumerate(sorted(images, key=lambda image: image.file_name), 1):
        content["images"].append(
            {
                "id": image_id,
                "file_name": image.file_name,
                "height": image.height,
                "width": image.width,
            }
        )
        for place, found in enumerate([*image.objects, *image.crowd]):
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": ids[found.class_name],
                    "segmentation": found.segmentation,
                    "area": found.area,
                    "bbox": found.bbox,
                    "iscrowd": int(place >= len(image.objects)),
                }
            )
    return content


def divide(
    images: Sequence[LabelledImage],
    wanted: Collection[str],
    val_share: float | None = None,
    seed: int = 0,
    *,
    keeps_parts: bool = True,
) -> tuple[dict[str, list[LabelledImage]], list[str]]:
    """Divide images into those of training, validation and test, as they are divided or anew.

    Args:
        images: with objects or without.
        wanted: "train", and maybe "val" and "test".
        val_share: of the photos that are held out where there is no validation part; None for
            `DEFAULT_VAL_SHARE`, and where the images are divided already.
        seed: see `split_images`.
        keeps_parts: whether the parts of a data set that is divided already stay as they are.

    Returns:
        The images of each part, and lines on how they were divided.

    Raises:
        ValueError: a part is wanted that there is not, or the images cannot be divided.
    """
    parts = _own_parts(images) if keeps_parts else {}
    if "test" in wanted and "test" not in parts:
        raise ValueError("--test-output: the data set has no test part; leave the option out")
    if "val" in parts and val_share is not None:
        raise ValueError(
            f"--val-share: the data set is divided already, into {_counts(parts)}; leave the "
            "option out to keep that, or give --ignore-parts to divide all images anew"
        )
    lines = []
    if parts:
        lines.append(f"the data set is divided already, and stays so: {_counts(parts)}")
        unwritten = {part: found for part, found in parts.items() if part not in wanted}
        if unwritten:
            options = [f"--{part}-output JSON" for part in ("val", "test") if part in unwritten]
            lines.append(
                f"WARNING: {_counts(unwritten)} are in no json; "
                + "".join(f"{option} writes one, " for option in options)
                + "--ignore-parts takes all images together"
            )
    else:
        parts = {"train": list(images)}
    if "val" in wanted and "val" not in parts:
        share = DEFAULT_VAL_SHARE if val_share is None else val_share
        parts["train"], parts["val"] = split_images(parts["train"], share, seed)
    empty = [part for part in wanted if not any(image.objects for image in parts[part])]
    if empty:
        raise ValueError(f"no image of the part {empty[0]} has an object; label some")
    return parts, lines


def _own_parts(images: Sequence[LabelledImage]) -> dict[str, list[LabelledImage]]:
    """The parts that images are divided into, by their data.yaml or else their folders; or none."""
    parts: dict[str, list[LabelledImage]] = {}
    for image in images:
        folders = image.file_name.lower().split("/")[:-1]
        named = (_PART_FOLDERS.get(folder.rstrip("0123456789_-")) for folder in folders[:2])
        part = image.part or next(filter(None, named), "")
        parts.setdefault(part, []).append(image)
    return parts if "train" in parts and ("val" in parts or "test" in parts) else {}


def _counts(parts: Mapping[str, Sequence[LabelledImage]]) -> str:
    order = [part for part in ("train", "val", "test", "") if part in parts]
    return ", ".join(
        f"{part or 'in no part'} {counted(len(parts[part]), 'image')}" for part in order
    )


def split_images(
    images: Sequence[LabelledImage], val_share: float, seed: int
) -> tuple[list[LabelledImage], list[LabelledImage]]:
    """Divide images into training and validation; neither side is ever without objects.

    Copies of one photo that Roboflow has augmented (``photo.rf.1.jpg``, ``photo.rf.2.jpg``) stay
    together. Photos with and without objects are divided separately, each by a hash of seed and
    name: the same on every machine, and a photo that is added moves few others.

    Args:
        images: of at least two photos with objects.
        val_share: share of the photos that goes to validation, between 0 and 1.
        seed: any integer; another one gives another division.

    Raises:
        ValueError: fewer than two photos have objects.
    """
    photos: dict[str, list[LabelledImage]] = {}
    for image in sorted(images, key=lambda image: image.file_name):
        photos.setdefault(image.file_name.split(".rf.")[0], []).append(image)
    names = sorted(
        photos, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode(errors="replace")).digest()
    )
    labelled = [name for name in names if any(image.objects for image in photos[name])]
    empty = [name for name in names if not any(image.objects for image in photos[name])]
    if len(labelled) < 2:
        raise ValueError(
            f"{len(labelled)} image(s) with objects cannot be divided into training and "
            "validation: label two or more, or leave --val-output out"
        )
    num_val = min(max(round(val_share * len(labelled)), 1), len(labelled) - 1)
    held_out = {*labelled[:num_val], *empty[: round(val_share * len(empty))]}
    train = [image for name in names if name not in held_out for image in photos[name]]
    return train, [image for name in names if name in held_out for image in photos[name]]


def refuse_foreign_file(path: Path) -> None:
    """Raise a ValueError if a file is there that `make_content` did not make."""
    if not path.exists():
        return
    try:
        content = json.loads(path.read_bytes())
        is_ours = content["info"]["description"] == _DESCRIPTION
    except (ValueError, RecursionError, OSError, TypeError, KeyError):
        is_ours = False
    if not is_ours:
        raise ValueError(
            f"{path} exists and was not written by import-data; name another file, or delete it"
        )


def write_jsons(contents: Mapping[Path, Any]) -> None:
    """Write json files, all of them or none; a ValueError if one cannot be written."""
    try:
        with contextlib.ExitStack() as written:
            for path, content in contents.items():
                temporary = written.enter_context(written_whole(path))
                temporary.write_text(json.dumps(content) + "\n")
    except OSError as error:
        names = ", ".join(map(str, contents))
        raise ValueError(f"{names} cannot be written ({error}); give another --output") from error
