"""Checks before a run starts: its values, and whether it is still the run that was stored."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from sparseinst_jax.data import coco
from sparseinst_jax.data.failures import ON_ERROR
from sparseinst_jax.runtime import hosts
from sparseinst_jax.runtime.pages import page
from sparseinst_jax.setup import config as configs
from sparseinst_jax.setup import config_history
from sparseinst_jax.training import batch_scaling

ON_CHANGE = ("stop", "continue")


def refuse_changes(
    stored: Mapping[str, Any] | None, config: ConfigDict, workdir: Path
) -> list[str]:
    """Refuse to continue a run with another configuration.

    Returns:
      Lines for the user: keys that the version which stored the run did not know.
    """
    if stored is None:
        return []
    changes = configs.forbidden_changes(configs.load_config(stored["config"]), config)
    if stored["config"]["train"].get("init_from") == config.train.init_from:
        changes.pop("train.init_from", None)  # the run was moved: the file was to be there, or here
    if changes:
        lines = [f"  {key}: {a!r} in the run, {b!r} now" for key, (a, b) in changes.items()]
        raise ValueError(
            f"the run in {workdir} was started with another configuration:\n"
            + "\n".join(lines)
            + "\nGive another --workdir for the new one, or the old values to continue. Only "
            + ", ".join(configs.FREE_KEYS)
            + f" may change {page('changed-run')}"
        )
    return config_history.complete(stored["config"])[1]


def refuse_classes(stored: Mapping[str, Any] | None, meta: Mapping[str, Any], folder: Path) -> None:
    """Refuse to continue a run with other classes."""
    keys = ("class_names", "category_ids")
    if stored is not None and any(stored[key] != meta[key] for key in keys):
        raise ValueError(
            f"the run in {folder} learned the classes {stored['class_names']} with ids"
            f" {stored['category_ids']}, the annotations now have {meta['class_names']} with ids"
            f" {meta['category_ids']}. Restore the annotations, or give another --workdir."
        )


def refuse_changed_data(
    stored: Mapping[str, Any] | None, meta: Mapping[str, Any], config: ConfigDict, folder: Path
) -> list[str]:
    """Refuse to continue a run with different data, unless `data.on_change` allows it.

    Returns:
      Lines for the user where they differ and the run continues. Runs of earlier versions stored
      nothing to compare.
    """
    hosts.refuse_differences("data set", json.dumps(meta["data"]))
    before, now = (stored or {}).get("data", {}), meta["data"]
    changes = []
    for title in before.keys() & now.keys():
        old, new = before[title], now[title]
        if old != new:
            of = config.data[title]
            what = of.tfds or of.annotations
            count = f"{old['images']} images then, {new['images']} now"
            same = "the annotations are as they were" if old["sha256"] == new["sha256"] else ""
            edited = same or f"sha256 {old['sha256'][:12]} then, {new['sha256'][:12]} now"
            changes.append(f"data.{title}, {what}: {count}; {edited}")
    if not changes:
        return []
    text = "\n  ".join(sorted(changes))
    if config.data.on_change == "continue":
        return [f"WARNING: the run continues with other data than before:\n  {text}"]
    raise ValueError(
        f"the run in {folder} had other data:\n  {text}\nThe order of images and the scores would"
        " no longer be those of one run. Restore the data, give another --workdir (and --init-from"
        f" {folder}), or continue anyway with --config.data.on_change=continue"
        f" {page('changed-run')}"
    )


def refuse_nothing_to_learn(dataset: coco.CocoDataset) -> None:
    """Refuse data without a single object."""
    if not dataset.num_targets.sum():
        raise ValueError(
            f"nothing to learn: {dataset.annotations_path} has {len(dataset.records)} images and no"
            " object, expected at least one (crowd regions and objects without a mask do not"
            " count). Annotate some, or give another json by --config.data.train.annotations."
        )


def warnings(config: ConfigDict) -> list[str]:
    """Warn of settings that are allowed but probably a mistake, one line each."""
    lines = []
    if config.model.backbone.get("norm") == "frozen_batch_norm" and not config.train.init_from:
        lines.append(
            "WARNING: frozen batch norms do not adapt to random weights: give trained ones by"
            " --init-from, or set --config.model.backbone.norm=group_norm"
        )
    if config.train.frozen_stages and not config.train.init_from:
        lines.append(
            "WARNING: frozen stages stay as they start, which is random without --init-from: give"
            " trained weights by it, or set --config.train.frozen_stages=0"
        )
    return lines


def refuse_values(config: ConfigDict) -> None:
    """Refuse values that no run can have; all faults in one message."""
    faults = [
        f"train.{key} must be at least {least}, got {config.train[key]}"
        for key, least in {
            "batch_size": 1,
            "base_batch_size": 1,
            "micro_batches": 1,
            "num_steps": 1,
            "log_every": 1,
            "checkpoint_every": 0,
            "eval_every": 0,
            "warmup_steps": 0,
            "early_stopping": 0,
            "learning_rate": 0,
            "weight_decay": 0,
            "warmup_factor": 0,
            "lr_decay": 0,
            "gradient_clip_norm": 0,
            "frozen_stages": 0,
            "backbone_rate": 0,
            "class_rate": 0,
            "skip_nonfinite": 0,
        }.items()
        if not config.train[key] >= least  # so that NaN is refused too
    ]
    if config.train.lr_scaling not in batch_scaling.RULES:
        faults.append(
            f"train.lr_scaling must be one of {', '.join(batch_scaling.RULES)}, got"
            f" {config.train.lr_scaling!r}"
        )
    if config.train.early_stopping > 0 and config.train.eval_every == 0:
        faults.append(
            "train.early_stopping counts evaluations, and there are none: set train.eval_every"
        )
    if not 0 <= config.train.ema_decay < 1:
        faults.append(
            f"train.ema_decay must be at least 0 (off) and below 1, got {config.train.ema_decay}"
        )
    for key, values in {"on_error": ON_ERROR, "on_change": ON_CHANGE}.items():
        if config.data[key] not in values:
            faults.append(f"data.{key} must be one of {values}, got {config.data[key]!r}")
    if config.data.generator not in ("", "shapes"):
        faults.append(f'data.generator must be "" or "shapes", got {config.data.generator!r}')
    if len(config.data.eval_size) != 2:
        faults.append(
            f"data.eval_size must be (shortest, longest) in pixels, got {config.data.eval_size}"
        )
    micro, devices, size = config.train.micro_batches, jax.device_count(), config.train.batch_size
    if not faults and size % (micro * devices):
        parts = micro * devices
        below = size // parts * parts
        nearest = f"{below} or {below + parts}" if below else f"{parts}"
        faults.append(
            f"train.batch_size must be a multiple of micro_batches x devices of all hosts ="
            f" {micro} x {devices} = {parts}, got {size}: give {nearest}"
        )
    if faults:
        raise ValueError("this configuration cannot be trained:\n  " + "\n  ".join(faults))
