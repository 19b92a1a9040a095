"""What a notebook starts with: a network by its name, its objective, and training in one call."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flax import nnx
from ml_collections import ConfigDict

from sparseinst_jax.data.coco import CocoDataset
from sparseinst_jax.setup import builders
from sparseinst_jax.setup.config import load_config
from sparseinst_jax.setup.train import TrainResult, Writer, train

Config = str | os.PathLike | Mapping[str, Any] | ConfigDict
Data = CocoDataset | tuple[str | os.PathLike, str | os.PathLike]
_FOLDERS = 10_000  # of runs of one name


def build_model(
    config: Config,
    num_classes: int = 80,
    overrides: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
) -> nnx.Module:
    """Build the network of a configuration, with random weights.

    `sparseinst_jax.models.functional` makes of it a compiled function and nested dicts of arrays.

    Args:
      config: a name such as "giam_r50", a file, or a configuration.
      num_classes: K.
      overrides: dotted key to a value, such as `{"model.num_masks": 50}`.
      seed: of the weights.

    Raises:
      FileNotFoundError: there is no such configuration.
      ValueError: the options make no network.
    """
    return builders.build_model(load_config(config, overrides).model, num_classes, seed)


def build_objective(config: Config, apply: Any) -> Any:
    """Build the training objective of a configuration: `training.Objective`.

    Args:
      config: a name, a file, or a configuration.
      apply: the network's pure function, from `sparseinst_jax.models.functional`.
    """
    return builders.build_objective(load_config(config), apply)


def fit(
    model: Config | nnx.Module,
    data: Data,
    val_data: Data | None = None,
    workdir: str | os.PathLike | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    num_steps: int | None = None,
    config: Config = "finetune_small",
    writers: Sequence[Writer] = (),
) -> TrainResult:
    """Train a network on a data set, and return the run.

    It is a run as `train` and the commands make it: it is saved while it goes, the stop button ends
    it with its last step saved, and the result's `resume` goes on, or the same call with the same
    `workdir`.

    Args:
      model: the network and its recipe: a name such as "finetune_small" or "shapes", a file, or a
        configuration. Or a module of your own that is called like those of its recipe's family and
        returns the same; `config` is the recipe then.
      data: to learn from: what `load_coco` returns, or a COCO json and the folder of its images.
      val_data: to evaluate on while training; without, nothing is evaluated.
      workdir: run folder; by default a new one in `runs/`.
      overrides: dotted key to a value, such as `{"train.learning_rate": 1e-3}`, as they are.
      num_steps: the length of the run; warm-up, milestones and intervals of the recipe shrink or
        grow with it.
      config: the recipe of a module.
      writers: functions that are called with each row of metrics, see `train`.

    Raises:
      FileNotFoundError: data are missing.
      ValueError: the configuration cannot be trained, or not with these data.
    """
    module = model if isinstance(model, nnx.Module) else None
    source: Any = config if module is not None else model
    chosen: dict[str, Any] = {"data.generator": ""}
    if num_steps is not None:
        chosen |= _scaled(load_config(source), num_steps)
    for split, given in (("train", data), ("val", val_data)):
        if given is not None:
            json, images = _files(given)
            keys = (f"data.{split}.annotations", f"data.{split}.images", f"data.{split}.tfds")
            chosen |= dict(zip(keys, (json, images, ""), strict=True))
    if val_data is None:
        chosen |= {"train.eval_every": 0, "train.early_stopping": 0}
    if workdir is None:
        name = type(module).__name__ if module is not None else _name(source)
        workdir = _new_folder(re.sub(r"\W+", "_", name).lower())
    return train(
        source, Path(workdir), {**chosen, **(overrides or {})}, writers=writers, model=module
    )


def _name(config: Any) -> str:
    return Path(config).stem if isinstance(config, str | os.PathLike) else config["model"]["family"]


def _new_folder(name: str) -> Path:
    """A folder in `runs/` that is not there yet."""
    names = [name, *(f"{name}-{number}" for number in range(2, _FOLDERS))]
    return next(folder for name in names if not (folder := Path("runs") / name).exists())


def _files(data: Data) -> tuple[str, str]:
    """The json and the folder of images of a data set."""
    if not isinstance(data, CocoDataset):
        annotations, images = data
        return os.fspath(annotations), os.fspath(images)
    folder = data.records[0].folder if len(data.records) else None
    if data.classes is not None or folder is None:
        what = "chosen classes" if data.classes is not None else "no folder of images"
        raise ValueError(
            f"expected all of a json and its images, got a data set with {what}: give (json, "
            "folder of images) as data, and choose classes by overrides, such as "
            '{"data.classes": ("cat", "dog")}'
        )
    return data.annotations_path, folder


def _scaled(config: ConfigDict, num_steps: int) -> dict[str, Any]:
    """The schedule of a recipe, shrunk or grown to a number of steps; ten reports on the way."""
    settings, share = config.train, num_steps / config.train.num_steps
    every = {
        f"train.{key}": max(round(settings[key] * share), 1) if settings[key] else 0
        for key in ("eval_every", "checkpoint_every", "warmup_steps")
    }
    milestones = [max(round(step * share), 1) for step in settings.milestones]
    return every | {
        "train.num_steps": num_steps,
        "train.milestones": tuple(sorted(set(milestones))),
        "train.log_every": max(num_steps // 10, 1),
    }
