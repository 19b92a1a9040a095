"""`sparseinst predict`: pictures and COCO results of images and folders, and drawn videos."""

from __future__ import annotations

import argparse
import glob
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from sparseinst_jax.cli import command_parser
from sparseinst_jax.cli.arguments import (
    NamedModel,
    add_model_arguments,
    check_arguments,
    is_exported,
    open_model,
    parse_command_line,
    words_of_model,
    workdir_of,
)
from sparseinst_jax.cli.predicted_labels import FORMS, PredictedLabels
from sparseinst_jax.data.file_search import FileSearch
from sparseinst_jax.data.images import as_rgb, image_suffixes, refuse_address
from sparseinst_jax.runner.prediction import SHOWN_SCORE, Prediction
from sparseinst_jax.runner.predictor import BasePredictor
from sparseinst_jax.runner.video import WRITTEN, is_camera, is_video, predict_video
from sparseinst_jax.runtime.files import check_writable, unique_names, write_json
from sparseinst_jax.runtime.messages import counted, listed, next_commands, printable, rounded
from sparseinst_jax.runtime.progress import map_ahead, with_progress
from sparseinst_jax.runtime.stop_signals import EXIT_CODES, StopSignals

BATCH_SIZE = 8  # images that an accelerator gets together
MOST_PROCESSES = 16  # that draw the frames of a video beside an accelerator
LOW_SCORE = 0.01  # the configurations keep all above 0.005
DESCRIPTION = """\
Find the objects of images: a picture for each, <name>.png, and predictions.json. Objects without a
pixel at the size of the photo, which `sparseinst eval` writes for COCO's rules, are left out. Of a
video or a camera (its number, 0): a video with the objects drawn.

  sparseinst predict --workdir RUN photo.jpg folder 'more/*.jpg' list.txt --output out
  sparseinst predict --weights giam_r50_aug photo.jpg --output out
  sparseinst predict --workdir RUN folder --output out --to labelme --to table
  sparseinst predict --workdir RUN clip.mp4 --output drawn.mp4
  sparseinst predict --workdir RUN 0 --output camera.mp4
"""


def list_images(inputs: Sequence[str | Path], excluded: Path) -> tuple[list[Path], list[str]]:
    """Replace folders by the images in and below them, sorted by name, and patterns by files.

    Args:
        inputs: files, folders and patterns such as "photos/*.jpg"; a file is taken whatever its
            suffix.
        excluded: a folder that is left out, the output's.

    Returns:
        The files, each once, and lines on what of the folders was left out.

    Raises:
        FileNotFoundError: there is no such file; names all.
        ValueError: there is no image at all.
    """
    search = FileSearch(follows_links=True, excluded=excluded)
    suffixes = image_suffixes()
    found: list[Path] = []
    missing = []
    for given in inputs:
        refuse_address(given)
        is_pattern = not os.path.lexists(given) and glob.has_magic(str(given))
        paths = sorted(glob.glob(str(given), recursive=True)) if is_pattern else [given]
        missing += [f"{given} (no file matches)"] * (not paths)
        missing += [str(path) for path in paths if not os.path.exists(path)]
        for path in map(Path, paths):
            found += search.find(path, suffixes) if path.is_dir() else [path]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the images do not exist, so nothing was predicted:\n  "
            + listed(missing, between="\n  ")
            + "\nGive files, folders, or a pattern such as 'photos/*.jpg'."
        )
    if not found:
        names = ", ".join(map(str, inputs))
        raise search.nothing(f"no image in {names}: give image files or folders")
    return list(dict.fromkeys(found)), search.left_out()


class PredictedFile(NamedTuple):
    """What became of an image file.

    Attributes:
        path: of the file.
        entries: its detections in COCO results format, with `file_name`.
        best: the highest score, 0 where nothing is found.
        fault: why it could not be read; empty if it could.
    """

    path: Path
    entries: list[dict[str, Any]]
    best: float
    fault: str = ""


def predict_files(
    predictor: BasePredictor,
    paths: Sequence[Path],
    output: Path,
    score_threshold: float = SHOWN_SCORE,
    also: Callable[[int, Prediction], None] = lambda number, prediction: None,
) -> list[PredictedFile]:
    """Predict image files and draw each as `<name>.png`; read, compute and draw at the same time.

    Args:
        predictor: the model; images of one padded size go through it `batch_size` at a time.
        paths: image files; the place of a file is its `image_id`.
        output: folder of the pictures.
        score_threshold: lowest score that is drawn; the results hold every detection.
        also: gets the place of each file and its prediction, in threads.
    """
    output.mkdir(parents=True, exist_ok=True)
    together = 2 * predictor.num_together

    def read(path: Path) -> np.ndarray | str:
        try:
            return as_rgb(path)
        except (FileNotFoundError, ValueError) as error:
            return str(error)  # names the file

    def predict() -> Iterator[tuple[int, Prediction | str]]:
        images = enumerate(map_ahead(pool, read, paths, ahead=2 + together))
        while items := list(itertools.islice(images, together)):
            readable = [image for _, image in items if isinstance(image, np.ndarray)]
            found = iter(predictor.predict_batch(readable))
            for image_id, image in items:
                yield image_id, image if isinstance(image, str) else next(found)

    def draw(item: tuple[int, Prediction | str]) -> PredictedFile:
        image_id, found = item
        path = paths[image_id]
        if isinstance(found, str):
            return PredictedFile(path, [], 0.0, found)
        found.save(output / f"{names[image_id]}.png", score_threshold)
        also(image_id, found)
        entries = [{**entry, "file_name": str(path)} for entry in found.to_coco(image_id)]
        return PredictedFile(path, entries, max((entry["score"] for entry in entries), default=0.0))

    names = unique_names(paths)
    with ThreadPoolExecutor(2) as pool:
        drawn = map_ahead(pool, draw, predict(), ahead=2)
        return list(with_progress(drawn, len(paths), sys.stderr, "predicted"))


def describe(files: Sequence[PredictedFile], output: Path, score_threshold: float) -> list[str]:
    """Say what was found in images, and in which of them nothing was."""
    read = [file for file in files if not file.fault]
    scores = [entry["score"] for file in read for entry in file.entries]
    shown = sum(score >= score_threshold for score in scores)
    empty = [file for file in read if not file.entries or file.best < score_threshold]
    lines = [
        f"{counted(shown, 'object')} above {score_threshold:g} in {counted(len(read), 'image')}: "
        f"{output / '*.png'}",
        f"{counted(len(scores), 'object')} of any score: {output / 'predictions.json'}",
    ]
    if empty and read:
        best = (f"{file.path} (best {file.best:.2f})" for file in empty)
        lines.append(f"no object above {score_threshold:g} in {len(empty)}: {listed(best, 5)}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code, 1 where an image could not be read."""
    arguments = parse_command_line(_parser(), argv)
    check_arguments(arguments)
    output = Path(arguments.output or workdir_of(arguments) / "predictions")
    inputs = expand_inputs(arguments.inputs)
    # What is missing is said for images and videos together.
    videos = [
        each for each in inputs if is_video(each) and (is_camera(each) or os.path.exists(each))
    ]
    others = [each for each in inputs if each not in videos]
    if output.suffix.lower() in WRITTEN and (others or len(videos) > 1):
        raise ValueError(
            f"--output {output} is one video, and there are {counted(len(inputs), 'input')}: give "
            "a folder"
        )
    check_writable(output, "--output")
    paths, left_out = list_images(others, output) if others else ([], [])
    print("".join(f"{line}\n" for line in left_out), end="", file=sys.stderr)
    same = [*words_of_model(arguments), *arguments.inputs, f"--output={output}"]
    same += [f"--to={form}" for form in arguments.to]
    _choose_batches(arguments, is_live=any(map(is_camera, videos)), only_shown=not paths)
    source = open_model(arguments)
    code = _predict_images(source, paths, output, arguments) if paths else 0
    if videos:
        print(f"{source.title}, on {counted(len(videos), 'video')}")
        code = _predict_videos(source.predictor, videos, output, arguments) or code
    lower = f"--score-threshold={arguments.score_threshold / 2:g}"
    print(next_commands(["sparseinst", "predict", *same, lower]))
    return code


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("predict", DESCRIPTION)
    add = parser.add_argument
    add_model_arguments(parser)
    add(
        "inputs",
        metavar="INPUT",
        nargs="+",
        help="image, folder, pattern, .txt with one of these a line; video, or a camera's number",
    )
    add(
        "--output",
        metavar="PATH",
        help="folder, or the file of one video; default: <workdir>/predictions",
    )
    add(
        "--score-threshold",
        type=float,
        default=SHOWN_SCORE,
        help=f"lowest score that is drawn, default {SHOWN_SCORE}; predictions.json holds all",
    )
    add(
        "--to",
        choices=tuple(FORMS),
        action="append",
        default=[],
        help="; ".join(f"{name}: also {what}" for name, what in FORMS.items())
        + "; may be given several times; of images",
    )
    return parser


def expand_inputs(inputs: Sequence[str]) -> list[str]:
    """Replace files .txt by what their lines name, and patterns by the files that they match.

    A pattern that matches nothing stays.

    Raises:
        FileNotFoundError: there is no such list.
        ValueError: it is no text.
    """
    found = []
    for given in inputs:
        if given.lower().endswith(".txt") and not glob.has_magic(given):
            found += expand_inputs(_read_list(given))
        elif glob.has_magic(given) and not os.path.lexists(given):
            found += sorted(glob.glob(given, recursive=True)) or [given]
        else:
            found.append(given)
    return list(dict.fromkeys(found))


def _read_list(path: str) -> list[str]:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no list {path}: a text file with a path in each line")
    try:
        lines = Path(path).read_text().splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no list: it is no text ({error.reason})") from error
    # A list in a list would have no end.
    return [line.strip() for line in lines if line.strip() and not line.strip().endswith(".txt")]


def _choose_batches(arguments: argparse.Namespace, *, is_live: bool, only_shown: bool) -> None:
    """Set how many images go together, and leave out early what no picture shows."""
    if is_exported(arguments):  # what it was exported with
        return
    if jax.default_backend() != "cpu" and not is_live:  # a CPU is as fast with one as with several
        arguments.overrides.setdefault("eval.batch_size", str(BATCH_SIZE))
    if only_shown and arguments.score_threshold > LOW_SCORE:
        # Scores only become less on the way to the picture.
        arguments.overrides.setdefault("eval.score_threshold", str(arguments.score_threshold))


def _predict_images(
    source: NamedModel, paths: Sequence[Path], output: Path, arguments: argparse.Namespace
) -> int:
    print(f"{source.title}, on {counted(len(paths), 'image')}")
    threshold = arguments.score_threshold
    labels = PredictedLabels(arguments.to, paths, output, threshold)
    files = predict_files(source.predictor, paths, output, threshold, labels.add)
    write_json(output / "predictions.json", [entry for file in files for entry in file.entries])
    print("\n".join([*describe(files, output, threshold), *labels.write()]))
    faults = [file.fault for file in files if file.fault]
    for fault in faults:
        print(f"failed: {printable(fault)}", file=sys.stderr)
    return 1 if faults else 0


def _predict_videos(
    predictor: BasePredictor, videos: Sequence[str], output: Path, arguments: argparse.Namespace
) -> int:
    """Draw videos; a signal ends one in the middle, and leaves what was drawn."""
    names = unique_names([f"camera{each}" if each.isdecimal() else each for each in videos])
    code = 0
    for video, name in zip(videos, names, strict=True):
        suffix = Path(video).suffix.lower()
        target = output / f"{name}{suffix if suffix in WRITTEN else '.mp4'}"
        target = output if output.suffix.lower() in WRITTEN else target
        start = time.monotonic()
        with StopSignals("finishing the video") as stop:
            done = predict_video(
                predictor,
                video,
                target,
                arguments.score_threshold,
                should_stop=lambda stop=stop: stop.received is not None,
                num_processes=min(os.cpu_count() or 1, MOST_PROCESSES)
                * (jax.default_backend() != "cpu"),
            )
        seconds = time.monotonic() - start
        print(
            f"{target}: {counted(done.frames, 'frame')}, {rounded(done.frames / seconds)} a second"
        )
        if done.dropped:
            print(f"  {counted(done.dropped, 'frame')} of the camera came too fast: left out")
        if done.damaged:
            print(
                f"  {counted(done.damaged, 'piece')} of {video} cannot be decoded", file=sys.stderr
            )
            code = 1
        if stop.received is not None:
            print(f"  stopped by {stop.received.name}")
            return EXIT_CODES[stop.received]
    return code
