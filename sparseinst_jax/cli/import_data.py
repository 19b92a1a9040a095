"""`sparseinst import-data`: turn the labels of other tools into a COCO json."""

import argparse
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparseinst_jax.cli import command_parser
from sparseinst_jax.cli.next_command import GENERAL, train_command
from sparseinst_jax.data.classes import warn_of_alike
from sparseinst_jax.data.file_search import FileSearch
from sparseinst_jax.data.images import image_suffixes
from sparseinst_jax.data.importers import (
    cityscapes_ade20k,
    coco_content,
    labelme,
    mask_images,
    mask_values,
    via,
    yolo,
)
from sparseinst_jax.data.importers.objects import Imported, LabelledImage
from sparseinst_jax.runtime.files import check_writable
from sparseinst_jax.runtime.messages import listed

_OF_TOOLS = ("yolo", "labelme", "via", "masks")  # whose classes are the user's
FORMATS = (*_OF_TOOLS, *cityscapes_ade20k.LAYOUTS)
MAX_FAULTS_SHOWN = 20
MANY_OBJECTS = 10  # that cannot all have one number of corners by chance
_OUTPUTS = {"train": "--output", "val": "--val-output", "test": "--test-output"}
_DESCRIPTION = """\
Make a COCO json of labels in another format.

  sparseinst import-data yolo DATASET --output train.json
  sparseinst import-data labelme FOLDER --output train.json --val-output val.json --val-share 0.2
  sparseinst import-data via project.json --images photos --output train.json
  sparseinst import-data masks MASKS --layout objects --images photos --output train.json
  sparseinst import-data cityscapes CITYSCAPES --output train.json --val-output val.json
  sparseinst import-data ade20k ADEChallengeData2016 --output train.json --val-output val.json

A data set that is divided into train, valid and test stays so: --output, --val-output and
--test-output write one part each. A COCO json needs no import.
docs/import_data.md says what each format must look like.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code.

    Raises:
        FileNotFoundError: the source or the image folder is missing.
        ValueError: something cannot be read and `--skip-faulty` is not given, or written.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.format == "coco":
        print(_answer_coco(Path(arguments.source)), file=sys.stderr)
        return 2
    outputs = _checked_outputs(parser, arguments)
    for part, path in outputs.items():
        check_writable(path.parent, _OUTPUTS[part])
        coco_content.refuse_foreign_file(path)
    imported = _read(arguments, list(outputs.values()))
    if arguments.format in _OF_TOOLS[1:]:  # the others say it themselves
        origin = "the labels, in the order of the alphabet"
        given = {"--class": arguments.class_name, "--names": arguments.names}
        imported.notes.append(f"class names from {next((o for o in given if given[o]), origin)}")
    _exclude(imported, arguments.exclude)
    print("\n".join(imported.notes), flush=True)
    _report_faults(imported, arguments.source, arguments.skip_faulty)
    parts, lines = coco_content.divide(
        imported.images,
        outputs,
        arguments.val_share,
        arguments.seed,
        keeps_parts=not arguments.ignore_parts,
    )
    contents = {
        path: coco_content.make_content(parts[part], imported.class_names)
        for part, path in outputs.items()
    }
    coco_content.write_jsons(contents)
    for part, path in outputs.items():
        lines += _summary(path, parts[part], imported.class_names)
    print("\n".join(lines))
    for line in [*warn_of_alike(imported.class_names), *_warn_of_corners(imported.images)]:
        print(f"WARNING: {line}")
    print("\n".join(_next_commands(arguments.format, outputs, imported.images_dir)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("import-data", _DESCRIPTION)
    add = parser.add_argument
    add("format", metavar="FORMAT", choices=(*FORMATS, "coco"), help=", ".join(FORMATS))
    add("source", metavar="SOURCE", help="folder of the labels; of via the json file")
    add("--images", metavar="DIR", help="folder that file_name is relative to; default: by format")
    add("--output", metavar="JSON", help="the COCO json to write")
    add("--val-output", metavar="JSON", help="a second json, of the validation part or held out")
    add("--test-output", metavar="JSON", help="a json of the test part, where there is one")
    share = coco_content.DEFAULT_VAL_SHARE
    add("--val-share", type=float, help=f"share of the images held out, default {share}")
    add("--seed", type=int, default=0, help="another number holds out other images, default 0")
    add("--ignore-parts", action="store_true", help="divide anew what is divided already")
    add("--names", metavar="NAME", nargs="+", help="the classes in their order; others are faults")
    add("--exclude", metavar="NAME", nargs="+", default=(), help="classes that are left out")
    add("--attribute", metavar="NAME", help="via: region attribute that holds the class")
    add("--layout", choices=mask_images.LAYOUTS, help="masks: an image an object, or a map of all")
    add("--class", metavar="NAME", dest="class_name", help="via, masks: class of every object")
    add(
        "--ignore-value",
        metavar="N",
        nargs="+",
        type=mask_values.parse_value,
        help="masks: values of maps that are no objects, such as 255 or the colour 224,224,192",
    )
    add("--skip-faulty", action="store_true", help="leave out and list what cannot be read")
    return parser


def _checked_outputs(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace
) -> dict[str, Path]:
    """The file of each part; stops with a message and exit code 2 where options do not agree."""
    if arguments.output is None:
        parser.error("the following arguments are required: --output")
    for option, value, formats in (
        ("--names", arguments.names, _OF_TOOLS),
        ("--attribute", arguments.attribute, ("via",)),
        ("--layout", arguments.layout, ("masks",)),
        ("--class", arguments.class_name, ("via", "masks")),
        ("--ignore-value", arguments.ignore_value, ("masks",)),
    ):
        if value is not None and arguments.format not in formats:
            parser.error(f"{option} is for {' and '.join(formats)}, not for {arguments.format}")
    if arguments.format == "masks" and arguments.layout is None:
        parser.error(
            "masks need --layout objects (a folder for each image, an image for each object) or "
            "--layout indexed (one image whose values number the objects)"
        )
    if arguments.ignore_value and arguments.layout != "indexed":
        parser.error("--ignore-value is for --layout indexed")
    share = arguments.val_share
    if share is not None and arguments.val_output is None:
        parser.error("--val-share needs --val-output JSON")
    if share is not None and not 0 < share < 1:
        parser.error(f"--val-share must lie between 0 and 1, got {share}")
    if arguments.names is not None:
        arguments.names = [name.strip() for name in arguments.names]
        if len(set(arguments.names)) < len(arguments.names) or "" in arguments.names:
            parser.error(f"--names must be different and not empty, got {arguments.names}")
    given = {"train": arguments.output, "val": arguments.val_output, "test": arguments.test_output}
    outputs = {part: Path(path) for part, path in given.items() if path is not None}
    if len({path.resolve() for path in outputs.values()}) < len(outputs):
        parser.error(f"{', '.join(_OUTPUTS[part] for part in outputs)} must be different files")
    return outputs


def _answer_coco(source: Path) -> str:
    """What to do with a COCO json instead of importing it."""
    jsons = [source]
    if source.is_dir():
        jsons = FileSearch().find(source, {".json"})[:5] or [source / "train.json"]
    lines = ["A COCO json needs no import, it is read as it is. Next:"]
    for path in jsons:
        beside = path.is_file() and any(
            other.suffix.lower() in image_suffixes() for other in path.parent.iterdir()
        )
        images = shlex.quote(str(path.parent)) if beside else "PHOTOS"
        lines.append(f"  sparseinst check-data {shlex.quote(str(path))} --images {images}")
    return "\n".join(lines)


def _exclude(imported: Imported, excluded: Sequence[str]) -> None:
    """Leave out the objects of classes.

    Raises:
        ValueError: there is no such class.
    """
    unknown = [name for name in excluded if name not in imported.class_names]
    if unknown:
        raise ValueError(
            f"--exclude: there is no class {listed(map(repr, unknown))}; the classes: "
            f"{listed(imported.class_names, 20)}"
        )
    if not excluded:
        return
    count = 0
    for image in imported.images:
        kept = [found for found in image.objects if found.class_name not in excluded]
        count += len(image.objects) - len(kept)
        image.objects = kept
        image.crowd = [found for found in image.crowd if found.class_name not in excluded]
    imported.class_names = tuple(n for n in imported.class_names if n not in excluded)
    imported.notes.append(f"{count} objects of {listed(excluded)}: left out, trained as background")


def _read(arguments: argparse.Namespace, outputs: list[Path]) -> Imported:
    source = Path(arguments.source)
    images_dir = None if arguments.images is None else Path(arguments.images)
    if arguments.format in cityscapes_ade20k.LAYOUTS:
        return cityscapes_ade20k.read_published(arguments.format, source, images_dir)
    named = {"class_name": arguments.class_name}
    of_maps = {"layout": arguments.layout, "ignored": arguments.ignore_value or ()}
    readers: dict[str, tuple[Any, dict[str, Any]]] = {
        "yolo": (yolo.read_yolo, {}),
        "labelme": (labelme.read_labelme, {"excluded": outputs}),
        "via": (via.read_via, {"attribute": arguments.attribute, **named}),
        "masks": (mask_images.read_masks, {**of_maps, **named}),
    }
    read, options = readers[arguments.format]
    return read(source, images_dir, arguments.names, **options)


def _report_faults(imported: Imported, source: str, skip_faulty: bool) -> None:
    """List the faults that are skipped, or raise a ValueError where none may be."""
    lines = imported.faults.lines
    if lines and not skip_faulty:
        shown = listed(lines, MAX_FAULTS_SHOWN, "\n  ")
        raise ValueError(
            f"{source}: {len(lines)} fault(s), so nothing was written:\n  {shown}\n"
            "Correct them, or give --skip-faulty, which leaves these objects and images out and "
            "lists them all; an object that is left out is trained as background."
        )
    for line in lines:
        print(f"skipped: {line}", file=sys.stderr)
    if not any(image.objects for image in imported.images):
        raise ValueError(
            f"{source}: none of the {len(imported.images)} images has an object that can be read; "
            "nothing was written"
        )


def _summary(path: Path, images: Sequence[LabelledImage], names: Sequence[str]) -> list[str]:
    counts = Counter(found.class_name for image in images for found in image.objects)
    shown = listed((f"{name} {counts[name]}" for name in names), 20)
    empty = sum(not image.objects for image in images)
    crowd = sum(len(image.crowd) for image in images)
    lines = [
        f"{path}: {len(images)} images ({empty} without objects), {counts.total()} objects"
        + (f", {crowd} crowd regions" if crowd else ""),
        f"  objects of each class: {shown}",
    ]
    unseen = [name for name in names if not counts[name]]
    if unseen:
        lines.append(f"  WARNING: no object of: {listed(unseen)}")
    return lines


def _warn_of_corners(images: Sequence[LabelledImage]) -> list[str]:
    """Warn where all objects have one number of corners: they are no outlines then."""
    shapes = [found.segmentation for image in images for found in image.objects]
    corners = {len(s[0]) // 2 if isinstance(s, list) and len(s) == 1 else 0 for s in shapes}
    number = corners.pop()
    if corners or not number or (number != 4 and len(shapes) < MANY_OBJECTS):
        return []
    what = "boxes, or oriented boxes," if number == 4 else "boxes and keypoints"
    return [
        f"all {len(shapes)} objects have exactly {number} corners: are these {what} "
        "instead of outlines? Masks are learned as they are drawn"
    ]


def _next_commands(form: str, outputs: Mapping[str, Path], images_dir: Path) -> list[str]:
    """The commands to run next, ready to paste."""
    images = shlex.quote(str(images_dir))
    check = f"  sparseinst check-data {shlex.quote(str(outputs['train']))} --images {images}"
    if "val" in outputs:
        check += f" --val-json {shlex.quote(str(outputs['val']))}"
    train = []
    for part in ("train", "val"):
        if part in outputs:
            train.append(
                f"--config.data.{part}.annotations={shlex.quote(str(outputs[part]))} "
                f"--config.data.{part}.images={images}"
            )
    if "val" not in outputs:
        train.append("--config.train.eval_every=0  # or hold images out with --val-output")
    recipe = GENERAL
    if form in cityscapes_ade20k.LAYOUTS:
        recipe = f"--config=fastinst_r50_x1_{form}", "--init-from=fastinst_r50_x1"
    return ["Next:", check, train_command(train, recipe)]
