"""`sparseinst eval`: COCO mask AP of a run, a checkpoint, a weights file or a results file."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from sparseinst_jax.cli import command_parser
from sparseinst_jax.cli.arguments import (
    add_model_arguments,
    check_arguments,
    open_model,
    parse_command_line,
    stored_config,
    words_of_model,
    workdir_of,
)
from sparseinst_jax.data.coco import CocoDataset
from sparseinst_jax.data.failures import Skip, SkippedImages
from sparseinst_jax.evaluation.coco_metrics import CocoMetrics, load_json, read_truth, score
from sparseinst_jax.evaluation.evaluator import predict_dataset, truth_of
from sparseinst_jax.evaluation.report import draw_pictures, write_report
from sparseinst_jax.runner.prediction import SHOWN_SCORE
from sparseinst_jax.runtime import hosts
from sparseinst_jax.runtime.files import check_writable, write_json
from sparseinst_jax.runtime.messages import next_commands
from sparseinst_jax.setup.datasets import draw_missing_data, load_val

NUM_PICTURES = 8
DESCRIPTION = """\
Score a model on config.data.val: COCO mask AP, a table for each class, predictions and pictures.

  sparseinst eval --workdir RUN                     the last checkpoint of a run
  sparseinst eval --checkpoint RUN/checkpoints/600  this checkpoint
  sparseinst eval --config NAME --weights FILE      published weights: .pth, .pkl, .pdparams, ...
  sparseinst eval --workdir RUN --predictions FILE  a COCO results file; opens no model, no image
  ... --plots                                       also what went wrong, in <output>/plots: tables
                                                    of classes and images, precision-recall
                                                    curves, confusion matrix, the worst images

All local devices work, and with --distributed all hosts; the results do not depend on how many.
Exit codes: 0 done, 1 error, 75 another host was lost, 130 interrupted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = command_parser("eval", DESCRIPTION)
    add = parser.add_argument
    add_model_arguments(parser)
    hosts.add_argument(parser)
    add(
        "--output",
        metavar="DIR",
        help="default: <workdir>/eval; with --predictions <workdir>/eval/<name of the file>",
    )
    add("--predictions", metavar="FILE", help="score this COCO results file instead of a model")
    add(
        "--pictures",
        metavar="N",
        type=int,
        default=NUM_PICTURES,
        help=f"pictures to draw, prediction beside annotation; with --plots as many of the worst "
        f"images; default {NUM_PICTURES}",
    )
    add("--plots", action="store_true", help="write tables, curves and the worst images")
    add(
        "--score-threshold",
        type=float,
        default=SHOWN_SCORE,
        help="lowest score that counts in the confusion matrix and the worst images, default "
        f"{SHOWN_SCORE}; AP and curves use every score",
    )
    arguments = parse_command_line(parser, argv)
    check_arguments(arguments)
    hosts.join(arguments.distributed)
    output = Path(arguments.output) if arguments.output else workdir_of(arguments) / "eval"
    if arguments.predictions and not arguments.output:
        # The folder itself holds what the run's own model reaches.
        output /= Path(arguments.predictions).stem
    check_writable(output, "--output")
    (_score_file if arguments.predictions else _score_model)(arguments, output)
    return 0


def _score_file(arguments: argparse.Namespace, output: Path) -> None:
    config = stored_config(arguments)
    draw_missing_data(config)
    if jax.process_index():
        return  # one host is enough
    images = config.data.val.images
    # Names every fault of the json. Only --plots looks at images, and does without them too.
    dataset = load_val(config, with_images=os.path.isdir(images))
    results = load_json(arguments.predictions)
    metrics = score(read_truth(dataset.truth, dataset.classes), results, arguments.predictions)
    print(f"{arguments.predictions} against {dataset.annotations_path}\n")
    _report(arguments, dataset, results, metrics, output)
    if not arguments.plots:
        words = [*words_of_model(arguments), f"--predictions={arguments.predictions}", "--plots"]
        print(next_commands(["sparseinst", "eval", *words]))


def _score_model(arguments: argparse.Namespace, output: Path) -> None:
    source = open_model(arguments)
    config, is_first_host = source.config, jax.process_index() == 0
    draw_missing_data(config)
    dataset = load_val(config)
    source.predictor.use_devices(jax.local_devices())
    hosts.refuse_differences("checkpoint or configuration", source.title + config.to_json())
    if is_first_host:
        print(f"{source.title}, on {dataset.annotations_path} ({len(dataset.records)} images)")
    truth = truth_of(dataset)  # its faults are reported before the first prediction
    skips: list[Skip] | None = [] if config.data.on_error == "skip" else None
    results = predict_dataset(
        source.predictor,
        dataset,
        num_workers=max(1, config.data.num_workers),
        progress=sys.stderr if is_first_host else None,
        skips=skips,
    )
    if is_first_host:
        write_json(output / "predictions.json", results)
        print(f"{len(results)} detections: {output / 'predictions.json'}")
    _list_skipped(skips, dataset, output)
    if not is_first_host:
        return
    if drawn := draw_pictures(dataset, results, output, arguments.pictures):
        print(f"{len(drawn)} pictures: {output / '*.png'}")
    if truth is None:
        # Of an earlier evaluation into this folder; it would seem to belong to these predictions.
        (output / "metrics.json").unlink(missing_ok=True)
        print(f"{dataset.annotations_path} has no object: predicted, not scored")
    else:
        print()
        _report(arguments, dataset, results, score(truth, results), output)
    photos = config.data.val.images or "PHOTOS"
    predict = ["sparseinst", "predict", *words_of_model(arguments), photos]
    plots = [["sparseinst", "eval", *words_of_model(arguments), "--plots"]]
    print(next_commands(*plots * (truth is not None and not arguments.plots), predict))


def _list_skipped(skips: Sequence[Skip] | None, dataset: CocoDataset, output: Path) -> None:
    """Write the list of images that this host could not use, replacing an older one."""
    index = jax.process_index()
    path = output / (f"skipped_host{index}.csv" if index else "skipped.csv")
    path.unlink(missing_ok=True)
    if skips:
        path.parent.mkdir(parents=True, exist_ok=True)
        listed = SkippedImages(path, 0, 1)
        print("\n".join(listed.add_evaluated(skips, len(dataset.records))), flush=True)


def _report(
    arguments: argparse.Namespace,
    dataset: CocoDataset,
    results: Sequence[Mapping[str, Any]],
    metrics: CocoMetrics,
    output: Path,
) -> None:
    write_json(output / "metrics.json", metrics.as_dict(), indent=2)
    print(metrics.table())
    print(f"\nnumbers in percent; as fractions in {output / 'metrics.json'}")
    if arguments.plots:
        folder, threshold = output / "plots", arguments.score_threshold
        lines = write_report(metrics, dataset, results, folder, threshold, arguments.pictures)
        print("", *lines, sep="\n")
