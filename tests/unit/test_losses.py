"""Losses against values worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseinst_jax import losses


def test_binary_cross_entropy_takes_soft_targets_and_stays_finite():
    logits = jnp.asarray([0.0, 0.0, 1000.0, -1000.0])
    targets = jnp.asarray([1.0, 0.25, 1.0, 1.0])
    values = losses.binary_cross_entropy(logits, targets)
    np.testing.assert_allclose(values, [np.log(2), np.log(2), 0, 1000], rtol=1e-6)


def test_focal_loss_of_an_even_guess_is_a_weighted_quarter_of_the_cross_entropy():
    values = losses.focal_loss(jnp.zeros(2), jnp.asarray([1.0, 0.0]))
    np.testing.assert_allclose(values, np.log(2) * 0.25 * np.array([0.25, 0.75]), rtol=1e-6)


def test_focal_loss_by_hand_for_one_logit():
    p = 1 / (1 + np.exp(-2.0))
    (value,) = losses.focal_loss(jnp.asarray([2.0]), jnp.asarray([1.0]))
    assert value == pytest.approx(0.25 * (1 - p) ** 2 * -np.log(p), rel=1e-5)


def test_dice_loss_by_hand():
    logits = jnp.asarray([[[0.0, 0.0]]])  # probabilities one half
    targets = jnp.asarray([[[1.0, 0.0]]])
    expected = 1 - 2 * 0.5 / (0.5 + 1.0 + 1e-4)
    np.testing.assert_allclose(losses.dice_loss(logits, targets), [expected], rtol=1e-6)


def test_dice_matrix_holds_one_minus_the_dice_loss_of_every_pair(rng):
    logits = jnp.asarray(rng.standard_normal((2, 3, 4, 5), np.float32))
    targets = jnp.asarray(rng.random((2, 2, 4, 5), np.float32))
    matrix = losses.dice_matrix(logits, targets)
    for n in range(3):
        for m in range(2):
            expected = 1 - losses.dice_loss(logits[:, n], targets[:, m])
            np.testing.assert_allclose(matrix[:, n, m], expected, rtol=1e-4, atol=1e-5)


def test_mask_iou_cuts_at_the_training_threshold_and_has_no_gradient():
    probs = np.array([0.41, 0.39, 0.9, 0.1])
    logits = jnp.asarray(np.log(probs / (1 - probs)).reshape(1, 2, 2))
    targets = jnp.asarray([[[1.0, 1.0], [0.25, 0.0]]])
    np.testing.assert_allclose(losses.mask_iou(logits, targets), [1 / 3], rtol=1e-4)
    gradient = jax.grad(lambda x: losses.mask_iou(x, targets).sum())(logits)
    assert not np.asarray(gradient).any()
