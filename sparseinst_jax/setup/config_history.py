"""Defaults for the keys that configurations stored by earlier versions lack."""

import copy
from collections.abc import Mapping
from typing import Any

from sparseinst_jax.data.ecosystems import DEFAULT_RULES

# Keys that the first version did not have, with the value that does what was done before them.
# A key is added only to a group that the stored configuration has.
LATER_KEYS: dict[str, Any] = {
    "model.backbone.variant": "b",
    "model.backbone.deformable_stages": (),
    "model.backbone.modulated": False,
    "model.class_from_backbone": False,
    "data.train.tfds": "",
    "data.val.tfds": "",
    "data.tfds_dir": "",
    "data.root": "",
    "data.classes": (),
    "data.exclude_classes": (),
    "data.class_map": (),
    "data.lsj_range": (0.1, 2.0),
    "data.copy_paste": 0.0,
    "data.flip_label_pairs": (),
    "data.crowd": "drop",
    "data.resize_rule": DEFAULT_RULES,
    "data.annotation_filter": DEFAULT_RULES,
    "data.on_error": "stop",
    "data.on_change": "stop",
    "train.init_from": "",
    "train.lr_scaling": "linear",
    "train.frozen_stages": 0,
    "train.backbone_rate": 1.0,
    "train.class_rate": 1.0,
    "train.gradient_clip_norm": 0.0,
    "train.ema_decay": 0.0,
    "train.early_stopping": 0,
    "train.skip_nonfinite": 0,
    "eval.protocol": "original",
    "eval.zoom": 1.0,
}
_RENAMED = {"train.init_weights": "train.init_from"}


def complete(plain: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Add the keys that did not exist yet when a configuration was stored.

    Args:
      plain: nested mapping; not changed.

    Returns:
      The whole configuration, and a line for the user that lists what was added, or none.
    """
    whole = copy.deepcopy(dict(plain))
    groups = [whole.get(name) for name in ("model", "data", "train", "eval")]
    if not all(isinstance(group, dict) for group in groups):
        return whole, []  # no configuration of a run
    later = dict(LATER_KEYS)
    for old, new in _RENAMED.items():
        group, name = _group(whole, old)
        if group is not None and name in group:
            later[new] = group.pop(name)
    if "batch_size" in whole["train"]:  # the schedule was meant for the batch that was trained
        later["train.base_batch_size"] = whole["train"]["batch_size"]
    if whole["model"].get("backbone", {}).get("name", "resnet") != "resnet":
        later = {k: v for k, v in later.items() if not k.startswith("model.backbone.")}
    if "kernel_dim" not in whole["model"]:  # FastInst
        del later["model.class_from_backbone"]
    added = []
    for key, value in later.items():
        group, name = _group(whole, key)
        if group is not None and name not in group:
            group[name] = value
            added.append(f"{key} = {value!r}")
    note = "the run was stored by an earlier version; keys that it did not know take the value that"
    note += f" does what was done then: {', '.join(added)}"
    return whole, [note] * bool(added)


def _group(plain: dict[str, Any], key: str) -> tuple[dict[str, Any] | None, str]:
    *path, name = key.split(".")
    node: Any = plain
    for part in path:
        node = node.get(part) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else None, name
