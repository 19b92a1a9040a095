"""A network of three layers, for what a run does around its network: it starts in a second.

Most of the time of a small run JAX traces and lowers its step, which takes as long for few channels
as for many. SparseInst's losses and results, batch norm and AdamW are as always. The family is
known once `get_config` was called, as by `train.py --config tests/smallest.py`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from sparseinst_jax.configs import tiny
from sparseinst_jax.models import layers
from sparseinst_jax.models.families import BACKBONES, FAMILIES
from sparseinst_jax.models.sparseinst.family import SPARSEINST
from sparseinst_jax.models.sparseinst.model import Outputs


class Patches(nnx.Module):
    """One convolution of stride 8, with a norm or not; the coarser maps are some of its pixels."""

    def __init__(self, *, width=256, has_norm=True, dtype, rng):
        self.patch = layers.Conv(3, width, 7, stride=8, dtype=dtype, rng=rng)
        self.norm = layers.BatchNorm(width) if has_norm else None
        self.out_channels = (width,) * 3

    def __call__(self, images, train=False, intermediates=None):
        x = self.patch(images)
        x = jax.nn.relu(x if self.norm is None else self.norm(x, train))
        return x, x[:, ::2, ::2], x[:, ::4, ::4]


class Smallest(nnx.Module):
    """A map for each mask, and the class of the mean feature under it."""

    def __init__(self, backbone, *, num_classes, num_masks=10, dtype, rng):
        width = backbone.out_channels[0]
        self.backbone = backbone
        self.masks = layers.Conv(width, num_masks, 1, dtype=dtype, rng=rng)
        self.classes = layers.Linear(width, num_classes + 1, dtype=dtype, rng=rng)

    def __call__(self, images, train=False, intermediates=None):
        features, *_ = self.backbone(images, train, intermediates)
        mask_logits = jnp.moveaxis(self.masks(features), -1, 1)
        under = jnp.einsum("bnhw,bhwc->bnc", jax.nn.sigmoid(mask_logits), features)
        logits = self.classes(under / features.shape[1] / features.shape[2])
        if not train:
            mask_logits = mask_logits.repeat(2, 2).repeat(2, 3)
        return Outputs(logits[..., 1:], mask_logits, logits[..., 0])


FAMILY = dataclasses.replace(SPARSEINST, model=Smallest, faults=lambda **_: [], activations=None)


def get_config() -> ConfigDict:
    """Return `configs/tiny.py` with this network."""
    BACKBONES["patches"], FAMILIES["smallest"] = Patches, FAMILY
    config = tiny.get_config()
    with config.unlocked():
        config.model = ConfigDict(
            dict(family="smallest", backbone=dict(name="patches"), num_masks=10, dtype="float32")
        )
    return config
