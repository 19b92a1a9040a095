"""A model family that the package does not know: as one from another program.

It differs from SparseInst in all that a family may differ in: two matchings, one of costs and one
of scores with other predictions; counts and terms of its own; random points in its loss, which runs
part of the network again; dropout; full masks in bits, empty ones too; masks of stride 8 that are
logits to the end; results that are pairs of a query and a class, their scores finished at the
original size; options of its own; parameters that learn at another rate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from sparseinst_jax import losses
from sparseinst_jax.configs import tiny
from sparseinst_jax.data.target_masks import FULL_BITS
from sparseinst_jax.models import layers, ops
from sparseinst_jax.models.family import Family, Selection

STRIDE = 8


class Dots(nnx.Module):
    """A class for each cell of the map of stride 8; the cells of the highest one are queries."""

    learning_rate_factors = (("backbone", 0.1),)
    undecayed = ("norm", "shift")

    def __init__(self, backbone, *, num_classes, num_queries=6, width=8, dtype, rng):
        channels = backbone.out_channels[0]
        self.backbone = backbone
        self.reduce = layers.Conv(channels, width, 1, dtype=dtype, rng=rng)
        self.proposals = layers.Linear(width, num_classes + 1, dtype=dtype, rng=rng)
        self.classes = layers.Linear(width, num_classes, dtype=dtype, rng=rng)
        self.masks = layers.Linear(width, width, dtype=dtype, rng=rng)
        self.shift = nnx.Param(np.zeros((width,), np.float32))
        self.dropout = nnx.Dropout(0.3, rngs=nnx.Rngs(int(rng.integers(1 << 30))))
        self.num_queries = num_queries

    def __call__(self, images, train=False, intermediates=None):
        res3, _, _ = self.backbone(images, train, intermediates)
        features = self.dropout(self.reduce(res3), deterministic=not train) + self.shift[...]
        pixels = features.reshape(len(images), -1, features.shape[-1])
        proposal_logits = self.proposals(pixels)  # [B, h w, K+1], the last for no object
        chances = 1 - jax.nn.softmax(proposal_logits)[..., -1]
        _, cells = jax.lax.top_k(chances, self.num_queries)
        queries = jnp.take_along_axis(pixels, cells[..., None], axis=1)  # [B, N, C]
        found = self.heads(queries, pixels.reshape(features.shape))
        return dict(found, features=features, proposal_logits=proposal_logits, cells=cells)

    def heads(self, queries, features):
        """Map queries [B, N, C] and features [B, h, w, C] to logits."""
        mask_logits = jnp.einsum("bnc,bhwc->bnhw", self.masks(queries), features)
        return {"class_logits": self.classes(queries), "mask_logits": mask_logits}


@dataclasses.dataclass(frozen=True)
class DotsObjective:
    """Queries by the least cost, proposals by the highest score; a second pass in the loss."""

    apply: Any
    num_points: int
    guided_weight: float = 1.0

    minimised = ("queries",)
    loss_takes_params = True

    def forward(self, params, statistics, batch):
        images = ops.normalize_images(batch.images, batch.valid_size)
        return self.apply(params, statistics, images, train=True)

    def count(self, batch):
        number = np.asarray(batch.is_target).sum()
        return {"objects": np.float32(number), "images": np.float32(len(batch.images))}

    def match_scores(self, outputs, batch, keys):
        targets = self._targets(batch)
        probs = jax.nn.softmax(outputs["class_logits"])
        cost = -jnp.take_along_axis(probs, batch.labels[:, None, :], axis=2)
        cost -= losses.dice_matrix(outputs["mask_logits"], targets[:, :, ::STRIDE, ::STRIDE])
        chances = jax.nn.softmax(outputs["proposal_logits"])
        score = jnp.take_along_axis(chances, batch.labels[:, None, :], axis=2)  # [B, h w, M]
        return {"queries": cost, "proposals": score}

    def loss(self, params, statistics, outputs, batch, matches, counts, keys):
        targets = self._targets(batch)
        image = jnp.arange(len(targets))[:, None]
        index = matches["queries"]
        points = jax.vmap(lambda key: jax.random.uniform(key, (self.num_points, 2)))(keys)
        size = jnp.array(targets.shape[2:])
        rows, columns = jnp.moveaxis((points * size).astype(jnp.int32), -1, 0)  # [B, P]
        wanted = jax.vmap(lambda t, y, x: t[:, y, x])(targets, rows, columns)  # [B, M, P]

        def at_points(mask_logits):
            own = jnp.take_along_axis(mask_logits, jnp.maximum(index, 0)[..., None, None], 1)
            return jax.vmap(lambda m, y, x: m[:, y, x])(own, rows // STRIDE, columns // STRIDE)

        def mask_term(mask_logits):
            each = losses.binary_cross_entropy(at_points(mask_logits), wanted).mean(-1)
            return jnp.where(index >= 0, each, 0).sum() / counts["objects"]

        number = outputs["proposal_logits"].shape[-1] - 1
        classes = jnp.full(outputs["proposal_logits"].shape[:2], number)
        cells = jnp.where(matches["proposals"] >= 0, matches["proposals"], classes.shape[1])
        classes = classes.at[image, cells].set(batch.labels, mode="drop")
        log_probs = jax.nn.log_softmax(outputs["proposal_logits"])
        proposal = -jnp.take_along_axis(log_probs, classes[..., None], -1).mean((1, 2)).sum()
        # The second pass: the heads on the first one's own features, moved by the parameters.
        features = outputs["features"]
        flat = features.reshape(len(features), -1, features.shape[-1])
        queries = jnp.take_along_axis(flat, outputs["cells"][..., None], axis=1)
        again, _ = self.apply(params, statistics, queries, features, method="heads")
        terms = {
            "proposal": proposal / counts["images"],
            "mask": mask_term(outputs["mask_logits"]),
            "guided": self.guided_weight * mask_term(again["mask_logits"]),
        }
        return sum(terms.values()), terms

    def _targets(self, batch):
        return jnp.unpackbits(batch.masks, axis=-1).astype(jnp.float32)


def make_objective(apply, options, **weights):
    return DotsObjective(apply, num_points=64, **weights)


def select(outputs, num_kept: int = 8) -> Selection:
    """Keep the best pairs of a query and a class."""
    probs = jax.nn.softmax(outputs["class_logits"])
    number = probs.shape[-1]
    scores, pairs = jax.lax.top_k(probs.reshape(len(probs), -1), num_kept)
    return Selection(
        scores,
        (pairs % number).astype(jnp.int32),
        (pairs // number).astype(jnp.int32),
        jnp.ones(scores.shape, bool),
        outputs["mask_logits"],
    )


def faults(*, num_queries, width, **_: Any) -> list[str]:
    return [] if num_queries > 0 else [f"num_queries must be at least 1, got {num_queries}"]


DOTS = Family(
    model=Dots,
    objective=make_objective,
    select=select,
    faults=faults,
    num_masks=lambda options: options["num_queries"],
    targets=FULL_BITS._replace(keeps_empty=True),
    mask_stride=STRIDE,
    map_stride=STRIDE,
    mask_threshold=0.5,
    masks_are_logits=True,
    scores_at_original_size=True,
)


def get_config(**data: Mapping[str, str]) -> ConfigDict:
    """Return a configuration with this family's own keys; the data's parts are given."""
    config = tiny.get_config()
    with config.unlocked():
        model = dict(family="dots", backbone=config.model.backbone, num_queries=6, width=8)
        config.model = ConfigDict(dict(model, dtype="float32"))
        config.objective = ConfigDict(dict(guided_weight=0.5))
        config.eval = ConfigDict(dict(num_kept=8, batch_size=1, protocol="original"))
    config.data.update(dict(augmentation="flip_resize_crop", generator=""))
    for part, values in data.items():
        config.data[part].update(values)
    return config
