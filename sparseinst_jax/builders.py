"""From a config to objects: the one place where names become classes."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparseinst_jax.backbones.resnet import ResNet
from sparseinst_jax.sparseinst.model import SparseInst
from sparseinst_jax.sparseinst.objective import SparseInstObjective

BACKBONES = {"resnet": ResNet}
FAMILIES = {"sparseinst": (SparseInst, SparseInstObjective)}


def _choose(table: dict[str, Any], name: str, key: str) -> Any:
    if name not in table:
        raise ValueError(f"unknown {key}: got {name!r}, expected one of {sorted(table)}.")
    return table[name]


def build_model(
    model_config: Any, num_classes: int, seed: int, frozen_stages: int = 0
) -> nnx.Module:
    """Build the model of `config.model` with fresh weights.

    Args:
      model_config: `config.model`; every key but the names is a constructor's argument.
      num_classes: K, from the data set or the checkpoint.
      seed: of the initial weights.
      frozen_stages: of the backbone, for training.

    Raises:
      ValueError: for an unknown family or backbone.
    """
    rng = np.random.default_rng(seed)
    options = dict(model_config)
    model_class, _ = _choose(FAMILIES, options.pop("family"), "model.family")
    dtype = jnp.dtype(options.pop("dtype"))
    backbone_options = dict(options.pop("backbone"))
    backbone_class = _choose(BACKBONES, backbone_options.pop("name"), "model.backbone.name")
    backbone = backbone_class(**backbone_options, frozen_stages=frozen_stages, dtype=dtype, rng=rng)
    return model_class(backbone, num_classes=num_classes, **options, dtype=dtype, rng=rng)


def build_objective(config: Any, apply: Any) -> Any:
    """Build the training objective of `config` around a model's pure function."""
    _, objective_class = _choose(FAMILIES, config.model.family, "model.family")
    return objective_class(apply, config.model.num_masks, **dict(config.objective))
