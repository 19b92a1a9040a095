"""`sparseinst train`: put data, model, optimizer and loop together and run them."""

import argparse
import functools
import importlib.metadata
import os
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from sparseinst_jax import builders, layers, runtime
from sparseinst_jax import config as configs
from sparseinst_jax.data import coco, loader, shapes
from sparseinst_jax.data.plan import TrainPlan
from sparseinst_jax.evaluation import evaluator
from sparseinst_jax.predictor import build_predictor
from sparseinst_jax.structures import Tree
from sparseinst_jax.training import curves, initial_weights, optimizer, progress
from sparseinst_jax.training.checkpoints import Checkpoints
from sparseinst_jax.training.step import TrainState, TrainStep
from sparseinst_jax.training.trainer import Intervals, NonFiniteLossError, Trainer

_DESCRIPTION = """Train on COCO-format data. Starting the same command again continues the run.
Exit codes: 0 done, 1 error or non-finite loss, 130 and 143 saved and stopped by a signal."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse `--config FILE [--workdir DIR] [--config.KEY=VALUE ...]` and train.

    Returns:
      The exit code, see `train`.
    """
    parser = argparse.ArgumentParser("train.py", description=_DESCRIPTION)
    configs.add_config_arguments(parser)
    parser.add_argument(
        "--several-hosts",
        action="store_true",
        help="join the other hosts of the job: start the same command on each; outside of TPU"
        " pods, Slurm and Open MPI set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID",
    )
    arguments = configs.parse_command_line(parser, argv)
    if arguments.config is None:
        parser.error("--config FILE is needed, such as --config configs/shapes.py")
    config = configs.load_config(arguments.config, arguments.overrides)
    if arguments.several_hosts:
        runtime.join_hosts()
    return train(config, arguments.workdir or configs.default_workdir(arguments.config))


def train(config: ConfigDict, workdir: str | Path) -> int:
    """Train as the configuration says, or continue the run in `workdir`.

    Writes `config.json`, `metrics.csv`, `checkpoints/` and `curves.png` into the folder. On
    several hosts all of them call this, after `runtime.join_hosts()`.

    Args:
      config: resolved configuration.
      workdir: run folder, made if missing.

    Returns:
      Exit code: 0 finished (or already finished before), 1 after a non-finite loss, 130 or 143
      when stopped by SIGINT or SIGTERM after saving.

    Raises:
      FileNotFoundError: data or initial weights are missing.
      ValueError: the configuration cannot be trained, or differs from the run's.
    """
    workdir = Path(workdir)
    is_first_host = jax.process_index() == 0
    say = functools.partial(print, flush=True) if is_first_host else lambda *_: None
    _check(config)
    say(f"configuration of {workdir}:\n{configs.describe(config)}")
    with Checkpoints(workdir) as checkpoints:
        stored = _stored_meta(checkpoints)
        _refuse_changes(stored, config, workdir)
        if stored is not None and stored["step"] >= config.train.num_steps:
            say(
                f"the run in {workdir} is finished: step {stored['step']} of"
                f" {config.train.num_steps}. To go on, raise --config.train.num_steps; to start"
                " anew, give another --workdir."
            )
            return 0
        run = _prepare(config, say)
        _refuse_classes(stored, run.meta, workdir)
        if is_first_host:
            evaluator.write_json(workdir / "config.json", config.to_dict(), indent=2)
        state = run.first_state
        if stored is not None:
            state, _ = checkpoints.restore_state(state)
            say(f"continuing after step {int(state.step)} of {config.train.num_steps}")
        code = _loop(config, workdir, checkpoints, run, state)
    if code == 0:
        say(f"finished: step {config.train.num_steps}; results in {workdir}")
    return code


class _Run(NamedTuple):
    """What a configuration and its data come to."""

    dataset: coco.CocoDataset
    plan: TrainPlan
    step: TrainStep
    learning_rate: Callable[[int], Any]
    evaluate: Callable[[Tree, Tree], Mapping[str, float]]
    first_state: TrainState
    meta: dict[str, Any]


def _prepare(config: ConfigDict, say: Callable[[str], None]) -> _Run:
    """Load the data and say what they are, build the model and the step."""
    prepare_data(config)
    dataset = coco.load_coco(
        config.data.train.annotations,
        config.data.train.images,
        keep_empty=config.data.keep_empty,
        check_files=True,
    )
    _refuse_nothing_to_learn(dataset)
    for line in [*coco.summarize(dataset, config.model.num_masks), *_warnings(config)]:
        say(line)
    plan = TrainPlan(
        dataset.image_sizes,
        dataset.num_targets,
        seed=config.seed,
        batch_size=config.train.batch_size,
        train_sizes=config.data.train_sizes,
        train_max_size=config.data.train_max_size,
        augmentation=config.data.augmentation,
    )
    model = builders.build_model(config.model, len(dataset.class_names), config.seed)
    apply, params, statistics = layers.functional(model)
    if config.train.init_weights:
        params, statistics, fresh = initial_weights.load_initial_weights(
            config.train.init_weights, params, statistics
        )
        say(
            f"weights of {config.train.init_weights}"
            + (f"; not in it, started afresh: {', '.join(fresh)}" if fresh else "")
        )
    settings = config.train
    learning_rate = optimizer.make_schedule(
        settings.learning_rate,
        settings.warmup_steps,
        settings.warmup_factor,
        settings.milestones,
        settings.lr_decay,
    )
    adamw = optimizer.make_optimizer(
        params, learning_rate, settings.weight_decay, settings.gradient_clip_norm
    )
    step = TrainStep(
        builders.build_objective(config, apply), adamw, micro_batches=settings.micro_batches
    )
    opt_state = jax.tree.map(np.asarray, adamw.init(params))
    return _Run(
        dataset,
        plan,
        step,
        learning_rate,
        make_evaluation(config, apply, params, statistics, dataset),
        TrainState(np.int32(0), params, statistics, opt_state),
        {
            "config": config.to_dict(),
            "class_names": list(dataset.class_names),
            "category_ids": list(dataset.category_ids),
            "code_version": _code_version(),
        },
    )


def prepare_data(config: ConfigDict) -> None:
    """Draw the generated data set where it is missing; every host but the first waits."""
    if config.data.generator == "shapes" and jax.process_index() == 0:
        shapes.draw_if_missing(config.data.train.annotations, config.data.val.annotations)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("data are there")


def make_evaluation(
    config: ConfigDict,
    apply: Callable[..., Any],
    params: Tree,
    statistics: Tree,
    train_dataset: coco.CocoDataset,
) -> Callable[[Tree, Tree], dict[str, float]]:
    """Make the function that scores weights on the validation data; compiled shapes are kept."""
    if config.train.eval_every == 0:
        return lambda *_: {}
    dataset = coco.load_coco(config.data.val.annotations, config.data.val.images, check_files=True)
    if not any(record.annotations for record in dataset.records):
        raise ValueError(
            f"{config.data.val.annotations} has no annotations to score against: give a json with"
            " them by --config.data.val.annotations, or set --config.train.eval_every=0."
        )
    evaluator.match_categories(train_dataset.class_names, dataset)  # refuses strangers now
    predictor = build_predictor(
        config, apply, params, statistics, train_dataset.class_names, train_dataset.category_ids
    )

    def evaluate(params: Tree, statistics: Tree) -> dict[str, float]:
        predictor.set_weights(params, statistics)
        workers = max(config.data.num_workers, 1)
        _, metrics = evaluator.evaluate_dataset(predictor, dataset, num_workers=workers)
        assert metrics is not None, "annotations were asked for above"
        return {name: metrics[name] for name in ("AP", "AP50", "AP75")}

    return evaluate


def _loop(
    config: ConfigDict, workdir: Path, checkpoints: Checkpoints, run: _Run, state: TrainState
) -> int:
    """Run the trainer between open files, and draw the curves at the end."""
    settings, done = config.train, int(state.step)
    is_first_host = jax.process_index() == 0
    metrics_path = workdir / "metrics.csv"
    writers: list[progress.RowWriter] = []
    if is_first_host:
        writers.append(progress.MetricsFile(metrics_path, done))
        if settings.tensorboard:
            writers.append(progress.TensorBoard(workdir / "tensorboard", done))
    steps_per_epoch = run.plan.steps_per_epoch
    with open(os.devnull, "w") as nowhere:
        trainer = Trainer(
            step=run.step,
            checkpoints=checkpoints,
            meta=run.meta,
            learning_rate=run.learning_rate,
            steps_per_epoch=steps_per_epoch,
            intervals=Intervals(
                settings.num_steps,
                settings.log_every,
                settings.checkpoint_every,
                settings.eval_every,
            ),
            evaluate=run.evaluate,
            writers=writers,
            progress=progress.Progress(
                settings.num_steps,
                steps_per_epoch,
                settings.batch_size,
                done,
                sys.stdout if is_first_host else nowhere,
            ),
        )
        batches = loader.train_batches(
            run.dataset,
            run.plan,
            done,
            settings.num_steps - done,
            jax.process_index(),
            jax.process_count(),
            config.data.num_workers,
        )
        try:
            return trainer.run(state, batches)
        except NonFiniteLossError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        finally:
            if isinstance(batches, Generator):
                batches.close()  # ends the processes that read images
            for writer in writers:
                writer.close()
            if is_first_host:
                curves.draw_curves(progress.read_metrics(metrics_path), workdir / "curves.png")


def _code_version() -> str:
    try:
        return importlib.metadata.version("sparseinst_jax")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # run from a clone


def _stored_meta(checkpoints: Checkpoints) -> dict[str, Any] | None:
    return checkpoints.read_meta() if checkpoints.steps else None


def _refuse_changes(stored: Mapping[str, Any] | None, config: ConfigDict, workdir: Path) -> None:
    if stored is None:
        return
    changes = configs.forbidden_changes(configs.load_config(stored["config"]), config)
    if changes:
        lines = [f"  {key}: {a!r} in the run, {b!r} now" for key, (a, b) in changes.items()]
        raise ValueError(
            f"the run in {workdir} was started with another configuration:\n"
            + "\n".join(lines)
            + "\nGive another --workdir for the new one, or the old values to continue. Only "
            + ", ".join(configs.FREE_KEYS)
            + " may change."
        )


def _refuse_classes(
    stored: Mapping[str, Any] | None, meta: Mapping[str, Any], folder: Path
) -> None:
    keys = ("class_names", "category_ids")
    if stored is not None and any(stored[key] != meta[key] for key in keys):
        raise ValueError(
            f"the run in {folder} learned the classes {stored['class_names']} with ids"
            f" {stored['category_ids']}, the annotations now have {meta['class_names']} with ids"
            f" {meta['category_ids']}. Restore the annotations, or give another --workdir."
        )


def _refuse_nothing_to_learn(dataset: coco.CocoDataset) -> None:
    if not dataset.num_targets.sum():
        raise ValueError(
            f"nothing to learn: {dataset.annotations_path} has {len(dataset.records)} images and no"
            " object, expected at least one (crowd regions and objects without a mask do not"
            " count). Annotate some, or give another json by --config.data.train.annotations."
        )


def _warnings(config: ConfigDict) -> list[str]:
    if config.model.backbone.norm != "frozen_batch_norm" or config.train.init_weights:
        return []
    return [
        "WARNING: frozen batch norms do not adapt to random weights: give trained ones by"
        " --config.train.init_weights, or set --config.model.backbone.norm=group_norm"
    ]


def _check(config: ConfigDict) -> None:
    """Refuse values that no run can have, all in one message."""
    faults = [
        f"train.{key} must be at least {least}, got {config.train[key]}"
        for key, least in {
            "batch_size": 1,
            "micro_batches": 1,
            "num_steps": 1,
            "log_every": 1,
            "checkpoint_every": 0,
            "eval_every": 0,
            "warmup_steps": 0,
        }.items()
        if config.train[key] < least
    ]
    if config.data.generator not in ("", "shapes"):
        faults.append(f'data.generator must be "" or "shapes", got {config.data.generator!r}')
    if len(config.data.eval_size) != 2:
        faults.append(
            f"data.eval_size must be (shortest, longest) in pixels, got {config.data.eval_size}"
        )
    parts = config.train.micro_batches * jax.local_device_count() * jax.process_count()
    if not faults and config.train.batch_size % parts:
        faults.append(
            f"train.batch_size must be a multiple of micro_batches x devices ="
            f" {config.train.micro_batches} x {parts // config.train.micro_batches} = {parts}, got"
            f" {config.train.batch_size}"
        )
    if faults:
        raise ValueError("this configuration cannot be trained:\n  " + "\n  ".join(faults))
