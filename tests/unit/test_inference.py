"""Scores and labels of raw outputs against numbers worked out by hand."""

import jax.numpy as jnp
import numpy as np

from sparseinst_jax.models.sparseinst.inference import select
from sparseinst_jax.models.sparseinst.model import Outputs


def logit(probability):
    probability = np.asarray(probability, np.float64)
    return np.log(probability / (1 - probability)).astype(np.float32)


def outputs_of(class_probs, objectness, mask_probs):
    """One image from probabilities: [N, K], [N], [N, h, w]."""
    return Outputs(
        class_logits=logit(class_probs)[None],
        mask_logits=logit(mask_probs)[None],
        objectness_logits=logit(objectness)[None],
    )


def test_score_is_the_root_of_class_times_objectness_times_mean_inside_the_mask():
    mask = [[[0.9, 0.7], [0.4, 0.1]]]  # 0.9 and 0.7 are inside: mean 0.8
    found = select(outputs_of([[0.2, 0.5, 0.1]], [0.72], mask))
    np.testing.assert_allclose(found.scores, [[0.6 * 0.8]], rtol=2e-6)
    np.testing.assert_array_equal(found.labels, [[1]])
    np.testing.assert_array_equal(found.is_kept, [[True]])
    np.testing.assert_allclose(found.masks[0], mask, rtol=1e-6)


def test_threshold_is_applied_after_the_root_and_before_rescoring():
    # sqrt(1e-2 * 3.6e-3) = 0.006 passes, sqrt(1e-2 * 1.6e-3) = 0.004 does not; the first one's
    # mask brings it to 0.003 afterwards, and it stays.
    masks = np.full((2, 2, 2), 0.5)
    found = select(outputs_of([[0.01], [0.01]], [3.6e-3, 1.6e-3], masks))
    np.testing.assert_array_equal(found.is_kept, [[True, False]])
    np.testing.assert_allclose(found.scores[0, 0], 0.003, rtol=1e-5)


def test_empty_mask_scores_zero_and_is_kept():
    found = select(outputs_of([[0.9]], [0.9], np.full((1, 3, 3), 0.45 - 1e-3)))
    np.testing.assert_array_equal(found.scores, [[0.0]])
    np.testing.assert_array_equal(found.is_kept, [[True]])


def test_kept_queries_are_neither_sorted_nor_suppressed():
    same = np.full((3, 2, 2), 0.8)
    found = select(outputs_of([[0.2], [0.9], [0.4]], [0.5, 0.5, 0.5], same))
    np.testing.assert_array_equal(found.is_kept, [[True, True, True]])
    np.testing.assert_allclose(
        found.scores[0], 0.8 * np.sqrt(np.array([0.2, 0.9, 0.4]) * 0.5), rtol=2e-6
    )


def test_half_precision_logits_are_scored_in_float32(rng):
    logits = rng.normal(size=(1, 4, 3)).astype(np.float32)
    masks = rng.normal(size=(1, 4, 6, 6)).astype(np.float32)
    halves = Outputs(
        *(jnp.asarray(value, jnp.bfloat16) for value in (logits, masks, logits[..., 0]))
    )
    floats = Outputs(*(value.astype(jnp.float32) for value in halves))
    for half, full in zip(select(halves), select(floats), strict=True):
        assert half.dtype == full.dtype != jnp.bfloat16
        np.testing.assert_array_equal(half, full)
