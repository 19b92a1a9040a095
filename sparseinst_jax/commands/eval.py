"""The command `eval.py`: COCO mask AP of a run, a checkpoint, a weight file or a results file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sparseinst_jax import visualize
from sparseinst_jax.commands.model_source import (
    add_model_arguments,
    check_arguments,
    draw_missing_data,
    open_source,
    stored_config,
    unique_names,
    workdir_of,
)
from sparseinst_jax.config import parse_command_line
from sparseinst_jax.data.coco import CocoDataset, ImageRecord, decode_mask, load_coco, read_record
from sparseinst_jax.evaluation.coco_metrics import CocoMetrics, evaluate
from sparseinst_jax.evaluation.evaluator import evaluate_dataset, write_json
from sparseinst_jax.prediction import Prediction
from sparseinst_jax.predictor import Predictor

NUM_PICTURES = 8
DESCRIPTION = """\
Score a model on config.data.val: COCO mask AP, a table for each class, predictions and pictures.

  eval.py --workdir RUN                     the last checkpoint of a run
  eval.py --checkpoint RUN/checkpoints/600  this checkpoint
  eval.py --config FILE --weights FILE      weights of the original release, .npz or .safetensors
  eval.py --workdir RUN --predictions FILE  a COCO results file: no model, no image is opened
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="eval.py",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="default: <workdir>/eval; with --predictions <workdir>/eval/<name of the file>",
    )
    parser.add_argument(
        "--predictions", metavar="FILE", help="score this COCO results file instead of a model"
    )
    parser.add_argument(
        "--pictures",
        metavar="N",
        type=int,
        default=NUM_PICTURES,
        help=f"pictures to draw, prediction beside annotation; default {NUM_PICTURES}",
    )
    arguments = parse_command_line(parser, argv)
    check_arguments(arguments)
    output = Path(arguments.output) if arguments.output else workdir_of(arguments) / "eval"
    if arguments.predictions:
        if not arguments.output:
            # The folder itself holds what the run's own model reaches.
            output /= Path(arguments.predictions).stem
        _score_file(arguments, output)
    else:
        _score_model(arguments, output)
    return 0


def _score_file(arguments: argparse.Namespace, output: Path) -> None:
    config = stored_config(arguments)
    draw_missing_data(config)
    load_coco(config.data.val.annotations, None)  # names every fault of the json
    metrics = evaluate(config.data.val.annotations, arguments.predictions)
    print(f"{arguments.predictions} against {config.data.val.annotations}\n")
    _report(metrics, output)


def _score_model(arguments: argparse.Namespace, output: Path) -> None:
    source = open_source(arguments)
    config = source.config
    draw_missing_data(config)
    dataset = load_coco(config.data.val.annotations, config.data.val.images)
    print(f"{source.title}, on {config.data.val.annotations} ({len(dataset.records)} images)")
    results, metrics = evaluate_dataset(
        source.predictor,
        dataset,
        num_workers=max(1, config.data.num_workers),
        progress=sys.stderr,
    )
    write_json(output / "predictions.json", results)
    print(f"{len(results)} detections: {output / 'predictions.json'}")
    draw_pictures(source.predictor, dataset, results, output, arguments.pictures)
    if metrics is None:
        # Of an earlier evaluation into this folder; it would seem to belong to these predictions.
        (output / "metrics.json").unlink(missing_ok=True)
        print("the json has no annotations: predicted, not scored")
    else:
        print()
        _report(metrics, output)


def _report(metrics: CocoMetrics, output: Path) -> None:
    write_json(output / "metrics.json", metrics.as_dict(), indent=2)
    print(metrics.table())
    print(f"\nnumbers in percent; as fractions in {output / 'metrics.json'}")


def draw_pictures(
    predictor: Predictor,
    dataset: CocoDataset,
    results: Sequence[Mapping[str, Any]],
    output: Path,
    count: int,
) -> list[Path]:
    """Draw some images of a data set, spread evenly over it, with what was found in them.

    Args:
        predictor: gives the classes.
        dataset: with its image folder.
        results: detections of the whole data set in COCO results format.
        output: folder of the pictures, `<name of the image>.png`.
        count: how many.

    Returns:
        The paths. An image with annotations has them drawn beside the detections.
    """
    count = min(count, len(dataset.records))
    if count <= 0:
        return []
    output.mkdir(parents=True, exist_ok=True)
    chosen = [dataset.records[index * len(dataset.records) // count] for index in range(count)]
    wanted = {record.image_id for record in chosen}
    found: dict[int, list[Mapping[str, Any]]] = {image_id: [] for image_id in wanted}
    for entry in results:
        if entry["image_id"] in wanted:
            found[entry["image_id"]].append(entry)
    names = unique_names([record.file_name for record in chosen])
    paths = []
    for record, name in zip(chosen, names, strict=True):
        image = read_record(record)
        picture = _prediction(image, found[record.image_id], dataset).plot()
        if dataset.has_annotations:
            truth = _draw_annotations(image, record, dataset)
            picture = visualize.beside([picture, truth], ["predicted", "annotated"])
        paths.append(output / f"{name}.png")
        picture.save(paths[-1])
    print(f"{len(paths)} pictures: {output / '*.png'}")
    return paths


def _prediction(
    image: np.ndarray, entries: Sequence[Mapping[str, Any]], dataset: CocoDataset
) -> Prediction:
    label_of = {category_id: label for label, category_id in enumerate(dataset.category_ids)}
    return Prediction(
        image,
        [dict(entry["segmentation"]) for entry in entries],
        np.array([entry["score"] for entry in entries], np.float32),
        np.array([label_of[entry["category_id"]] for entry in entries], np.int32),
        dataset.class_names,
        dataset.category_ids,
    )


def _draw_annotations(image: np.ndarray, record: ImageRecord, dataset: CocoDataset) -> Image.Image:
    targets = record.targets
    masks = [decode_mask(target.segmentation, record.height, record.width) for target in targets]
    captions = [dataset.class_names[target.label] for target in targets]
    return visualize.draw_instances(image, masks, captions)
