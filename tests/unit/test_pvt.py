"""PVTv2 against the same network written with NumPy; what stochastic depth draws, and when."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import erf

from sparseinst_jax.checkpoints.state import TrainState
from sparseinst_jax.data.batch import DEVICE_AXIS, Batch
from sparseinst_jax.models.backbones.pvt import HEADS, Attention, PyramidVisionTransformer
from sparseinst_jax.models.trees import functional
from sparseinst_jax.training.optimizer import ParameterRules, decay_mask
from sparseinst_jax.training.step import TrainStep

pytestmark = pytest.mark.usefixtures("quick_compilation")

DEPTHS, DIMS = (1, 2, 1, 1), (4, 4, 5, 8)
REDUCTIONS = (8, 4, 2, 1)


def build(**options):
    options = dict(stage_depths=DEPTHS, embed_dims=DIMS, rng=np.random.default_rng(0)) | options
    return PyramidVisionTransformer(**options)


def network(**options):
    """The pure function, weights of which each matters, and statistics on the device."""
    apply, params, statistics = functional(build(**options))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: x + rng.uniform(0.1, 0.4, x.shape).astype(np.float32), params)
    return apply, params, jax.tree.map(jnp.asarray, statistics)


def images(count=2, height=64, width=96):
    return np.random.default_rng(2).normal(size=(count, height, width, 3)).astype(np.float32)


class Oracle:
    """The network in float64, from the weights' names."""

    def __init__(self, params, linear):
        self.params, self.linear = params, linear

    def at(self, path):
        node = self.params
        for key in path.split("/"):
            node = node[key]
        return {key: np.asarray(value, np.float64) for key, value in node.items()}

    def norm(self, x, path, epsilon):
        weight = self.at(path)
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
        return x * weight["scale"] + weight["bias"]

    def linear_map(self, x, path):
        return x @ self.at(path)["kernel"] + self.at(path)["bias"]

    def conv(self, x, path, stride, border, equation="bhwcij,ijco->bhwo"):
        kernel = self.at(path)["kernel"]
        if equation.startswith("depth"):
            equation, kernel = "bhwcij,ijc->bhwc", kernel[:, :, 0]
        x = np.pad(x, ((0, 0), (border, border), (border, border), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], (1, 2))
        return np.einsum(equation, windows[:, ::stride, ::stride], kernel) + self.at(path)["bias"]

    def attention(self, x, path, stage):
        batch, _, _, channels = x.shape
        source = x
        if self.linear:
            source = self.conv(pool_7x7(x), f"{path}/sr", 1, 0)
            source = gelu(self.norm(source, f"{path}/norm", 1e-5))
        elif REDUCTIONS[stage] > 1:
            source = self.conv(x, f"{path}/sr", REDUCTIONS[stage], 0)
            source = self.norm(source, f"{path}/norm", 1e-5)
        queries = self.linear_map(x.reshape(batch, -1, channels), f"{path}/q")
        both = self.linear_map(source.reshape(batch, -1, channels), f"{path}/kv")
        mixed = np.zeros_like(queries)
        for part in np.split(np.arange(channels), HEADS[stage]):  # the channels of a head
            keys, values = both[..., part], both[..., channels + part]
            logits = queries[..., part] @ keys.transpose(0, 2, 1) / np.sqrt(len(part))
            weight = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            mixed[..., part] = weight @ values
        return self.linear_map(mixed, f"{path}/proj").reshape(x.shape)

    def mlp(self, x, path):
        x = self.linear_map(x, f"{path}/fc1")
        x = np.maximum(x, 0) if self.linear else x
        x = self.conv(x, f"{path}/dwconv/dwconv", 1, 1, "depthwise")
        return self.linear_map(gelu(x), f"{path}/fc2")

    def maps(self, x):
        maps = []
        for stage, depth in enumerate(DEPTHS):
            stride, border = (4, 3) if stage == 0 else (2, 1)
            x = self.conv(x, f"patch_embed{stage + 1}/proj", stride, border)
            x = self.norm(x, f"patch_embed{stage + 1}/norm", 1e-5)
            for block in range(depth):
                path = f"block{stage + 1}/{block}"
                x = x + self.attention(self.norm(x, f"{path}/norm1", 1e-6), f"{path}/attn", stage)
                x = x + self.mlp(self.norm(x, f"{path}/norm2", 1e-6), f"{path}/mlp")
            x = self.norm(x, f"norm{stage + 1}", 1e-6)
            maps.append(x)
        return maps


def gelu(x):
    return x * (1 + erf(x / np.sqrt(2))) / 2


def pool_7x7(x):
    """The mean of each of 7x7 windows, which share or repeat pixels where 7 does not divide."""
    size, y = np.array(x.shape[1:3]), np.zeros((len(x), 7, 7, x.shape[3]))
    for i in range(7):
        for j in range(7):
            (top, left), (bottom, right) = size * (i, j) // 7, -(-size * (i + 1, j + 1) // 7)
            y[:, i, j] = x[:, top:bottom, left:right].mean((1, 2))
    return y


@pytest.mark.parametrize("linear", [False, True])
def test_every_stage_equals_the_same_network_in_numpy(linear):
    # Of the linear variant, the maps of 4 x 6 and 2 x 3 are smaller than the 7 x 7 windows.
    apply, params, statistics = network(linear=linear)

    @jax.jit
    def run(params, x):
        named = {}
        return apply(params, statistics, x, intermediates=named)[0], named

    maps, named = run(params, images())
    wanted = Oracle(params, linear).maps(images().astype(np.float64))
    for stage, want in enumerate(wanted, start=1):
        np.testing.assert_allclose(named[f"p{stage}"], want, atol=2e-5 * np.abs(want).max())
    assert [m.shape for m in maps] == [(2, 8, 12, 4), (2, 4, 6, 5), (2, 2, 3, 8)]
    assert all(np.array_equal(maps[i], named[f"p{i + 2}"]) for i in range(3))
    assert named["patch_embed1.0"].shape == (2, 16 * 24, 4)
    assert named["block2_1"].shape == (2, 8 * 12, 4)


def test_the_softmax_of_bfloat16_attention_is_float32():
    attention = Attention(4, 1, 1, False, dtype=jnp.bfloat16, rng=np.random.default_rng(0))
    for layer, kernel in (("q", [np.eye(4)]), ("kv", [np.eye(4)] * 2), ("proj", [np.eye(4)])):
        getattr(attention, layer).kernel.set_value(np.hstack(kernel).astype(np.float32))
    # Logits of the first pixel: 514 / 2 with itself and 512 / 2 with the second. In bfloat16, which
    # has eight digits, both would be 256.
    x = jnp.asarray([[[[16, 16, 1, 1], [16, 16, 0, 0]]]], jnp.bfloat16)
    y = attention(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(y[0, 0, 0]), [16, 16, 0.731, 0.731], atol=0.002)


def test_bfloat16_reaches_the_maps():
    apply, params, statistics = network(dtype=jnp.bfloat16)
    maps, _ = jax.eval_shape(apply, params, statistics, images())
    assert [m.dtype.name for m in maps] == ["bfloat16"] * 3


def test_fresh_weights_have_the_deviations_of_the_release():
    _, params, _ = functional(build(embed_dims=(64, 64, 40, 40)))
    block = params["block1"]["0"]
    for layer, name in (("attn", "kv"), ("mlp", "fc1"), ("mlp", "fc2")):
        np.testing.assert_allclose(block[layer][name]["kernel"].std(), 0.02, rtol=0.05)
        assert not block[layer][name]["bias"].any()
    depthwise = block["mlp"]["dwconv"]["dwconv"]["kernel"]  # [3, 3, 1, 512]
    np.testing.assert_allclose(depthwise.std(), np.sqrt(2 / 9), rtol=0.05)
    reduction = block["attn"]["sr"]["kernel"]  # [8, 8, 64, 64]
    np.testing.assert_allclose(reduction.std(), np.sqrt(2 / (64 * 64)), rtol=0.05)
    embed = params["patch_embed1"]["proj"]["kernel"]  # [7, 7, 3, 64]
    np.testing.assert_allclose(embed.std(), np.sqrt(2 / (49 * 64)), rtol=0.05)


def test_branches_are_skipped_with_their_probability_and_have_the_expectation_one():
    weights = np.asarray(build(drop_path=0.5).branch_weights(20_000))  # [B, blocks, 2]
    assert weights.shape == (20_000, 5, 2)
    for block, rate in enumerate((0, 0.125, 0.25, 0.375, 0.5)):
        values = weights[:, block]
        expected = [0, 1 / (1 - rate)] if rate else [1]
        np.testing.assert_allclose(np.unique(values), expected, rtol=1e-6)
        np.testing.assert_allclose((values == 0).mean(0), [rate, rate], atol=0.02)
        np.testing.assert_allclose(values.mean(0), [1, 1], atol=0.04)
    # The two branches of a block, the blocks and the images are drawn independently.
    is_kept = weights[:, 1:].reshape(-1, 8) > 0
    np.testing.assert_allclose(np.corrcoef(is_kept.T), np.eye(8), atol=0.03)
    assert abs(np.corrcoef(is_kept[:-1, 0], is_kept[1:, 0])[0, 1]) < 0.03


def test_an_image_that_skips_a_branch_keeps_its_values_and_another_gets_the_branch_scaled():
    block, x = build().block1[0], images(2, 8, 8)[..., :1].repeat(4, -1) * np.arange(1, 5)
    x, weight = jnp.asarray(x), jnp.asarray([[0.0, 0.0], [2.0, 3.0]])

    @jax.jit
    def scaled(x):
        both = x + 2 * block.attn(block.norm1(x))
        return both + 3 * block.mlp(block.norm2(both))

    y, expected = jax.jit(lambda x: block(x, weight))(x), scaled(x)
    np.testing.assert_array_equal(y[0], x[0])
    np.testing.assert_allclose(y[1], expected[1], rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def stochastic():
    apply, params, statistics = network(drop_path=0.9)
    return jax.jit(apply, static_argnames="train"), params, statistics


def test_the_counter_goes_up_by_one_a_training_call_and_decides_what_is_drawn(stochastic):
    apply, params, statistics = stochastic
    first, after = apply(params, statistics, images(), train=True)
    second, last = apply(params, after, images(), train=True)
    start = statistics["drop_path_step"]
    assert start.dtype == np.uint32 and start > 0  # drawn from the seed
    assert (after["drop_path_step"] - start, last["drop_path_step"] - start) == (1, 2)
    assert last["drop_path_step"].dtype == np.uint32
    again, _ = apply(params, statistics, images(), train=True)
    np.testing.assert_array_equal(first[2], again[2])
    assert not np.allclose(first[2], second[2])


def test_nothing_is_drawn_outside_of_training(stochastic):
    apply, params, statistics = stochastic
    maps, after = apply(params, statistics, images())
    assert after["drop_path_step"] == statistics["drop_path_step"]
    later = statistics | {"drop_path_step": jnp.uint32(7)}
    np.testing.assert_array_equal(maps[2], apply(params, later, images())[0][2])
    off, params, statistics = network(drop_path=0.0)
    trained, after = jax.jit(lambda x: off(params, statistics, x, train=True))(images())
    np.testing.assert_allclose(trained[2], maps[2], rtol=1e-5, atol=1e-6)
    assert after["drop_path_step"] == statistics["drop_path_step"]


def test_two_devices_draw_for_their_halves_of_a_batch_what_one_draws_for_all(stochastic):
    apply, params, statistics = stochastic
    batch = np.repeat(images(1), 4, axis=0)
    whole, _ = apply(params, statistics, batch, train=True)
    shared = jax.vmap(lambda x: apply(params, statistics, x, train=True), axis_name=DEVICE_AXIS)
    halves, after = shared(batch.reshape(2, 2, *batch.shape[1:]))
    np.testing.assert_allclose(
        np.concatenate(halves[2]), np.asarray(whole[2]), rtol=1e-4, atol=1e-4
    )
    # The images are equal: only what is drawn tells them apart.
    assert len({np.asarray(image).tobytes() for image in whole[2]}) > 1
    assert len(set(np.asarray(after["drop_path_step"]).tolist())) == 1


class _OnlyDraws(PyramidVisionTransformer):
    """What is drawn, times one parameter: it compiles at once."""

    def __call__(self, images, train=False, intermediates=None):
        return self.branch_weights(len(images))[:, -1, 0] * self.norm4.scale[0]


class _SumObjective:
    """The least that can be trained: the sum of the outputs times a number of each image's."""

    minimised, loss_takes_params = (), False

    class Counts(NamedTuple):
        targets: np.ndarray

    def __init__(self, apply):
        self.apply = apply

    def forward(self, params, statistics, batch):
        return self.apply(params, statistics, batch.images, train=True)

    def count(self, batch):
        return self.Counts(np.float32(len(batch.images)))

    def match_scores(self, outputs, batch, keys):
        return {"one": jnp.zeros((len(outputs), 1, 1))}

    def loss(self, params, statistics, outputs, batch, matches, counts, keys):
        total = (outputs * batch.valid_size[:, 0]).sum() / counts.targets
        return total, {"sum": total}


@pytest.mark.parametrize("num_devices", [1, 2])
def test_a_step_carries_the_counter_through_micro_batches_devices_and_the_average(num_devices):
    options = dict(stage_depths=DEPTHS, embed_dims=DIMS, drop_path=0.5)
    model = _OnlyDraws(**options, rng=np.random.default_rng(0))
    apply, params, statistics = functional(model)
    optimizer, devices = optax.sgd(1.0), jax.local_devices()[:num_devices]
    step = TrainStep(
        _SumObjective(apply), optimizer, micro_batches=2, ema_decay=0.9, devices=devices
    )
    count = 16
    batch = Batch(
        np.zeros((count, 32, 32, 3), np.uint8),
        2 ** np.arange(count, dtype=np.int32)[:, None].repeat(2, 1),
        np.zeros((count, 1), np.int32),
        np.zeros((count, 1, 8, 8), np.uint8),
        np.ones((count, 1), bool),
        np.arange(count),
    )
    average = params, statistics
    state = TrainState(np.int32(0), params, statistics, optimizer.init(params), average)
    state, metrics = step(step.place(state), batch)
    after = step.fetch(state)
    counters = after.statistics["drop_path_step"], after.average[1]["drop_path_step"]
    assert [counter - statistics["drop_path_step"] for counter in counters] == [2, 2]
    assert {counter.dtype.name for counter in counters} == {"uint32"}
    # The draws of the first 8 images by the first number of the counter, of the others by the next.
    draws = [np.asarray(model.branch_weights(8))[:, -1, 0] for _ in range(2)]
    expected = np.concatenate(draws) @ 2.0 ** np.arange(count) / count
    np.testing.assert_allclose(metrics["loss/total"], expected, rtol=1e-6)
    np.testing.assert_allclose(after.params["norm4"]["scale"][0], 1 - expected, rtol=1e-6)


def test_gradients_are_finite_and_reach_every_stage_that_trains():
    options = dict(stage_depths=(1, 1, 1, 1), linear=True, frozen_stages=1)
    apply, params, statistics = network(**options)
    frozen = build(**options).frozen_names
    assert frozen == ("patch_embed1", "block1", "norm1")

    def loss(params):
        maps, _ = apply(params, statistics, images(2, 32, 64), train=True)
        return sum(jnp.square(m).sum() for m in maps)

    gradients = jax.jit(jax.grad(loss))(params)
    for name, branch in gradients.items():
        leaves = jax.tree.leaves(branch)
        assert all(np.isfinite(leaf).all() for leaf in leaves), name
        assert any(np.any(leaf) for leaf in leaves) == (name not in frozen), name


def test_nothing_is_skipped_in_frozen_stages():
    apply, params, statistics = network(drop_path=0.9, frozen_stages=3)

    @jax.jit
    def run(step):
        named = {}
        apply(
            params, statistics | {"drop_path_step": step}, images(), train=True, intermediates=named
        )
        return named

    named = [run(jnp.uint32(step)) for step in range(6)]
    assert all(np.array_equal(named[0]["p3"], other["p3"]) for other in named)
    assert any(not np.array_equal(named[0]["p4"], other["p4"]) for other in named)


def test_more_frozen_stages_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"from 0 to 4, .* p1, p2, .* got 5"):
        build(frozen_stages=5)


def test_neither_norms_nor_patch_embeddings_decay_and_all_else_does():
    backbone = build()
    _, params, _ = functional(backbone)
    rules = ParameterRules(undecayed=("norm", *backbone.undecayed))
    mask = decay_mask({"backbone": params}, rules)["backbone"]
    assert mask["patch_embed1"] == {
        "proj": {"kernel": False, "bias": False},
        "norm": {"scale": False, "bias": False},
    }
    assert not any(jax.tree.leaves(mask["norm3"]))
    block = mask["block1"]["0"]
    for norm in (block["norm1"], block["norm2"], block["attn"]["norm"]):
        assert norm == {"scale": False, "bias": False}
    rest = {key: value for key, value in block["attn"].items() if key != "norm"}
    assert all(jax.tree.leaves((rest, block["mlp"])))
