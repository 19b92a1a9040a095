"""Choose and score the objects of SparseInst's raw outputs.

    p_n     = max_k sqrt(sigmoid(class_nk) * sigmoid(objectness_n)),   kept where p_n > 0.005
    score_n = p_n * sum(m_n [m_n > 0.45]) / (sum [m_n > 0.45] + 1e-6),  m_n = sigmoid(mask_n)

There is no suppression and no sorting: kept objects stay in the order of the queries. The second
factor (maskness) is taken on the stride-4 mask of the padded image, padding included.

Source: SparseInst section 3.4; the original's `sparseinst/sparseinst.py` (`inference_single`,
`rescoring_mask`). A mask without a pixel above the threshold gets the score 0 and stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sparseinst_jax.models.family import Selection
from sparseinst_jax.models.sparseinst.model import Outputs

SCORE_THRESHOLD = 0.005
MASK_THRESHOLD = 0.45
MASKNESS_EPSILON = 1e-6


def maskness(mask_probs: jax.Array, mask_threshold: float) -> jax.Array:
    """Average the probability inside each cut mask: [B, N, h, w] -> float32 [B, N]."""
    inside = mask_probs > mask_threshold
    total = jnp.sum(jnp.where(inside, mask_probs, 0.0), axis=(-2, -1))
    return total / (jnp.sum(inside, axis=(-2, -1), dtype=jnp.float32) + MASKNESS_EPSILON)


def select(
    outputs: Outputs,
    score_threshold: float = SCORE_THRESHOLD,
    mask_threshold: float = MASK_THRESHOLD,
) -> Selection:
    """Score every query and mark those to keep.

    Args:
        outputs: class_logits [B, N, K], objectness_logits [B, N], mask_logits [B, N, H/4, W/4].
        score_threshold: a query is kept where its score before rescoring is larger.
        mask_threshold: cut of the rescoring.

    Returns:
        The selection, a candidate for each query; always computed in float32, whatever the
        dtype of the logits.
    """
    class_probs = jax.nn.sigmoid(outputs.class_logits.astype(jnp.float32))
    objectness = jax.nn.sigmoid(outputs.objectness_logits.astype(jnp.float32))
    mask_probs = jax.nn.sigmoid(outputs.mask_logits.astype(jnp.float32))
    class_scores = jnp.sqrt(class_probs * objectness[..., None])
    scores = jnp.max(class_scores, axis=-1)
    query_index = jnp.arange(scores.shape[1], dtype=jnp.int32)
    return Selection(
        scores=scores * maskness(mask_probs, mask_threshold),
        labels=jnp.argmax(class_scores, axis=-1).astype(jnp.int32),
        query_index=jnp.broadcast_to(query_index, scores.shape),
        is_kept=scores > score_threshold,
        masks=mask_probs,
    )


def activations(outputs: Outputs, intermediates: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Return the instance activation maps by group: "group 1" and so on to [B, N, H/8, W/8]."""
    maps = intermediates["instance_activation_maps"]  # [B, h, w, G*N]
    number = outputs.class_logits.shape[1]
    groups = jnp.moveaxis(maps.reshape(*maps.shape[:3], -1, number), (3, 4), (0, 2))
    return {f"group {index}": group for index, group in enumerate(groups, start=1)}
