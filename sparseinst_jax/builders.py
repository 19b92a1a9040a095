"""From a config to objects: the one place where names become classes."""

from __future__ import annotations

from typing import Any, get_args

import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparseinst_jax import layers
from sparseinst_jax.backbones.resnet import ResNet
from sparseinst_jax.sparseinst.model import Normalizer, SparseInst
from sparseinst_jax.sparseinst.objective import SparseInstObjective

BACKBONES = {"resnet": ResNet}
FAMILIES = {"sparseinst": (SparseInst, SparseInstObjective)}


DTYPES = ("float32", "bfloat16")
SIZES = (
    "encoder_channels",
    "decoder_channels",
    "decoder_convs",
    "num_masks",
    "num_groups",
    "kernel_dim",
)


def check_model(model_config: Any) -> None:
    """Refuse values of `config.model` that no network can have.

    Raises:
      ValueError: all faults in one message.
    """
    backbone = model_config.backbone
    choices = {
        "family": (model_config.family, FAMILIES),
        "backbone.name": (backbone.name, BACKBONES),
        "backbone.norm": (backbone.norm, layers.NORMS),
        "normalizer": (model_config.normalizer, get_args(Normalizer)),
        "dtype": (model_config.dtype, DTYPES),
    }
    faults = [
        f"model.{key} must be one of {', '.join(known)}, got {value!r}"
        for key, (value, known) in choices.items()
        if value not in known
    ]
    faults += [
        f"model.{key} must be at least 1, got {model_config[key]}"
        for key in SIZES
        if model_config[key] < 1
    ]
    if backbone.width < 2:
        faults.append(f"model.backbone.width must be at least 2, got {backbone.width}")
    depths = backbone.stage_depths
    if len(depths) != 4 or min(depths) < 1:
        faults.append(
            "model.backbone.stage_depths must be the blocks of four stages, such as (3, 4, 6, 3), "
            f"got {depths}"
        )
    if faults:
        raise ValueError("this network cannot be built:\n  " + "\n  ".join(faults))


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
      ValueError: see `check_model`.
    """
    check_model(model_config)
    rng = np.random.default_rng(seed)
    options = dict(model_config)
    model_class, _ = FAMILIES[options.pop("family")]
    dtype = jnp.dtype(options.pop("dtype"))
    backbone_options = dict(options.pop("backbone"))
    backbone_class = BACKBONES[backbone_options.pop("name")]
    backbone = backbone_class(**backbone_options, frozen_stages=frozen_stages, dtype=dtype, rng=rng)
    return model_class(backbone, num_classes=num_classes, **options, dtype=dtype, rng=rng)


def build_objective(config: Any, apply: Any) -> Any:
    """Build the training objective of `config` around a model's pure function."""
    _, objective_class = FAMILIES[config.model.family]
    return objective_class(apply, config.model.num_masks, **dict(config.objective))
