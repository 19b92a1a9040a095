"""Layers against plain NumPy, initialisation against its definition, and the plain-dict view."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparseinst_jax.models import layers, ops
from sparseinst_jax.models.backbones.resnet import ResNet
from sparseinst_jax.models.sparseinst.model import InstanceBranch, SparseInst
from sparseinst_jax.models.trees import functional

pytestmark = pytest.mark.usefixtures("quick_compilation")


def plain_conv(x, kernel, stride, groups):
    """Convolve NHWC by explicit loops over the taps."""
    size = kernel.shape[0]
    border = (size - 1) // 2
    padded = np.pad(x, ((0, 0), (border, border), (border, border), (0, 0)))
    height, width = -(-x.shape[1] // stride), -(-x.shape[2] // stride)
    step_in, step_out = x.shape[3] // groups, kernel.shape[3] // groups
    y = np.zeros((len(x), height, width, kernel.shape[3]))
    for g in range(groups):
        outs = slice(g * step_out, (g + 1) * step_out)
        for i in range(size):
            for j in range(size):
                window = padded[
                    :, i : i + stride * height : stride, j : j + stride * width : stride
                ]
                window = window[:, :height, :width, g * step_in : (g + 1) * step_in]
                y[..., outs] += window @ kernel[i, j, :, outs]
    return y


@pytest.mark.parametrize(
    "size, stride, groups", [(1, 1, 1), (1, 2, 1), (3, 1, 1), (3, 2, 1), (3, 1, 2), (7, 2, 1)]
)
def test_convolution_pads_symmetrically_and_groups_see_their_own_channels(
    size, stride, groups, rng
):
    conv = layers.Conv(
        4, 6, size, stride=stride, groups=groups, bias_init=layers.torch_uniform, rng=rng
    )
    x = rng.standard_normal((2, 6, 8, 4), np.float32)
    expected = plain_conv(x, np.asarray(conv.kernel[...]), stride, groups) + np.asarray(
        conv.bias[...]
    )
    np.testing.assert_allclose(conv(jnp.asarray(x)), expected, atol=1e-5)


@pytest.mark.parametrize("size, stride", [(1, 1), (1, 2), (3, 1)])
def test_a_frozen_norm_in_the_kernel_gives_the_results_and_gradients_of_one_after_it(
    size, stride, rng
):
    norm = layers.FrozenBatchNorm(6)
    for statistic in (norm.scale, norm.bias, norm.mean, norm.var):
        statistic[...] = jnp.asarray(rng.random(6, np.float32) + 0.5)
    conv = layers.Conv(4, 6, size, stride=stride, bias_init=None, norm=norm, rng=rng)
    graphdef, params, statistics = nnx.split(conv, nnx.Param, ...)
    x = jnp.asarray(rng.standard_normal((2, 5, 8, 4), np.float32))
    cotangent = jnp.asarray(rng.standard_normal((2, -(-5 // stride), 8 // stride, 6), np.float32))

    def results(train):
        def run(params, x):
            return nnx.merge(graphdef, params, statistics)(x, train)

        y, pull_back = jax.vjp(run, params, x)
        return y, *jax.tree.leaves(pull_back(cotangent))

    for inside, after in zip(results(True), results(False), strict=True):
        np.testing.assert_allclose(inside, after, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_1x1_convolution_keeps_its_image_once(rng):
    x, kernel = jnp.ones((2, 4, 6, 3)), jnp.ones((1, 1, 3, 5))
    _, pull_back = jax.vjp(ops.convolve, x, kernel)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(pull_back))
    assert kept == x.nbytes + kernel.nbytes


def test_initial_weights_follow_their_distributions(rng):
    shape, fan_in, fan_out = (3, 3, 64, 256), 576, 2304
    xavier = layers.xavier(rng, shape, fan_in, fan_out)
    assert np.abs(xavier).max() <= np.sqrt(3 / fan_in)
    assert xavier.std() == pytest.approx(np.sqrt(1 / fan_in), rel=0.01)
    assert layers.msra(rng, shape, fan_in, fan_out).std() == pytest.approx(
        np.sqrt(2 / fan_out), rel=0.01
    )
    uniform = layers.torch_uniform(rng, shape, fan_in, fan_out)
    assert uniform.std() == pytest.approx(np.sqrt(1 / (3 * fan_in)), rel=0.01)


def small_branch(
    channels=2, num_masks=3, num_groups=2, num_classes=1, kernel_dim=1, normalizer="sigmoid"
):
    return InstanceBranch(
        4,
        channels=channels,
        num_convs=1,
        num_masks=num_masks,
        num_groups=num_groups,
        num_classes=num_classes,
        kernel_dim=kernel_dim,
        normalizer=normalizer,
        dtype=jnp.float32,
        rng=np.random.default_rng(0),
    )


def test_decoder_starts_with_the_originals_priors():
    branch = small_branch(channels=8, num_masks=5, num_classes=3, kernel_dim=4)
    for bias in (branch.iam_conv.bias, branch.cls_score.bias):
        np.testing.assert_allclose(jax.nn.sigmoid(bias[...]), 0.01, rtol=1e-5)
    assert not np.asarray(branch.mask_kernel.bias[...]).any()


def test_frozen_norm_is_the_affine_map_of_its_four_vectors(rng):
    norm = layers.FrozenBatchNorm(3)
    vectors = {name: rng.random(3, np.float32) + 0.5 for name in ("scale", "bias", "mean", "var")}
    for name, value in vectors.items():
        getattr(norm, name)[...] = value
    x = rng.standard_normal((2, 4, 4, 3), np.float32)
    expected = (x - vectors["mean"]) / np.sqrt(vectors["var"] + 1e-5) * vectors["scale"] + vectors[
        "bias"
    ]
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-5)


def test_batch_norm_uses_the_batch_in_training_and_the_running_statistics_after(rng):
    norm = layers.BatchNorm(3)
    x = 5 + 2 * rng.standard_normal((4, 6, 6, 3), np.float32)
    y = np.asarray(norm(jnp.asarray(x), train=True))
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(y.std((0, 1, 2)), 1, atol=1e-3)
    np.testing.assert_allclose(norm.mean[...], 0.1 * x.mean((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * x.var((0, 1, 2)), rtol=1e-3)
    after = norm(jnp.asarray(x))
    expected = (x - norm.mean[...]) / np.sqrt(norm.var[...] + 1e-5)
    np.testing.assert_allclose(after, expected, rtol=1e-4, atol=1e-4)


def test_group_norm_normalises_each_image_by_itself(rng):
    norm = layers.GroupNorm(8, groups=2)
    x = rng.standard_normal((2, 4, 4, 8), np.float32) * np.array([1, 9]).reshape(2, 1, 1, 1)
    y = np.asarray(norm(jnp.asarray(x, jnp.float32))).reshape(2, 4, 4, 2, 4)
    np.testing.assert_allclose(y.mean((1, 2, 4)), 0, atol=1e-5)
    np.testing.assert_allclose(y.std((1, 2, 4)), 1, atol=1e-3)


def test_layer_norm_normalises_each_pixel_in_float32():
    # 257, the mean, is no number of bfloat16: its neighbours are 256 and 258.
    x = jnp.asarray([[256, 258], [0, 4]], jnp.bfloat16)
    norm = layers.LayerNorm(2, 1e-2)
    norm.scale.set_value(np.array([1, 2], np.float32))
    norm.bias.set_value(np.array([0, 1], np.float32))
    y = norm(x)
    assert y.dtype == jnp.bfloat16
    first, second = 1 / np.sqrt(1 + 1e-2), 2 / np.sqrt(4 + 1e-2)
    wanted = [[-first, 2 * first + 1], [-second, 2 * second + 1]]
    np.testing.assert_allclose(y.astype(jnp.float32), wanted, rtol=4e-3)


def test_groups_regroup_from_group_mask_to_mask_group_channel():
    branch = small_branch()
    # Map (g, n) lights up only pixel 3 g + n of six, so its feature is that pixel's.
    logits = np.full((1, 1, 6, 6), -1e4, np.float32)
    logits[0, 0, np.arange(6), np.arange(6)] = 1e4
    features = np.arange(12, dtype=np.float32).reshape(1, 1, 6, 2)
    pooled = np.asarray(branch.pool(branch.activate(jnp.asarray(logits)), jnp.asarray(features)))
    np.testing.assert_allclose(pooled[0], [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]], atol=1e-5)


def test_softmax_maps_do_not_depend_on_the_softmax_bias(rng):
    branch = small_branch(num_groups=1, normalizer="softmax")
    logits = jnp.asarray(rng.standard_normal((1, 4, 5, 3), np.float32))
    features = jnp.asarray(rng.standard_normal((1, 4, 5, 2), np.float32))
    pooled = branch.pool(branch.activate(logits), features)
    weight = jax.nn.softmax(logits.reshape(20, 3), axis=0)
    np.testing.assert_allclose(pooled[0], weight.T @ features.reshape(20, 2), atol=1e-5)
    branch.softmax_bias[...] = jnp.asarray([7.0])
    np.testing.assert_allclose(branch.pool(branch.activate(logits), features), pooled, atol=1e-5)


def tiny_model(**options):
    rng = np.random.default_rng(0)
    backbone = ResNet(
        stage_depths=(1, 1, 1, 1),
        width=4,
        norm=options.pop("norm", "frozen_batch_norm"),
        rng=rng,
        dtype=options.get("dtype", jnp.float32),
    )
    return SparseInst(
        backbone,
        num_classes=2,
        encoder_channels=8,
        decoder_channels=8,
        decoder_convs=1,
        num_masks=5,
        kernel_dim=4,
        rng=rng,
        **options,
    )


def test_the_functional_view_round_trips_and_returns_new_statistics(rng):
    apply, params, statistics = functional(tiny_model(norm="batch_norm"))
    assert set(params) == {"backbone", "encoder", "decoder"}
    assert statistics["backbone"]["res2"]["0"]["conv1"]["norm"].keys() == {"mean", "var"}
    assert params["backbone"]["res2"]["0"]["conv1"]["norm"].keys() == {"scale", "bias"}
    images = jnp.asarray(rng.standard_normal((1, 32, 64, 3), np.float32))
    run = jax.jit(apply, static_argnames="train")
    before, same = run(params, statistics, images)
    for old, new in zip(jax.tree.leaves(statistics), jax.tree.leaves(same), strict=True):
        np.testing.assert_array_equal(old, new)
    _, moved = run(params, statistics, images, train=True)
    assert not np.allclose(moved["backbone"]["stem"]["conv1"]["norm"]["var"], 1.0)
    doubled = jax.tree.map(lambda x: 2 * x, params)
    after, _ = run(doubled, statistics, images)
    assert not np.allclose(before.mask_logits, after.mask_logits)
    assert before.mask_logits.shape == (1, 5, 8, 16)


def test_bfloat16_computes_close_to_float32_and_returns_float32(rng):
    images = jnp.asarray(rng.standard_normal((1, 64, 64, 3), np.float32))
    results = []
    for dtype in (jnp.float32, jnp.bfloat16):
        apply, params, statistics = functional(tiny_model(dtype=dtype))
        outputs, _ = jax.jit(apply)(params, statistics, images)
        assert all(output.dtype == jnp.float32 for output in outputs)
        results.append(outputs)
    for wide, narrow in zip(*results, strict=True):
        assert np.abs(wide - narrow).max() <= 0.05 * max(float(np.abs(wide).max()), 1e-3)


def test_sizes_that_are_no_multiples_of_32_are_refused_with_the_padded_size():
    with pytest.raises(ValueError, match=r"got \(33, 64\).*\(64, 64\)"):
        tiny_model()(jnp.zeros((1, 33, 64, 3)))


def test_channels_that_groups_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"multiple of num_groups, got 8 and 3"):
        tiny_model(num_groups=3)


def test_pure_function_keeps_no_arrays_alive(rng):
    apply, params, _ = functional(Scaled(rng))
    initial = weakref.ref(params["conv"]["kernel"])
    ones = jax.tree.map(np.ones_like, params)
    del params
    gc.collect()
    assert initial() is None
    outputs, _ = apply(ones, {}, np.ones((1, 2, 2, 1), np.float32))
    np.testing.assert_array_equal(outputs, np.full((1, 2, 2, 1), 2.0))


class Scaled(nnx.Module):
    """One convolution with a bias."""

    def __init__(self, rng):
        self.conv = layers.Conv(1, 1, 1, rng=rng)

    def __call__(self, images, train=False, intermediates=None):
        return self.conv(images)
