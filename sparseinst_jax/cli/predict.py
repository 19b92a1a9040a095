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
from sparseinst_jax.data.file_search import FileSearch
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


def list_images(inputs: Sequence[str | Path], excluded: Path) -> tuple[list[Path], list[str]]:
    """Replace folders by the images in and below them, sorted by name.

    Args:
        inputs: files and folders; a file is taken whatever its suffix, and if it is missing.
        excluded: a folder that is left out, the output's.

    Returns:
        The files, each once, and lines on what of the folders was left out.

    Raises:
        ValueError: there is no image at all.
    """
    search = FileSearch(follows_links=True, excluded=excluded)
    suffixes = image_suffixes()
    found: list[Path] = []
    for path in map(Path, inputs):
        found += search.find(path, suffixes) if path.is_dir() else [path]
    if not found:
        names = ", ".join(map(str, inputs))
        raise search.nothing(f"no image in {names}: give image files or folders")
    return list(dict.fromkeys(found)), search.left_out()


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
    paths, left_out = list_images(arguments.inputs, output)
    print("".join(f"{line}\n" for line in left_out), end="", file=sys.stderr)
    source = open_model(arguments)
    print(f"{source.title}, on {len(paths)} images")
    results, faults = predict_files(source.predictor, paths, output, arguments.score_threshold)
    write_json(output / "predictions.json", results)
    print(f"{len(paths) - len(faults)} pictures: {output / '*.png'}")
    print(f"{len(results)} detections: {output / 'predictions.json'}")
    for fault in faults:
        print(f"failed: {printable(fault)}", file=sys.stderr)
    return 1 if faults else 0
