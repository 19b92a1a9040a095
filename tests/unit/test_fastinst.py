"""FastInst's parts on hand-made inputs: queries, attention, points, costs, results, options."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseinst_jax.data.batch import Batch
from sparseinst_jax.data.target_masks import pack_bits
from sparseinst_jax.models.backbones.resnet import ResNet
from sparseinst_jax.models.fastinst import family, inference, points
from sparseinst_jax.models.fastinst.model import (
    FastInst,
    Outputs,
    Prediction,
    proposal_scores,
    seen_pixels,
)
from sparseinst_jax.models.fastinst.objective import FastInstObjective
from sparseinst_jax.models.fastinst.points import Draw
from sparseinst_jax.models.trees import functional
from sparseinst_jax.setup.builders import build_model
from sparseinst_jax.training.optimizer import decay_mask, rules_of
from sparseinst_jax.weights.convert import original_shapes
from tests.parity import cases

K = 3  # classes
KEYS = jax.random.split(jax.random.key(0), 1)  # of one image


def test_a_rows_points_depend_on_its_image_and_use_alone():
    keys = jax.random.split(jax.random.key(5), 3)
    few = points.random_points(keys[1:2], Draw.CANDIDATES, 1, (2, 7))
    many = points.random_points(keys, Draw.CANDIDATES, 1, (4, 7))
    np.testing.assert_array_equal(few[0], many[1, :2])
    for use, head in ((Draw.CANDIDATES_GUIDED, 1), (Draw.CANDIDATES, 2)):
        assert not np.array_equal(points.random_points(keys, use, head, (4, 7)), many)


@pytest.fixture(scope="module")
def network(quick_compilation):
    rng = np.random.default_rng(0)
    backbone = ResNet(stage_depths=(1, 1, 1, 1), width=4, norm="batch_norm", rng=rng)
    options = dict(channels=8, num_layers=2, num_queries=6, num_auxiliary=2, num_heads=2)
    return FastInst(backbone, num_classes=K, ffn_width=16, rng=rng, **options)


def _logits(probabilities):
    """Logits of probabilities [h, w, K]; the rest is no object."""
    probs = np.asarray(probabilities, np.float64)
    rest = 1 - probs.sum(-1, keepdims=True)
    return np.log(np.concatenate([probs, rest], -1) + 1e-12).astype(np.float32)[None]


def test_a_peak_is_at_least_as_probable_as_its_class_around_it():
    probs = np.full((4, 5, K), 1e-9)
    probs[0, 0, 0] = 0.3  # at the border
    probs[1, 3, 1], probs[1, 4, 1] = 0.4, 0.4  # two equal neighbours
    probs[2, 2, 2] = 0.2  # beside another class, which is more probable
    probs[3, 2, 2] = 0.1  # beside the same class, which is more probable
    scores = np.asarray(proposal_scores(_logits(probs)))[0]
    want = {(0, 0): 1.3, (1, 3): 1.4, (1, 4): 1.4, (2, 2): 1.2, (3, 2): 0.1}
    for place, score in want.items():
        assert scores[place] == pytest.approx(score, abs=1e-6), place
    others = np.delete(scores.ravel(), [y * 5 + x for y, x in want])
    assert others.max() < 1e-6, "what is hardly probable is no peak"


def test_a_place_where_no_object_is_most_probable_can_be_a_peak():
    probs = np.full((3, 3, K), 1e-9)
    probs[1, 1, 0] = 0.05
    assert proposal_scores(_logits(probs))[0, 1, 1] == pytest.approx(1.05, abs=1e-6)


def test_a_query_that_would_see_nothing_sees_everything_and_auxiliary_ones_always_do():
    is_seen = np.zeros((1, 2, 2, 3), bool)
    is_seen[0, 0, 1, 2] = True
    seen = np.asarray(seen_pixels(jnp.asarray(is_seen), num_auxiliary=2))
    assert seen.shape == (1, 4, 6)
    assert seen[0, 0].tolist() == [False] * 5 + [True]
    assert seen[0, 1:].all()


def test_a_map_with_fewer_places_than_queries_gives_a_query_for_each(network):
    apply, params, statistics = functional(network)
    images = np.zeros((1, 32, 32, 3), np.float32)
    outputs, _ = jax.jit(apply)(params, statistics, images)
    assert outputs.query_locations.shape == (1, 4, 2)
    corners = {(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)}
    assert {tuple(x) for x in np.asarray(outputs.query_locations)[0].tolist()} == corners
    selection = inference.select(outputs)
    assert selection.scores.shape == (1, 4 * K)


def test_of_the_heads_before_the_last_only_masks_reach_the_results(network):
    apply, params, statistics = functional(network)
    images = np.random.default_rng(1).normal(size=(1, 64, 64, 3)).astype(np.float32)
    run = jax.jit(lambda params: apply(params, statistics, images)[0])

    def changed(part):
        kernel = params["decoder"]["heads"]["0"][part]["2"]["kernel"]
        other = jax.tree.map(lambda x: x, params)
        other["decoder"]["heads"]["0"][part]["2"]["kernel"] = -3 * kernel
        a, b = (run(p).heads[-1].class_logits for p in (params, other))
        return not np.array_equal(a, b)

    assert not changed("classes")
    assert changed("masks")


def test_training_keeps_what_the_guided_pass_needs_and_evaluation_does_not(network):
    apply, params, statistics = functional(network)
    images = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)
    evaluated, trained = (
        jax.eval_shape(lambda *x, t=t: apply(*x, train=t)[0], params, statistics, images)
        for t in (False, True)
    )
    assert (len(evaluated.heads), len(evaluated.memory)) == (1, 0)
    assert (len(trained.heads), len(trained.memory)) == (3, 2)


@pytest.mark.parametrize("name", ["fastinst_r50_x3", "fastinst_r101_x3", "fastinst_r50vd_dcn_x1"])
def test_every_name_and_shape_of_the_originals_weights_has_its_place(name):
    case = cases.load(name)
    _, *trees = functional(build_model(case.config.model, 80, None))
    shapes = original_shapes(*trees, case.family.weights)
    assert shapes == {key: tuple(shape) for key, shape in case.manifest["state_dict"].items()}


# `torch.nn.functional.grid_sample(map, 2 * points - 1, align_corners=False)`
MAP = np.array([[1, 2, 3], [4, -5, 6]], np.float32)
POINTS = np.array([[0, 0], [1, 1], [0.5, 0.5], [0.02, 0.9], [0.37, 0.26], [0.99, 0.1]], np.float32)
SAMPLED = [0.250000, 1.500000, -1.500000, 1.568000, 1.548000, 1.113000]


def test_points_sample_maps_as_pytorch_does():
    each = jax.jit(points.sample_each)(jnp.asarray(MAP[None]), jnp.asarray(POINTS[None]))
    np.testing.assert_allclose(each[0], SAMPLED, atol=2e-6)
    all_ = jax.jit(points.sample_all)(jnp.asarray(MAP[None, None]), jnp.asarray(POINTS[None]))
    np.testing.assert_allclose(all_[0, :, 0], SAMPLED, atol=2e-6)


def test_masks_in_bits_are_sampled_as_maps_of_zeros_and_ones():
    rng = np.random.default_rng(2)
    masks = rng.random((2, 3, 16, 24)) < 0.5
    spread = rng.random((2, 3, 40, 2), np.float32) * 1.2 - 0.1  # some beyond the border
    got = jax.jit(points.sample_bits)(jnp.asarray(pack_bits(masks)), jnp.asarray(spread))
    want = jax.jit(points.sample_each)(jnp.asarray(masks, jnp.float32), jnp.asarray(spread))
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_three_quarters_of_the_points_are_where_a_mask_is_least_certain():
    logits = jnp.asarray(np.linspace(-8, 8, 64, dtype=np.float32).reshape(1, 1, 8, 8))
    candidates = points.random_points(KEYS, Draw.CANDIDATES, 0, (1, 3 * 64))
    anywhere = points.random_points(KEYS, Draw.ANYWHERE, 0, (1, 16))
    chosen = np.asarray(jax.jit(points.least_certain)(logits, candidates, anywhere))
    sample_each = jax.jit(points.sample_each)
    assert chosen.shape == (1, 1, 64, 2)
    np.testing.assert_array_equal(chosen[:, :, 48:], anywhere)
    certain = np.abs(sample_each(logits, candidates))
    kept = np.abs(sample_each(logits, chosen[:, :, :48]))
    np.testing.assert_allclose(np.sort(kept.ravel()), np.sort(certain.ravel())[:48])


def _case(masks, labels, is_target=None, num_queries=4):
    """An objective, outputs of zeros and a batch with the given masks [B, M, 32, 32]."""
    batch, number = np.shape(labels)
    zeros = np.zeros((batch, num_queries, K + 1), np.float32)
    head = Prediction(jnp.asarray(zeros), jnp.zeros((batch, num_queries, 4, 4)))
    locations = jnp.asarray([[0, 0], [1, 0], [0, 1], [1, 1]], jnp.float32)[None]
    outputs = Outputs((head, head), jnp.asarray(zeros), locations, (), None, None)
    objective = FastInstObjective(None, 1, num_queries, num_points=32)
    targets = Batch(
        np.zeros((batch, 32, 32, 3), np.uint8),
        np.full((batch, 2), 32, np.int32),
        np.array(labels, np.int32),
        pack_bits(np.asarray(masks)),
        np.ones((batch, number), bool) if is_target is None else is_target,
        np.arange(batch),
    )
    return objective, outputs, targets


def test_a_query_from_inside_an_object_is_cheaper_by_a_thousand():
    masks = np.zeros((1, 2, 32, 32), bool)
    masks[0, 0, 31, 31] = True  # the last pixel, which the query at (1, 1) touches
    masks[0, 1, 5:20, 5:20] = True  # no corner
    objective, outputs, batch = _case(masks, [[0, 1]])
    costs = jax.jit(objective.match_scores)(outputs, batch, KEYS)
    assert set(costs) == set(objective.minimised) == {"guided", "proposal", "head_0", "head_1"}
    inside = np.asarray(costs["head_1"])[0] < -900
    assert inside.T.tolist() == [[False, False, False, True], [False] * 4]


def test_any_pixel_of_a_cell_makes_it_a_place_of_the_object():
    masks = np.zeros((1, 1, 32, 32), bool)
    masks[0, 0, 15, 16] = True  # top right of four cells
    objective, outputs, batch = _case(masks, [[2]])
    cost = np.asarray(jax.jit(objective.match_scores)(outputs, batch, KEYS)["proposal"])
    assert (cost[0, :, 0] < -900).tolist() == [False, True, False, False]


def test_matched_queries_see_the_first_pixels_of_blocks_of_their_object():
    masks = np.zeros((1, 2, 32, 32), bool)
    masks[0, 0, 8, 16] = True  # the first pixel of the block in row 1, column 2
    masks[0, 0, 9, 25] = True  # not the first of its block
    objective, _, batch = _case(masks, [[0, 1]])
    seen = np.asarray(objective.guide(jnp.array([[2, -1]]), jnp.asarray(batch.masks)))
    want = np.zeros((4, 4), bool)
    want[1, 2] = True
    np.testing.assert_array_equal(seen[0, 2], want)
    assert seen[0, [0, 1, 3]].all()


def test_divisors_add_up_over_parts_of_a_batch():
    masks = np.zeros((2, 6, 32, 32), bool)
    is_target = np.array([[True] * 6, [True, False, False, False, False, False]])
    objective, _, batch = _case(masks, np.zeros((2, 6)), is_target)
    whole = objective.count(batch)
    # Of six objects four find a query; each of the other queries has a tenth of the weight.
    assert whole.objects == 7
    assert whole.class_weights == pytest.approx(4 + 1 + 0.1 * 3)
    assert whole.places == 8
    parts = [objective.count(jax.tree.map(lambda x, i=i: x[i : i + 1], batch)) for i in (0, 1)]
    np.testing.assert_allclose(whole, np.sum(parts, axis=0), rtol=1e-6)


def test_a_query_can_appear_with_two_classes_and_there_is_no_threshold():
    logits = np.full((1, 2, K + 1), -9, np.float32)
    logits[0, 1, :2] = 2, 1.5
    outputs = Outputs(
        (Prediction(jnp.asarray(logits), jnp.ones((1, 2, 4, 4))),),
        *(None, None, (), None, None),  # type: ignore[arg-type]
    )
    found = inference.select(outputs, num_detections=2)
    assert np.asarray(found.query_index).tolist() == [[1, 1]]
    assert np.asarray(found.labels).tolist() == [[0, 1]]
    every = inference.select(outputs)
    assert every.scores.shape == (1, 2 * K) and np.asarray(every.is_kept).all()
    assert np.asarray(inference.select(outputs, score_threshold=0.5).is_kept).sum() == 1


def test_norms_and_embeddings_do_not_decay_and_the_backbone_learns_slowly(network):
    _, params, _ = functional(network)
    rules = rules_of(network)
    assert rules.rate_factors == (("backbone", 0.1),)
    decoder = decay_mask(params, rules)["decoder"]
    assert decoder["positions"], "the map of positions decays"
    assert not decoder["auxiliary_features"] and not decoder["auxiliary_positions"]
    layer = decoder["layers"]["0"]["query_self"]
    assert layer["in_proj_bias"] and not layer["norm"]["bias"]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (dict(num_layers=0), "num_layers"),
        (dict(num_heads=3), "num_heads"),
        (dict(channels=8.0), ""),
    ],
)
def test_options_that_make_no_network_are_told_by_name(options, word):
    given = dict(channels=8, num_layers=1, num_queries=4, num_auxiliary=1, num_heads=2, ffn_width=8)
    assert family.faults(**given) == []
    (fault,) = family.faults(**(given | options))
    assert word in fault
