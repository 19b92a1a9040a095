"""Choose the pairs of a query and a class that are FastInst's results.

The best pairs by class probability; one query may appear with several classes, and there is no
suppression. A score is the class probability times the mean probability inside the mask, which is
measured at the original size: masks are resized as logits and cut there at a probability of 0.5.
An empty mask has the score 0 and stays.

Source: reference `fastinst.py` (`instance_inference`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sparseinst_jax.models.family import Selection
from sparseinst_jax.models.fastinst.model import Outputs

MASK_THRESHOLD = 0.5


def select(
    outputs: Outputs,
    num_detections: int = 100,
    score_threshold: float = 0.0,
    mask_threshold: float = MASK_THRESHOLD,
) -> Selection:
    """Choose the most probable pairs of a query and a class.

    Args:
        outputs: of the network; its last head's predictions count.
        num_detections: D, pairs for an image; fewer where there are not so many.
        score_threshold: a pair is kept where its class is more probable.
        mask_threshold: not used here; masks are cut at the original size.

    Returns:
        The selection, the most probable pair first; its masks are logits of stride 8.
    """
    last = outputs.heads[-1]
    probs = jax.nn.softmax(last.class_logits.astype(jnp.float32), axis=-1)[..., :-1]
    num_classes = probs.shape[-1]
    pairs = probs.reshape(len(probs), -1)
    scores, index = jax.lax.top_k(pairs, min(num_detections, pairs.shape[1]))
    return Selection(
        scores=scores,
        labels=(index % num_classes).astype(jnp.int32),
        query_index=(index // num_classes).astype(jnp.int32),
        is_kept=scores > score_threshold,
        masks=last.mask_logits,
    )


def activations(outputs: Outputs, intermediates: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Return where queries look in each layer: the probabilities [B, N, H/8, W/8] of the mask.

    A query attends to the pixels where it is at least a half.
    """
    logits = [value for name, value in intermediates.items() if name.startswith("mask_logits_")]
    return {
        f"seen by layer {index}": jax.nn.sigmoid(jnp.moveaxis(each, -1, 1))
        for index, each in enumerate(logits, start=1)
    }
