"""The objective and the step on a tiny network: exact counts, padding, empty images, parts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparseinst_jax import losses, matching
from sparseinst_jax.checkpoints.state import TrainState
from sparseinst_jax.data.batch import Batch
from sparseinst_jax.models.backbones.resnet import ResNet
from sparseinst_jax.models.sparseinst.model import Outputs, SparseInst
from sparseinst_jax.models.sparseinst.objective import Counts, SparseInstObjective
from sparseinst_jax.models.trees import functional
from sparseinst_jax.training.step import TrainStep

pytestmark = pytest.mark.usefixtures("quick_compilation")

HEIGHT, WIDTH, MASKS, CLASSES = 64, 32, 6, 3


def make_batch(targets_per_image, padded_targets, seed=0):
    rng = np.random.default_rng(seed)
    size = len(targets_per_image)
    shape = size, padded_targets
    is_target = np.arange(padded_targets) < np.array(targets_per_image)[:, None]
    masks = rng.integers(0, 5, (size, 8, HEIGHT // 4, WIDTH // 4))
    labels = rng.integers(0, CLASSES, (size, 8))
    padded_masks = np.zeros((*shape, HEIGHT // 4, WIDTH // 4), np.uint8)
    padded_labels = np.zeros(shape, np.int32)
    for image, number in enumerate(targets_per_image):
        padded_masks[image, :number] = masks[image, :number]
        padded_labels[image, :number] = labels[image, :number]
    return Batch(
        images=rng.integers(0, 256, (size, HEIGHT, WIDTH, 3)).astype(np.uint8),
        valid_size=np.full((size, 2), [60, 30], np.int32),
        labels=padded_labels,
        masks=padded_masks,
        is_target=is_target,
        image_id=np.arange(size),
    )


def make_outputs(size, seed=1):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))  # noqa: E731
    return Outputs(
        normal(size, MASKS, CLASSES),
        3 * normal(size, MASKS, HEIGHT // 4, WIDTH // 4),
        normal(size, MASKS),
    )


def weigh(objective, outputs, batch):
    scores = jax.jit(objective.match_scores)(outputs, batch)
    query_index = matching.match(np.asarray(scores["masks"]), batch.is_target)
    counts = jax.tree.map(lambda n: np.maximum(n, 1), objective.count(batch))
    matches = {"masks": query_index}
    return jax.jit(objective.loss)(None, None, outputs, batch, matches, counts), query_index


@pytest.fixture
def objective():
    return SparseInstObjective(apply=None, num_masks=MASKS)


def test_match_score_is_dice_to_the_0_8_times_class_probability_to_the_0_2(objective):
    batch, outputs = make_batch([2], 4), make_outputs(1)
    score = objective.match_scores(outputs, batch)["masks"]
    n, m = 3, 1
    dice = 1 - losses.dice_loss(outputs.mask_logits[0, n], batch.masks[0, m] / 4.0)
    p_class = jax.nn.sigmoid(outputs.class_logits[0, n, batch.labels[0, m]])
    assert float(score[0, n, m]) == pytest.approx(float(dice**0.8 * p_class**0.2), rel=1e-4)


def test_every_term_is_what_the_paper_says_worked_out_pair_by_pair(objective):
    batch, outputs = make_batch([2, 0, 3], 4), make_outputs(3)
    (total, terms), query_index = weigh(objective, outputs, batch)
    wanted = np.zeros((3, MASKS, CLASSES), np.float32)
    dice, mask, objectness = [], [], []
    for image, m in zip(*np.nonzero(batch.is_target), strict=True):
        n = query_index[image, m]
        wanted[image, n, batch.labels[image, m]] = 1
        logits, target = outputs.mask_logits[image, n], batch.masks[image, m] / 4.0
        dice.append(losses.dice_loss(logits, target))
        mask.append(losses.binary_cross_entropy(logits, target).mean())
        iou = losses.mask_iou(logits, target)
        objectness.append(losses.binary_cross_entropy(outputs.objectness_logits[image, n], iou))
    expected = {
        "class": 2.0 * losses.focal_loss(outputs.class_logits, wanted).sum() / 5,
        "mask": 5.0 * np.mean(mask),
        "dice": 2.0 * np.sum(dice) / 5,
        "objectness": np.mean(objectness),
    }
    for name, value in expected.items():
        assert float(terms[name]) == pytest.approx(float(value), rel=1e-5), name
    assert float(total) == pytest.approx(float(sum(expected.values())), rel=1e-5)


def test_padded_targets_change_neither_loss_nor_gradient(objective):
    outputs = make_outputs(2)
    results = []
    for padded_targets in (3, 8):
        batch = make_batch([3, 1], padded_targets)
        _, query_index = weigh(objective, outputs, batch)
        results.append(
            jax.jit(
                jax.value_and_grad(
                    lambda o, b=batch, q=query_index: objective.loss(
                        None, None, o, b, {"masks": q}, Counts(4.0, 4.0)
                    )[0]
                )
            )(outputs)
        )
    for left, right in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-7)


def test_a_batch_without_objects_gives_only_the_class_loss_and_finite_gradients(objective):
    batch, outputs = make_batch([0, 0], 4), make_outputs(2)
    (total, terms), query_index = weigh(objective, outputs, batch)
    expected = 2.0 * losses.focal_loss(outputs.class_logits, jnp.zeros((2, MASKS, CLASSES))).sum()
    assert float(total) == pytest.approx(float(expected), rel=1e-5)
    assert float(terms["mask"]) == float(terms["dice"]) == float(terms["objectness"]) == 0.0
    counts = Counts(1.0, 1.0)
    gradient = jax.jit(
        jax.grad(lambda o: objective.loss(None, None, o, batch, {"masks": query_index}, counts)[0])
    )(outputs)
    assert all(np.isfinite(leaf).all() for leaf in gradient)
    assert not np.asarray(gradient.mask_logits).any()


def test_with_more_objects_than_masks_the_divisor_counts_only_the_matched(objective):
    batch = make_batch([8, 1], 8)
    assert objective.count(batch) == (9.0, MASKS + 1.0)


@pytest.fixture(scope="module")
def network():
    rng = np.random.default_rng(0)
    backbone = ResNet(stage_depths=(1, 1, 1, 1), width=4, norm="group_norm", rng=rng)
    model = SparseInst(
        backbone,
        num_classes=CLASSES,
        encoder_channels=8,
        decoder_channels=8,
        decoder_convs=1,
        num_masks=MASKS,
        num_groups=2,
        kernel_dim=4,
        rng=rng,
    )
    return functional(model)


def run_steps(network, batch, num_steps, micro_batches):
    apply, params, statistics = network
    optimizer = optax.sgd(1e-2)
    step = TrainStep(
        SparseInstObjective(apply, MASKS),
        optimizer,
        micro_batches=micro_batches,
        devices=jax.local_devices()[:1],
    )
    state = step.place(TrainState(np.int32(0), params, statistics, optimizer.init(params)))
    history = []
    for _ in range(num_steps):
        state, metrics = step(state, batch)
        history.append({name: float(value[0]) for name, value in metrics.items()})
    return step.fetch(state), history


def test_accumulated_micro_batches_equal_the_whole_batch(network):
    batch = make_batch([3, 0, 8, 1], 8)  # very uneven parts: a mean of means would differ
    whole, whole_history = run_steps(network, batch, 2, micro_batches=1)
    parts, parts_history = run_steps(network, batch, 2, micro_batches=2)
    for left, right in zip(whole_history, parts_history, strict=True):
        assert left == pytest.approx(right, rel=1e-4)
    before = jax.tree.leaves(network[1])
    for old, left, right in zip(
        before, jax.tree.leaves(whole.params), jax.tree.leaves(parts.params), strict=True
    ):
        moved = np.abs(left - old).max()
        np.testing.assert_allclose(left, right, atol=1e-3 * moved + 1e-8)
    assert whole.step == parts.step == 2


def test_a_step_compiles_each_half_once_and_never_again(network):
    compiled = []
    batch = make_batch([3, 0, 8, 1], 8)  # the programs of the whole batch above, from the cache

    def listen(event, duration, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(details.get("fun_name", ""))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        run_steps(network, batch, 1, micro_batches=1)
        first = len(compiled)
        del compiled[:]
        run_steps(network, batch, 4, micro_batches=1)
        assert len(compiled) == first  # a fresh step: the same programs however many steps
        halves = [name for name in compiled if "on_device" in name]
        assert len(halves) in (0, 2)  # older jax does not say which function it compiles
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_a_batch_that_parts_do_not_divide_is_refused(network):
    with pytest.raises(ValueError, match=r"micro_batches x local devices = 2 x 1, got 3"):
        run_steps(network, make_batch([1, 1, 1], 4), 1, micro_batches=2)


def test_the_first_half_hands_over_no_copy_of_what_it_was_given(network, monkeypatch):
    """The residuals that are parameters are found; left in, there would be one for each kernel.

    And so are statistics that do not change, those of frozen norms.
    """
    apply, params, statistics = network
    objective, batch = SparseInstObjective(apply, MASKS), make_batch([3, 1], 8)
    given = params, statistics, np.int32(0), np.arange(2, dtype=np.int32), batch

    def handed_over():
        trained = TrainStep(objective, optax.sgd(1e-2))
        traced = jax.make_jaxpr(trained._first_half)(*given).jaxpr
        ends = np.cumsum([len(jax.tree.leaves(tree)) for tree in given[:2]])
        parts = traced.invars[: ends[0]], traced.invars[ends[0] : ends[1]]
        return [sum(out in part for out in traced.outvars) for part in map(set, parts)]

    number = len(jax.tree.leaves(statistics))
    assert handed_over() == [0, 0]
    monkeypatch.setattr("sparseinst_jax.training.step._changed", lambda new, old: new)
    assert handed_over()[1] >= number
    monkeypatch.setattr("sparseinst_jax.training.step._without", lambda given, pull_back: pull_back)
    assert handed_over()[0] == 37  # all kernels
