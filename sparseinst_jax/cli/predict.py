"""`sparseinst predict`: pictures and COCO results of images and folders."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparseinst_jax.cli.arguments import (
    add_model_arguments,
    check_arguments,
    open_model,
    parse_command_line,
    workdir_of,
)
from sparseinst_jax.data.images import image_suffixes
from sparseinst_jax.inference.prediction import SHOWN_SCORE
from sparseinst_jax.inference.predictor import Predictor, as_rgb
from sparseinst_jax.runtime.files import check_writable, unique_names, write_json
from sparseinst_jax.runtime.messages import printable
from sparseinst_jax.runtime.progress import ImageProgress

DESCRIPTION = """\
Find the objects of images: a picture for each, <name>.png, and predictions.json.

  sparseinst predict --workdir RUN photo.jpg folder --output out
  sparseinst predict --config FILE --weights FILE photo.jpg --output out
"""


def list_images(inputs: Sequence[str | Path], excluded: Path) -> list[Path]:
    """Replace folders by the images in and below them, sorted by name.

    Args:
        inputs: files and folders; a file is taken whatever its suffix, and if it is missing.
        excluded: a folder that is left out, the output's.

    Raises:
        ValueError: there is no image at all.
    """
    suffixes = image_suffixes()
    excluded = excluded.resolve()
    found: list[Path] = []
    for path in map(Path, inputs):
        if not path.is_dir():
            found.append(path)
            continue
        found += [
            child
            for child in sorted(path.rglob("*"))
            if child.suffix.lower() in suffixes
            and child.is_file()
            and not child.resolve().is_relative_to(excluded)
        ]
    if not found:
        raise ValueError(f"no image in {', '.join(map(str, inputs))}: give image files or folders")
    return list(dict.fromkeys(found))


def predict_files(
    predictor: Predictor,
    paths: Sequence[Path],
    output: Path,
    score_threshold: float = SHOWN_SCORE,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Predict image files one by one and draw each as `<name>.png`.

    Args:
        predictor: the model.
        paths: image files.
        output: folder of the pictures.
        score_threshold: lowest score that is drawn; the results hold every detection.

    Returns:
        The detections in COCO results format, `image_id` the place of the file in `paths` and
        `file_name` its path; and a line for each file that could not be read.
    """
    output.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    faults: list[str] = []
    names = unique_names(paths)
    with ImageProgress(len(paths), sys.stderr, "predicted") as line:
        for image_id, (path, name) in enumerate(zip(paths, names, strict=True)):
            try:
                image = as_rgb(path)
            except (FileNotFoundError, ValueError) as error:
                faults.append(str(error))  # names the file
            else:
                prediction = predictor(image)
                prediction.save(output / f"{name}.png", score_threshold)
                entries = prediction.to_coco(image_id)
                results += [{**entry, "file_name": str(path)} for entry in entries]
            line.advance(1)
    return results, faults


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code, 1 where an image could not be read."""
    parser = argparse.ArgumentParser(
        prog="sparseinst predict",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    parser.add_argument("inputs", metavar="IMAGE_OR_FOLDER", nargs="+")
    parser.add_argument("--output", metavar="DIR", help="default: <workdir>/predictions")
    parser.add_argument(
        "--score-threshold",
        type=float,
        default=SHOWN_SCORE,
        help=f"lowest score that is drawn, default {SHOWN_SCORE}; predictions.json holds all",
    )
    arguments = parse_command_line(parser, argv)
    check_arguments(arguments)
    output = Path(arguments.output or workdir_of(arguments) / "predictions")
    check_writable(output, "--output")
    paths = list_images(arguments.inputs, output)
    source = open_model(arguments)
    print(f"{source.title}, on {len(paths)} images")
    results, faults = predict_files(source.predictor, paths, output, arguments.score_threshold)
    write_json(output / "predictions.json", results)
    print(f"{len(paths) - len(faults)} pictures: {output / '*.png'}")
    print(f"{len(results)} detections: {output / 'predictions.json'}")
    for fault in faults:
        print(f"failed: {printable(fault)}", file=sys.stderr)
    return 1 if faults else 0
