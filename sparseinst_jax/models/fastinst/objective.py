"""FastInst's training objective: two kinds of matching, the guided pass, and the losses.

Every head's prediction is matched to the objects in random points and pays for classes and masks.
The last one is matched a second time, in other points: with those pairs each layer runs once more
on its own result, its matched queries seeing the pixels of their object alone, and pays like the
others. Every object also teaches its class to one place of the map that queries come from.

Source: FastInst (arXiv:2303.08594), sections 3.3 to 3.5; reference `criterion.py`, `matcher.py`.
Differs from the reference: divisors are those of the global batch (all devices, all micro-batches),
where it has means per GPU for classes; equal on one device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparseinst_jax import losses
from sparseinst_jax.data.batch import Batch
from sparseinst_jax.models import ops
from sparseinst_jax.models.fastinst.model import MASK_STRIDE, PROPOSAL_STRIDE, Outputs, Prediction
from sparseinst_jax.models.fastinst.points import (
    Draw,
    Points,
    least_certain,
    random_points,
    sample_all,
    sample_bits,
    sample_each,
)
from sparseinst_jax.models.trees import Tree

PROPOSAL, GUIDED = "proposal", "guided"  # matchings beside those of heads, "head_0" ...


class Counts(NamedTuple):
    """What the losses divide by; float32 scalars of the global batch.

    Attributes:
      objects: objects in the batch; at least 1.
      class_weights: sum over all queries of the weights of their classes.
      places: of the maps that queries come from.
    """

    objects: Any
    class_weights: Any
    places: Any


@dataclasses.dataclass(frozen=True)
class FastInstObjective:
    """The objective of one model.

    Attributes:
      apply: the model as a pure function, from `models.trees.functional`.
      num_layers: L of that model.
      num_queries: N of that model.
      class_weight, mask_weight, dice_weight, proposal_weight: factors of the losses; the first
        three also of the costs of matching.
      location_weight: of the cost of a query that comes from outside of an object.
      no_object_weight: of the class of a query without an object.
      num_points: in which a mask is compared.
      points: draws them; only tests give another source than the default.
    """

    apply: Any
    num_layers: int
    num_queries: int
    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    proposal_weight: float = 20.0
    location_weight: float = 1000.0
    no_object_weight: float = 0.1
    num_points: int = 12544
    points: Points = random_points

    loss_takes_params = True

    oversampling = 3  # candidates for each point of a loss
    certain_share = 0.75  # of the points, chosen where the mask is least certain

    @property
    def minimised(self) -> tuple[str, ...]:
        """All matchings have costs."""
        return (GUIDED, PROPOSAL, *(f"head_{i}" for i in range(self.num_layers + 1)))

    def forward(self, params: Tree, statistics: Tree, batch: Batch) -> tuple[Outputs, Tree]:
        """Run the model on uint8 images; return its outputs and the new statistics."""
        images = ops.normalize_images(batch.images, batch.valid_size)
        return self.apply(params, statistics, images, train=True)

    def count(self, batch: Batch) -> Counts:
        """Count what this part of the batch adds to the divisors; on the host, from the targets."""
        if batch.is_ignored is not None:
            raise ValueError(
                'config.data.crowd is "ignore", which FastInst does not know: it compares masks in '
                'random points. Use "drop", as its recipe does.'
            )
        per_image = np.asarray(batch.is_target).sum(-1)
        number, height, width = batch.images.shape[:3]
        places = (height // PROPOSAL_STRIDE) * (width // PROPOSAL_STRIDE)
        queries = min(self.num_queries, places)
        matched = np.minimum(per_image, queries).sum()
        weights = matched + self.no_object_weight * (number * queries - matched)
        return Counts(*map(np.float32, (per_image.sum(), weights, number * places)))

    def match_scores(self, outputs: Outputs, batch: Batch, keys: jax.Array) -> dict[str, jax.Array]:
        """Return the costs of every prediction with every target, [B, N, M] for each matching."""
        shape = 1, self.num_points
        locations = outputs.query_locations[:, None]
        is_inside = sample_bits(batch.masks, locations) > 0  # [B, M, N]
        location = -is_inside.astype(jnp.float32).swapaxes(1, 2)

        def cost(prediction: Prediction, use: Draw, head: int) -> jax.Array:
            points = self.points(keys, use, head, shape)
            mask, dice = _mask_costs(prediction.mask_logits, batch.masks, points)
            likely = _probabilities(prediction.class_logits, batch.labels)
            total = self.mask_weight * mask - self.class_weight * likely + self.dice_weight * dice
            return total + self.location_weight * location

        last = self.num_layers
        likely = _probabilities(outputs.proposal_logits, batch.labels)
        covered = _covered_places(batch.masks).swapaxes(1, 2).astype(jnp.float32)
        return {
            GUIDED: cost(outputs.heads[last], Draw.MATCH_GUIDED, last),
            PROPOSAL: -self.class_weight * likely - self.location_weight * covered,
            **{f"head_{i}": cost(head, Draw.MATCH, i) for i, head in enumerate(outputs.heads)},
        }

    def loss(
        self,
        params: Tree | None,
        statistics: Tree,
        outputs: Outputs,
        batch: Batch,
        matches: Mapping[str, jax.Array],
        counts: Counts,
        keys: jax.Array,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return this part's share of the loss, and of each weighted term.

        The arguments are those of `training.step.Objective`.

        Returns:
          The total, and the terms `class`, `mask` and `dice` of the last head, the same of each
          guided prediction, such as `class_guided_0`, and of each other head, such as
          `class_head_0`; and `proposal`.
        """
        seen = self.guide(matches[GUIDED], batch.masks)
        guided, _ = self.apply(params, statistics, outputs, seen, method="guided")
        terms = self._terms(
            "", outputs.heads[-1], self.num_layers, False, batch, matches, counts, keys
        )
        for i, prediction in enumerate(guided):
            terms |= self._terms(
                f"_guided_{i}", prediction, i + 1, True, batch, matches, counts, keys
            )
        for i, prediction in enumerate(outputs.heads[:-1]):
            terms |= self._terms(f"_head_{i}", prediction, i, False, batch, matches, counts, keys)
        places = _class_losses(outputs.proposal_logits, batch.labels, matches[PROPOSAL])[0]
        terms["proposal"] = self.proposal_weight * places.sum() / counts.places
        return sum(terms.values(), start=jnp.zeros((), jnp.float32)), terms

    def guide(self, query_index: jax.Array, bits: jax.Array) -> jax.Array:
        """Return what queries see in the guided pass, bool [B, N, H/8, W/8]: their objects."""
        # The first pixel of each block of 8x8 is the highest bit of every eighth row's bytes.
        inside = bits[:, :, ::MASK_STRIDE] >= 128  # [B, M, H/8, W/8]
        batch, _, height, width = inside.shape
        queries = min(self.num_queries, height * width * MASK_STRIDE**2 // PROPOSAL_STRIDE**2)
        image = jnp.arange(batch)[:, None]
        index = jnp.where(query_index >= 0, query_index, queries)  # out of range: dropped
        everything = jnp.ones((batch, queries, height, width), bool)
        return everything.at[image, index].set(inside, mode="drop")

    def _terms(
        self,
        suffix: str,
        prediction: Prediction,
        head: int,
        is_guided: bool,
        batch: Batch,
        matches: Mapping[str, jax.Array],
        counts: Counts,
        keys: jax.Array,
    ) -> dict[str, jax.Array]:
        """Return the three weighted terms of one prediction."""
        query_index = matches[GUIDED if is_guided else f"head_{head}"]
        class_losses, is_object = _class_losses(prediction.class_logits, batch.labels, query_index)
        weights = jnp.where(is_object, 1.0, self.no_object_weight)

        is_matched = query_index >= 0
        index = jnp.where(is_matched, query_index, 0)[:, :, None, None]
        logits = jnp.take_along_axis(prediction.mask_logits, index, axis=1)
        kept = int(self.certain_share * self.num_points)
        use = (
            (Draw.CANDIDATES_GUIDED, Draw.ANYWHERE_GUIDED)
            if is_guided
            else (Draw.CANDIDATES, Draw.ANYWHERE)
        )
        numbers = self.oversampling * self.num_points, self.num_points - kept
        drawn = (
            self.points(keys, each, head, (index.shape[1], number))
            for each, number in zip(use, numbers, strict=True)
        )
        points = least_certain(logits, *drawn)
        logits, targets = sample_each(logits, points), sample_bits(batch.masks, points)
        mask = losses.binary_cross_entropy(logits, targets).mean(-1)
        probs = jax.nn.sigmoid(logits)
        overlap, both = (probs * targets).sum(-1), probs.sum(-1) + targets.sum(-1)
        dice = 1 - (2 * overlap + 1) / (both + 1)
        mask, dice = (jnp.where(is_matched, x, 0.0).sum() for x in (mask, dice))
        return {
            f"class{suffix}": self.class_weight
            * (weights * class_losses).sum()
            / counts.class_weights,
            f"mask{suffix}": self.mask_weight * mask / counts.objects,
            f"dice{suffix}": self.dice_weight * dice / counts.objects,
        }


def _probabilities(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the probability of each target's class: [B, N, K+1] and [B, M] to [B, N, M]."""
    return jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), labels[:, None, :], axis=2)


def _mask_costs(
    mask_logits: jax.Array, bits: jax.Array, points: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Compare every mask [B, N, h, w] with every target in the same points [B, 1, P, 2].

    Returns:
      Mean cross entropy and dice loss, [B, N, M].
    """
    logits = sample_all(mask_logits, points[:, 0])  # [B, P, N]
    targets = sample_bits(bits, points)  # [B, M, P]
    number = targets.shape[2]
    product = jnp.einsum("bpn,bmp->bnm", logits, targets, precision="highest")
    cross_entropy = (jax.nn.softplus(logits).sum(1)[:, :, None] - product) / number
    probs = jax.nn.sigmoid(logits)
    overlap = jnp.einsum("bpn,bmp->bnm", probs, targets, precision="highest")
    both = probs.sum(1)[:, :, None] + targets.sum(2)[:, None, :]
    return cross_entropy, 1 - (2 * overlap + 1) / (both + 1)


def _covered_places(bits: jax.Array) -> jax.Array:
    """Return which places of the map of stride 16 hold a pixel of each mask: bool [B, M, h * w]."""
    batch, number, height, width = bits.shape
    rows, columns = height // PROPOSAL_STRIDE, 8 * width // PROPOSAL_STRIDE
    blocks = bits.reshape(batch, number, rows, PROPOSAL_STRIDE, columns, PROPOSAL_STRIDE // 8)
    return (blocks > 0).any((3, 5)).reshape(batch, number, -1)


def _class_losses(
    logits: jax.Array, labels: jax.Array, index: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the cross entropy of each prediction, [B, N], and whether it has an object.

    Args:
      logits: [B, N, K+1].
      labels: [B, M].
      index: int32 [B, M], the prediction of each target, or -1.
    """
    batch, number, classes = logits.shape
    image = jnp.arange(batch)[:, None]
    place = jnp.where(index >= 0, index, number)  # out of range: dropped
    wanted = jnp.full((batch, number), classes - 1).at[image, place].set(labels, mode="drop")
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(log_probs, wanted[..., None], axis=-1)[..., 0]
    return -chosen, wanted < classes - 1
