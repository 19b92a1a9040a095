"""From a configuration to the parts of a training run: data, plan, model, step, evaluation."""

import json
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from sparseinst_jax.checkpoints.state import TrainState
from sparseinst_jax.data import coco
from sparseinst_jax.data.classes import parse_flip_label_pairs
from sparseinst_jax.data.failures import Skip, SkippedImages
from sparseinst_jax.data.plan import TrainPlan
from sparseinst_jax.data.records import fingerprint
from sparseinst_jax.evaluation import evaluator
from sparseinst_jax.models.families import FAMILIES
from sparseinst_jax.models.trees import Tree, functional
from sparseinst_jax.runtime import hosts, process
from sparseinst_jax.setup import builders, datasets, refusals
from sparseinst_jax.setup import config as configs
from sparseinst_jax.setup.loading import build_predictor
from sparseinst_jax.setup.published import local_sources
from sparseinst_jax.training import batch_scaling, optimizer
from sparseinst_jax.training.step import TrainStep
from sparseinst_jax.weights.initial_weights import load_initial_weights


class Run(NamedTuple):
    """The parts of a training run."""

    dataset: coco.CocoDataset
    plan: TrainPlan
    step: TrainStep
    learning_rate: Callable[[int], Any]
    evaluate: Callable[[Tree, Tree], Mapping[str, float]]
    first_state: TrainState  # taken out by `train` when it is handed over: three times the weights
    meta: dict[str, Any]


def make_run(
    config: ConfigDict,
    print_line: Callable[[str], None],
    is_new: bool = True,
    skipped: SkippedImages | None = None,
    model: Any = None,
) -> Run:
    """Load and describe the data, build the model and the training step.

    Args:
      config: resolved configuration.
      print_line: takes one line for the user.
      is_new: whether the first state will be used; a run that continues needs no weights to
        start from, and their file may be gone by then.
      skipped: lists the images that evaluations skip; None skips none.
      model: a module to train in place of the one that `config.model` describes.
    """
    given = type(model).__name__ if model is not None else ""
    dataset = load_train_data(config, print_line)
    val_dataset = load_val_data(config, dataset, print_line)
    frozen_stages = config.train.frozen_stages
    if model is None:
        model = builders.build_model(
            config.model, len(dataset.class_names), config.seed, frozen_stages
        )
    apply, params, statistics = functional(model)
    if is_new and config.train.init_from:
        names = FAMILIES[config.model.family].weights
        initial = load_initial_weights(
            local_sources(config.train.init_from), params, statistics, dataset.class_names, names
        )
        params, statistics = initial.params, initial.statistics
        print_line("\n".join(initial.lines))
    step, learning_rate = make_step(config, model, apply, params)
    return Run(
        dataset,
        make_plan(config, dataset),
        step,
        learning_rate,
        make_evaluation(
            config, apply, params, statistics, dataset, val_dataset, skipped, print_line
        ),
        first_state(config, step, params, statistics),
        {
            "config": config.to_dict(),
            "class_names": list(dataset.class_names),
            "category_ids": list(dataset.category_ids),
            "code_version": process.version(),
            **({"given_model": given} if given else {}),
            "data": {
                title: fingerprint(each)
                for title, each in {"train": dataset, "val": val_dataset}.items()
                if each is not None
            },
        },
    )


def resolve_schedule(
    config: ConfigDict, literal_keys: Collection[str] = ()
) -> tuple[ConfigDict, list[str]]:
    """Translate the schedule from `train.base_batch_size` to `train.batch_size`.

    The result says that it is written for its own batch size, so that resolving it again, as
    when a stored configuration is trained, changes nothing.

    Args:
      config: as loaded; not changed.
      literal_keys: keys with values that are meant as they are, such as "train.num_steps".

    Returns:
      The configuration to train with, and lines for the user.
    """
    settings = config.train
    names = batch_scaling.Schedule._fields
    schedule, lines = batch_scaling.scale_schedule(
        batch_scaling.Schedule(*(settings[name] for name in names)),
        settings.batch_size,
        settings.base_batch_size,
        settings.lr_scaling,
        [name for name in names if f"train.{name}" in literal_keys],
    )
    resolved = configs.load_config(config)
    resolved.train.update(schedule._asdict())
    resolved.train.base_batch_size = settings.batch_size
    return resolved, lines


def load_train_data(config: ConfigDict, print_line: Callable[[str], None]) -> coco.CocoDataset:
    """Load the training data and print a summary.

    Raises:
      ValueError: there is nothing to learn in them.
    """
    datasets.draw_missing_data(config)
    dataset = datasets.load_train(config)
    refusals.refuse_nothing_to_learn(dataset)
    for line in datasets.brief_check(config, dataset):
        print_line(line)
    for line in refusals.warnings(config):
        print_line(line)
    return dataset


def load_val_data(
    config: ConfigDict, train_dataset: coco.CocoDataset, print_line: Callable[[str], None]
) -> coco.CocoDataset | None:
    """Load the validation data and compare them with the training data; None without evaluation.

    Raises:
      ValueError: there is nothing to score against, or they have none of the classes.
    """
    if config.train.eval_every == 0:
        return None
    dataset = datasets.load_val(config, check_files=True)
    if not dataset.num_targets.any():
        raise ValueError(
            f"{dataset.annotations_path} has no object to score against (crowd regions do not"
            " count): give a json with some by --config.data.val.annotations, or set"
            " --config.train.eval_every=0."
        )
    evaluator.match_categories(train_dataset.class_names, dataset)
    for line in datasets.brief_comparison(train_dataset, dataset):
        print_line(line)
    return dataset


def make_plan(config: ConfigDict, dataset: coco.CocoDataset) -> TrainPlan:
    """Make the plan of batches that the configuration asks for."""
    return TrainPlan(
        dataset.image_sizes,
        dataset.num_targets,
        seed=config.seed,
        batch_size=config.train.batch_size,
        train_sizes=config.data.train_sizes,
        train_max_size=config.data.train_max_size,
        augmentation=config.data.augmentation,
        lsj_range=config.data.lsj_range,
        copy_paste=config.data.copy_paste,
        flip_labels=parse_flip_label_pairs(config.data.flip_label_pairs, dataset.class_names),
        crowd=config.data.crowd,
        resize_rule=config.data.resize_rule,
        boxes_xyxy=dataset.boxes_xyxy,
        targets=FAMILIES[config.model.family].targets,
    )


def make_step(
    config: ConfigDict,
    model: Any,
    apply: Callable[..., Any],
    params: Tree,
    devices: Sequence[Any] | None = None,
) -> tuple[TrainStep, Callable[[int], Any]]:
    """Make the step on local devices, by default all, and for the metrics its learning rate."""
    settings = config.train
    rules = optimizer.rules_of(model, settings.backbone_rate, settings.class_rate)
    learning_rate = optimizer.make_schedule(
        settings.learning_rate,
        settings.warmup_steps,
        settings.warmup_factor,
        settings.milestones,
        settings.lr_decay,
    )
    adamw = optimizer.make_optimizer(
        params, learning_rate, settings.weight_decay, settings.gradient_clip_norm, rules
    )
    objective = builders.build_objective(config, apply)
    step = TrainStep(
        objective,
        adamw,
        seed=config.seed,
        micro_batches=settings.micro_batches,
        ema_decay=settings.ema_decay,
        skips_nonfinite=settings.skip_nonfinite > 0,
        devices=devices,
    )
    return step, jax.jit(learning_rate)


def first_state(config: ConfigDict, step: TrainStep, params: Tree, statistics: Tree) -> TrainState:
    """Make the state before the first step, on the host."""
    # Compiled as a whole: alone, every shape of a parameter would be a program of its own.
    opt_state = jax.tree.map(np.asarray, jax.jit(step.optimizer.init)(params))
    average = (params, statistics) if config.train.ema_decay else None
    return TrainState(np.int32(0), params, statistics, opt_state, average)


def make_evaluation(
    config: ConfigDict,
    apply: Callable[..., Any],
    params: Tree,
    statistics: Tree,
    train_dataset: coco.CocoDataset,
    dataset: coco.CocoDataset | None,
    skipped: SkippedImages | None = None,
    print_line: Callable[[str], None] = print,
) -> Callable[[Tree, Tree], dict[str, float]]:
    """Make the function that scores weights on the validation data; compiled shapes are kept."""
    if dataset is None:
        return lambda *_: {}
    predictor = build_predictor(
        config, apply, params, statistics, train_dataset.class_names, train_dataset.category_ids
    )
    predictor.use_devices(jax.local_devices())
    predictor.release_weights()  # training holds its own
    truth = evaluator.truth_of(dataset)  # its faults are reported before the first step

    def evaluate(params: Tree, statistics: Tree) -> dict[str, float]:
        predictor.set_weights(params, statistics)
        workers = max(config.data.num_workers, 1)
        skips: list[Skip] | None = None if skipped is None else []
        is_watched = sys.stderr.isatty() and not jax.process_index()
        _, metrics = evaluator.evaluate_dataset(
            predictor,
            dataset,
            num_workers=workers,
            progress=sys.stderr if is_watched else None,
            skips=skips,
            truth=truth,
        )
        predictor.release_weights()
        if skipped is not None:
            for text in skipped.add_evaluated(skips or (), len(dataset.records)):
                print_line(text)
        scores = {} if metrics is None else {n: metrics[n] for n in ("AP", "AP50", "AP75")}
        # The first host has them; all must do the same about them.
        return json.loads(hosts.gather(json.dumps(scores).encode())[0])

    return evaluate
