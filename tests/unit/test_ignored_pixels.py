"""Ignored pixels (crowd regions) in the objective, worked out by hand on a mask of four pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparseinst_jax.checkpoints.state import TrainState
from sparseinst_jax.data.batch import Batch
from sparseinst_jax.models.sparseinst.model import Outputs
from sparseinst_jax.models.sparseinst.objective import Counts, SparseInstObjective
from sparseinst_jax.training.step import TrainStep

pytestmark = pytest.mark.usefixtures("quick_compilation")

LN2 = float(np.log(2))
ONE = Counts(np.float32(1), np.float32(1))
OBJECTIVE = SparseInstObjective(apply=None, num_masks=2)
LOSS, SCORES = jax.jit(OBJECTIVE.loss), jax.jit(OBJECTIVE.match_scores)
QUERY = {"masks": np.array([[0]], np.int32)}  # the first prediction makes the only target


def _sample(ignored=(0, 0, 1, 1), second=(-5.0, 0.0, 5.0, 5.0)):
    """One image, two predictions; the target is the first pixel."""
    outputs = Outputs(
        class_logits=jnp.zeros((1, 2, 1)),
        mask_logits=jnp.array([[[[0.0, 0.0, 5.0, 5.0]], [list(second)]]]),
        objectness_logits=jnp.array([[1.0, 0.0]]),
    )
    batch = Batch(
        images=np.zeros((1, 4, 16, 3), np.uint8),
        valid_size=np.array([[4, 16]], np.int32),
        labels=np.zeros((1, 1), np.int32),
        masks=np.array([[[[4, 0, 0, 0]]]], np.uint8),
        is_target=np.ones((1, 1), bool),
        image_id=None,
        is_ignored=None if ignored is None else np.array([[ignored]], bool),
    )
    return outputs, batch


def _terms(outputs, batch):
    _, terms = LOSS(None, None, outputs, batch, QUERY, ONE)
    return {k: float(v) for k, v in terms.items()}


def test_ignored_pixels_count_in_no_term_of_a_mask():
    terms = _terms(*_sample())
    # Of the two pixels that count, both are 0.5 likely: <p,t> = 0.5, <p,p> = 0.5, <t,t> = 1.
    assert terms["dice"] == pytest.approx(2 * (1 - 2 * 0.5 / 1.5), abs=1e-4)
    assert terms["mask"] == pytest.approx(5 * LN2)
    # Cut at 0.4 both pixels are predicted, one is wanted: IoU 0.5, against a logit of 1.
    assert terms["objectness"] == pytest.approx(1 - 0.5 + np.log1p(np.exp(-1)), abs=1e-5)
    # The matched prediction's class loss alone: 0.25 (1 - 0.5)² ln 2.
    assert terms["class"] == pytest.approx(2 * 0.25 * 0.25 * LN2)


def test_the_match_score_sees_only_the_pixels_that_count():
    score = np.asarray(SCORES(*_sample())["masks"])[0, :, 0]
    probability = 1 / (1 + np.exp(5.0))
    dice = np.array([2 * 0.5 / 1.5, 2 * probability / (probability**2 + 0.25 + 1)])
    np.testing.assert_allclose(score, dice**0.8 * 0.5**0.2, rtol=1e-4)


def test_without_the_map_the_same_pixels_count():
    ignored, counted = _terms(*_sample()), _terms(*_sample(ignored=None))
    assert counted["mask"] == pytest.approx(5 * (2 * LN2 + 2 * np.log1p(np.exp(5))) / 4)
    # Both predictions are judged, the second as background: 0.75 (1 - 0.5)² ln 2.
    assert counted["class"] == pytest.approx(2 * (0.25 + 0.75) * 0.25 * LN2)
    assert counted["dice"] > ignored["dice"] + 0.5
    assert _terms(*_sample(ignored=(0, 0, 0, 0))) == pytest.approx(counted)


@pytest.mark.parametrize(
    ("second", "is_judged"),
    [
        ((-5.0, 0.0, 5.0, 5.0), False),  # two of three pixels are ignored
        ((5.0, 5.0, 5.0, 5.0), True),  # exactly half
        ((-5.0, -5.0, -5.0, -0.3), False),  # σ(-0.3) = 0.43 is over the cut at 0.4
        ((-5.0, -5.0, -5.0, -0.5), True),  # σ(-0.5) = 0.38 is not: this mask lies nowhere
    ],
)
def test_an_unmatched_mask_mostly_in_ignored_pixels_is_not_taught_background(second, is_judged):
    gradient = jax.grad(lambda o, batch: LOSS(None, None, o, batch, QUERY, ONE)[0])(
        *_sample(second=second)
    )
    # Nothing moves the ignored pixels, of any prediction, and nothing the unmatched mask.
    assert not np.asarray(gradient.mask_logits)[..., 2:].any()
    assert np.asarray(gradient.mask_logits)[0, 0, 0, :2].all()
    assert not np.asarray(gradient.mask_logits)[0, 1].any()
    assert bool(gradient.class_logits[0, 1, 0]) == is_judged
    assert bool(gradient.class_logits[0, 0, 0])  # the matched one is always judged


def test_the_ignored_part_of_a_target_is_not_wanted():
    outputs, batch = _sample()
    wider = batch._replace(masks=np.array([[[[4, 0, 4, 0]]]], np.uint8))
    assert _terms(outputs, wider) == _terms(outputs, batch)
    scores = [np.asarray(SCORES(outputs, b)["masks"]) for b in (wider, batch)]
    np.testing.assert_array_equal(*scores)


def test_a_matched_prediction_is_judged_wherever_it_lies():
    terms = _terms(*_sample(ignored=(0, 1, 1, 1)))  # three of its four pixels are ignored
    assert terms["class"] == pytest.approx(2 * 0.25 * 0.25 * LN2)


def test_a_target_all_in_ignored_pixels_gives_finite_numbers():
    outputs, batch = _sample(ignored=(1, 1, 1, 1))
    (total, _), gradient = jax.value_and_grad(
        lambda o: LOSS(None, None, o, batch, QUERY, ONE), has_aux=True
    )(outputs)
    assert np.isfinite(total) and all(np.isfinite(leaf).all() for leaf in gradient)
    assert not np.asarray(gradient.mask_logits).any()


def test_the_map_is_cut_into_micro_batches_with_its_images():
    def apply(params, statistics, images, train):
        """A network whose mask logits of every image are its only parameters."""
        logits = jnp.broadcast_to(params["logits"], (len(images), 2, 1, 4))
        outputs = Outputs(jnp.zeros((len(images), 2, 1)), logits, jnp.zeros((len(images), 2)))
        return outputs, statistics

    sgd = optax.sgd(0.1)
    objective = SparseInstObjective(apply, num_masks=2)
    step = TrainStep(objective, sgd, micro_batches=2, devices=jax.local_devices()[:1])
    batch = Batch(
        images=np.zeros((4, 4, 16, 3), np.uint8),
        valid_size=np.zeros((4, 2), np.int32),
        labels=np.zeros((4, 1), np.int32),
        masks=np.zeros((4, 1, 1, 4), np.uint8),
        is_target=np.ones((4, 1), bool),
        image_id=np.arange(4),
        is_ignored=np.arange(16).reshape(4, 1, 4) >= 9,
    )
    params = {"logits": np.ones((2, 1, 4), np.float32)}
    everywhere = batch._replace(is_ignored=np.array([[[False, True, False, True]]] * 4))
    state = step.place(TrainState(np.int32(0), params, {}, sgd.init(params)))
    state, _ = step(state, everywhere)
    moved = step.fetch(state).params["logits"] != 1
    assert moved.any(axis=0).tolist() == [[True, False, True, False]]
    first, second = step.split(batch)
    assert not first.is_ignored.any() and first.is_ignored.shape == (1, 2, 1, 4)
    assert second.is_ignored.ravel().tolist() == [False] + [True] * 7
    assert step.split(batch._replace(is_ignored=None))[1].is_ignored is None
