"""`sparseinst import-data`: turn the labels of other tools into a COCO json."""

import argparse
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sparseinst_jax.data.importers import coco_content, labelme, mask_images, mask_values, via, yolo
from sparseinst_jax.data.importers.objects import Imported, LabelledImage
from sparseinst_jax.runtime.files import check_writable
from sparseinst_jax.runtime.messages import listed

FORMATS = ("yolo", "labelme", "via", "masks")
DEFAULT_VAL_SHARE = 0.2
MAX_FAULTS_SHOWN = 20
_DESCRIPTION = """\
Make a COCO json of labels in another format.

  sparseinst import-data yolo DATASET --output train.json
  sparseinst import-data labelme FOLDER --output train.json --val-output val.json --val-share 0.2
  sparseinst import-data via project.json --images photos --output train.json
  sparseinst import-data masks MASKS --layout objects --images photos --output train.json

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
    _check_arguments(parser, arguments)
    outputs = [Path(p) for p in (arguments.output, arguments.val_output) if p is not None]
    for path, option in zip(outputs, ("--output", "--val-output"), strict=False):
        check_writable(path.parent, option)
        coco_content.refuse_foreign_file(path)
    imported = _read(arguments, outputs)
    _report_faults(imported, arguments.source, arguments.skip_faulty)
    parts = [imported.images]
    if arguments.val_output is not None:
        share = DEFAULT_VAL_SHARE if arguments.val_share is None else arguments.val_share
        parts = list(coco_content.split_images(imported.images, share, arguments.seed))
    contents = {
        path: coco_content.make_content(images, imported.class_names)
        for path, images in zip(outputs, parts, strict=True)
    }
    coco_content.write_jsons(contents)
    for line in imported.notes:
        print(line)
    for path, images in zip(outputs, parts, strict=True):
        print("\n".join(_summary(path, images, imported.class_names)))
    for line in _warnings(imported.class_names):
        print(line)
    print("\n".join(_next_commands(outputs, imported.images_dir)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sparseinst import-data",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("format", metavar="FORMAT", choices=FORMATS, help=", ".join(FORMATS))
    add("source", metavar="SOURCE", help="folder of the labels; of via the json file")
    add("--images", metavar="DIR", help="folder that file_name is relative to; default: by format")
    add("--output", metavar="JSON", required=True, help="the COCO json to write")
    add("--val-output", metavar="JSON", help="a second json, of images held out for validation")
    add("--val-share", type=float, help=f"their share of the images, default {DEFAULT_VAL_SHARE}")
    add("--seed", type=int, default=0, help="another number holds out other images, default 0")
    add("--names", metavar="NAME", nargs="+", help="the classes in their order; others are faults")
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


def _check_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Stop with a message and exit code 2 where options do not go together."""
    for option, value, formats in (
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
    if arguments.val_output is not None:
        if Path(arguments.val_output).resolve() == Path(arguments.output).resolve():
            parser.error("--output and --val-output must be two files")
    if arguments.names is not None:
        arguments.names = [name.strip() for name in arguments.names]
        if len(set(arguments.names)) < len(arguments.names) or "" in arguments.names:
            parser.error(f"--names must be different and not empty, got {arguments.names}")


def _read(arguments: argparse.Namespace, outputs: list[Path]) -> Imported:
    source = Path(arguments.source)
    images_dir = None if arguments.images is None else Path(arguments.images)
    names = arguments.names
    if arguments.format == "yolo":
        return yolo.read_yolo(source, images_dir, names)
    if arguments.format == "labelme":
        return labelme.read_labelme(source, images_dir, names, excluded=outputs)
    if arguments.format == "via":
        return via.read_via(
            source,
            images_dir,
            names,
            attribute=arguments.attribute,
            class_name=arguments.class_name,
        )
    return mask_images.read_masks(
        source,
        images_dir,
        names,
        layout=arguments.layout,
        class_name=arguments.class_name,
        ignored=arguments.ignore_value or (),
    )


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
    lines = [
        f"{path}: {len(images)} images ({empty} without objects), {counts.total()} objects",
        f"  objects of each class: {shown}",
    ]
    unseen = [name for name in names if not counts[name]]
    if unseen:
        lines.append(f"  WARNING: no object of: {listed(unseen)}")
    return lines


def _warnings(names: Sequence[str]) -> list[str]:
    """Warn of classes that differ only in capitals or spaces."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault("".join(name.casefold().split()), []).append(name)
    return [
        f"WARNING: the classes {', '.join(map(repr, group))} are probably one; correct the labels"
        for group in alike.values()
        if len(group) > 1
    ]


def _next_commands(outputs: Sequence[Path], images_dir: Path) -> list[str]:
    """The commands to run next, ready to paste."""
    images = shlex.quote(str(images_dir))
    check = f"  sparseinst check-data {shlex.quote(str(outputs[0]))} --images {images}"
    check += "".join(f" --val-json {shlex.quote(str(path))}" for path in outputs[1:])
    train = ["  sparseinst train --config finetune"]
    for part, path in zip(("train", "val"), outputs, strict=False):
        train.append(
            f"--config.data.{part}.annotations={shlex.quote(str(path))} "
            f"--config.data.{part}.images={images}"
        )
    if len(outputs) == 1:
        train.append("--config.train.eval_every=0  # or hold images out with --val-output")
    return ["Next:", check, " \\\n    ".join(train)]
