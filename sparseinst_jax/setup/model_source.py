"""The model that a command line names, for every command that needs one: eval, predict."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparseinst_jax.checkpoints.folders import locate
from sparseinst_jax.data.classes import COCO_CATEGORY_IDS, COCO_CLASS_NAMES
from sparseinst_jax.data.shapes import draw_if_missing
from sparseinst_jax.inference.predictor import Predictor
from sparseinst_jax.models.layers import functional
from sparseinst_jax.runtime import hosts
from sparseinst_jax.setup.builders import build_model
from sparseinst_jax.setup.config import add_config_arguments, default_workdir, load_config
from sparseinst_jax.setup.datasets import load_val, name_of
from sparseinst_jax.setup.loading import build_predictor, load_run
from sparseinst_jax.weights import fit
from sparseinst_jax.weights.convert import original_to_ours
from sparseinst_jax.weights.files import read_weights_file
from sparseinst_jax.weights.translate import translate


class Source(NamedTuple):
    """What a command works with.

    Attributes:
        predictor: the model.
        config: its configuration, overrides applied.
        workdir: the run folder, where outputs go by default.
        title: one line for the user that says what was loaded.
    """

    predictor: Predictor
    config: Any
    workdir: Path
    title: str


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name a model: --config, --workdir, --checkpoint, --weights, --step."""
    add_config_arguments(parser)
    parser.add_argument("--checkpoint", metavar="DIR", help="folder of one checkpoint, or of a run")
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="weights of this package, the original release, PaddleDetection or mmdetection; needs "
        "--config; the class names come from config.data.val.annotations or, where that is missing "
        "and there are 80, are COCO's",
    )
    parser.add_argument(
        "--step", metavar="N", help='step of the run\'s checkpoint, or "best"; default: the last'
    )


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse combinations that name no model or two.

    Raises:
        ValueError: all faults in one message.
    """
    faults = []
    if arguments.weights and not arguments.config:
        faults.append("--weights needs --config FILE, which describes the network of the file")
    if arguments.weights and arguments.checkpoint:
        faults.append("give --weights or --checkpoint, not both")
    if arguments.checkpoint and arguments.workdir:
        faults.append("give --checkpoint or --workdir, not both")
    # Only `eval` has --predictions.
    only_config_is_read = arguments.weights or getattr(arguments, "predictions", None)
    if arguments.config and (arguments.workdir or arguments.checkpoint) and not only_config_is_read:
        faults.append(
            "give --config without --workdir and --checkpoint: a run has its own configuration; "
            "override its keys with --config.KEY=VALUE"
        )
    if arguments.step and arguments.weights:
        faults.append("--step chooses among the checkpoints of a run, --weights has one state")
    if arguments.step and arguments.step != "best" and not arguments.step.isdigit():
        faults.append(f'--step expects a number or "best", got {arguments.step!r}')
    if not (arguments.config or arguments.workdir or arguments.checkpoint):
        faults.append(
            "no model named: give --workdir RUN, --checkpoint DIR or --config and --weights"
        )
    if faults:
        raise ValueError("\n".join(faults))


def workdir_of(arguments: argparse.Namespace) -> Path:
    """Return the run folder that the arguments mean, where outputs go by default."""
    if arguments.workdir:
        return Path(arguments.workdir)
    if arguments.checkpoint:
        folder, _ = locate(arguments.checkpoint)
        return folder.parent if folder.name == "checkpoints" else folder
    return default_workdir(arguments.config)


def open_source(arguments: argparse.Namespace) -> Source:
    """Load the model that the arguments name.

    Raises:
        FileNotFoundError: a file or checkpoint is missing.
        ValueError: the arguments or the files do not fit.
    """
    workdir = workdir_of(arguments)
    if arguments.weights:
        config: Any = load_config(arguments.config, arguments.overrides)
        draw_missing_data(config)
        predictor = load_weights_file(config, arguments.weights)
        return Source(predictor, config, workdir, f"weights {arguments.weights}")
    path = arguments.checkpoint or workdir
    step = int(arguments.step) if (arguments.step or "").isdigit() else arguments.step
    predictor, config, step = load_run(path, step, arguments.overrides)
    return Source(predictor, config, workdir, f"checkpoint of step {step} in {workdir}")


def load_weights_file(config: Any, weights: str | Path) -> Predictor:
    """Load a predictor from a weights file of any kind and implementation.

    Such a file does not say its classes: they are those of `config.data.val` or, where these
    annotations are missing, of COCO.

    Args:
        config: the whole configuration; it must describe the network of the file.
        weights: the file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file does not fit the network or the classes; says how.
    """
    state = translate(read_weights_file(weights).arrays).arrays
    annotations = name_of(config.data.val)
    is_there = config.data.val.tfds or Path(annotations).is_file()
    if is_there or config.data.classes:
        dataset, origin = load_val(config, with_images=False), annotations
        names, ids = dataset.class_names, dataset.category_ids
    else:
        names, ids = COCO_CLASS_NAMES, COCO_CATEGORY_IDS
        origin = f"COCO (there is no {annotations})"
    found = fit.count_classes(state)
    if found not in (None, len(names)):
        raise ValueError(
            f"{weights} is of a model with {found} classes, {origin} has {len(names)}: give "
            "the json (--config.data.val.annotations) of the classes that the weights were trained "
            "with; to start training from them with other classes use train.py --init-from."
        )
    apply, *empty = functional(build_model(config.model, len(names), seed=None))
    params, statistics = original_to_ours(state, *empty, source=str(weights))
    return build_predictor(config, apply, params, statistics, names, ids)


def stored_config(arguments: argparse.Namespace) -> Any:
    """Load the configuration alone, for a command that needs no model."""
    if arguments.config:
        return load_config(arguments.config, arguments.overrides)
    workdir = workdir_of(arguments)
    if (workdir / "config.json").is_file():
        return load_config(workdir / "config.json", arguments.overrides)
    from sparseinst_jax.checkpoints.store import Checkpoints  # Orbax: slow to import

    with Checkpoints(arguments.checkpoint or workdir, read_only=True) as checkpoints:
        return load_config(checkpoints.read_meta()["config"], arguments.overrides)


def draw_missing_data(config: Any) -> None:
    """Draw the demo's data set where it is asked for and missing, on the first host."""
    if config.data.generator == "shapes":
        data = config.data
        hosts.first_alone(lambda: draw_if_missing(data.train.annotations, data.val.annotations))


def unique_names(paths: Sequence[str | Path]) -> list[str]:
    """Name each file by its stem; the second of the same stem gets `_2`, and so on."""
    taken: set[str] = set()
    names = []
    for path in paths:
        stem = Path(path).stem
        name, number = stem, 1
        while name in taken:
            number += 1
            name = f"{stem}_{number}"
        taken.add(name)
        names.append(name)
    return names
