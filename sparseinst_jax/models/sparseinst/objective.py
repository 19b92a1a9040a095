"""SparseInst's training objective: match score and the four losses.

Source: SparseInst (arXiv:2203.12827), label assignment and training losses; reference `loss.py`.
Differs from the reference: all four losses are divided by counts of the global batch (all devices,
all micro-batches); its mask and objectness losses are means per GPU. Equal on one device. A batch
without objects is ordinary (the reference raises): only the class loss remains, divided by 1.
Where the batch has `is_ignored` (crowd regions, off in the published recipes; the reference drops
them), those pixels count neither in match scores, masks' losses and IoU, nor is a prediction that
matches no target and lies there taught that it is background.
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
from sparseinst_jax.models.sparseinst.model import Outputs
from sparseinst_jax.models.trees import Tree

TARGET_LEVELS = 4.0  # target masks are integers 0..4


class Counts(NamedTuple):
    """What the losses divide by; float32 scalars of the global batch (each at least 1).

    Attributes:
      targets: objects in the batch.
      matched: objects that get a prediction: at most N an image.
    """

    targets: Any
    matched: Any


@dataclasses.dataclass(frozen=True)
class SparseInstObjective:
    """The objective of one model.

    Attributes:
      apply: the model as a pure function, from `models.trees.functional`.
      num_masks: N of that model.
      class_weight, mask_weight, dice_weight, objectness_weight: factors of the four losses.
    """

    apply: Any
    num_masks: int
    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 2.0
    objectness_weight: float = 1.0

    minimised = ()  # its one matching, "masks", maximises the score
    loss_takes_params = False

    dice_power = 0.8
    class_power = 0.2
    objectness_iou_threshold = 0.4
    # Share of an unmatched mask that must lie in ignored pixels for it to be left alone; COCO's
    # evaluation leaves a detection alone when as much of it lies in a crowd region.
    ignored_share = 0.5

    def forward(self, params: Tree, statistics: Tree, batch: Batch) -> tuple[Outputs, Tree]:
        """Run the model on uint8 images; return its outputs and the new statistics."""
        images = ops.normalize_images(batch.images, batch.valid_size)
        return self.apply(params, statistics, images, train=True)

    def count(self, batch: Batch) -> Counts:
        """Count what this part of the batch adds to the divisors; on the host, from the targets."""
        per_image = np.asarray(batch.is_target).sum(-1)
        matched = np.minimum(per_image, self.num_masks)
        return Counts(np.float32(per_image.sum()), np.float32(matched.sum()))

    def match_scores(
        self, outputs: Outputs, batch: Batch, keys: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Return dice^0.8 * p_class^0.2 of every prediction with every target, [B, N, M]."""
        mask_logits = _at_target_size(outputs.mask_logits, batch)
        dice = losses.dice_matrix(mask_logits, _target_masks(batch), _counted(batch))
        probs = jax.nn.sigmoid(outputs.class_logits)  # [B, N, K]
        p_class = jnp.take_along_axis(probs, batch.labels[:, None, :], axis=2)  # [B, N, M]
        return {"masks": dice**self.dice_power * p_class**self.class_power}

    def loss(
        self,
        params: Tree | None,
        statistics: Tree | None,
        outputs: Outputs,
        batch: Batch,
        matches: Mapping[str, jax.Array],
        counts: Counts,
        keys: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return this part's share of the loss, and of each weighted term.

        Shares of devices and micro-batches add up to the loss of the global batch. The arguments
        are those of `training.step.Objective`: `matches["masks"]` is int32 [B, M], the prediction
        of each target, -1 for none; `params`, `statistics` and `keys` are not used.

        Returns:
          The total, and the terms `class`, `mask`, `dice` and `objectness`.
        """
        query_index = matches["masks"]
        class_logits, mask_logits, objectness_logits = outputs
        is_matched = query_index >= 0  # [B, M]
        index = jnp.where(is_matched, query_index, 0)
        image = jnp.arange(index.shape[0])[:, None]

        no_query = class_logits.shape[1]  # out of range: dropped
        one_hot = jnp.zeros_like(class_logits)
        one_hot = one_hot.at[image, jnp.where(is_matched, index, no_query), batch.labels].set(
            1.0, mode="drop"
        )
        class_losses = losses.focal_loss(class_logits, one_hot)
        if batch.is_ignored is not None:
            has_class = one_hot.any(-1, keepdims=True)
            masks = _at_target_size(mask_logits, batch)
            is_judged = has_class | ~self._lies_in_ignored(masks, batch.is_ignored)
            class_losses = jnp.where(is_judged, class_losses, 0.0)
        class_loss = class_losses.sum()

        targets, counted = _target_masks(batch), _counted(batch)
        logits = jnp.take_along_axis(mask_logits, index[:, :, None, None], axis=1)
        logits = _at_target_size(logits, batch)  # [B, M, h, w]
        dice = jnp.where(is_matched, losses.dice_loss(logits, targets, counted), 0.0).sum()
        per_mask = losses.mask_cross_entropy(logits, targets, counted)
        mask = jnp.where(is_matched, per_mask, 0.0).sum()

        iou = losses.mask_iou(logits, targets, self.objectness_iou_threshold, counted)
        predicted = jnp.take_along_axis(objectness_logits, index, axis=1)
        objectness = losses.binary_cross_entropy(predicted, iou)
        objectness = jnp.where(is_matched, objectness, 0.0).sum()

        terms = {
            "class": self.class_weight * class_loss / counts.targets,
            "mask": self.mask_weight * mask / counts.matched,
            "dice": self.dice_weight * dice / counts.targets,
            "objectness": self.objectness_weight * objectness / counts.matched,
        }
        return sum(terms.values(), start=jnp.zeros((), jnp.float32)), terms

    def _lies_in_ignored(self, mask_logits: jax.Array, is_ignored: jax.Array) -> jax.Array:
        """Whether more than half of a mask's pixels, cut at 0.4, are ignored ones: [B, N, 1].

        Cut, not weighed by probability: the sum of small probabilities all over the image is often
        larger than an object. A mask without such pixels lies nowhere.
        """
        predicted = jax.nn.sigmoid(mask_logits) >= self.objectness_iou_threshold  # [B, N, h, w]
        inside = (predicted & is_ignored[:, None]).sum((-2, -1))
        return (inside > self.ignored_share * predicted.sum((-2, -1)))[..., None]


def _at_target_size(mask_logits: jax.Array, batch: Batch) -> jax.Array:
    """Resize [B, N, h, w] to the size of the targets, a quarter of the padded image."""
    return ops.resize_bilinear(mask_logits, batch.masks.shape[-2:], axes=(2, 3))


def _counted(batch: Batch) -> jax.Array | None:
    """Return the pixels that count, [B, 1, H/4, W/4]; None when all do."""
    return None if batch.is_ignored is None else ~batch.is_ignored[:, None]


def _target_masks(batch: Batch) -> jax.Array:
    return batch.masks.astype(jnp.float32) / TARGET_LEVELS
