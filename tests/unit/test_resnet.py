"""ResNet: its variants, the pooled shortcuts, and where the deformable convolutions are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseinst_jax.models import ops
from sparseinst_jax.models.backbones.resnet import ResNet
from sparseinst_jax.models.trees import functional

pytestmark = pytest.mark.usefixtures("quick_compilation")


def resnet(**options):
    return ResNet(width=8, rng=np.random.default_rng(0), **options)


def paths(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from paths(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}"


def test_average_pooling_of_odd_sizes_leaves_what_is_outside_out_of_the_mean():
    x = jnp.asarray([[1.0, 2.0, 10.0], [3.0, 6.0, 20.0], [5.0, 8.0, 7.0]])[None, :, :, None]
    pooled = ops.average_pool_2x2_stride_2(x)[0, :, :, 0]
    np.testing.assert_allclose(pooled, [[3.0, 15.0], [6.5, 7.0]])
    np.testing.assert_allclose(ops.average_pool_2x2_stride_2(x[:, :2])[0, :, :, 0], [[3.0, 15.0]])
    gradient = jax.grad(lambda x: ops.average_pool_2x2_stride_2(x).sum())(x)[0, :, :, 0]
    np.testing.assert_allclose(gradient, [[0.25, 0.25, 0.5], [0.25, 0.25, 0.5], [0.5, 0.5, 1.0]])


def shortcut_of(block, x):
    """Run a block whose residual path is silenced: what is left is relu of the shortcut."""
    block.conv3.kernel[...] = jnp.zeros_like(block.conv3.kernel[...])
    return np.asarray(block(x, False, {}))


@pytest.mark.parametrize("height, width", [(4, 6), (5, 7), (1, 3)])
def test_a_shrinking_shortcut_averages_in_variant_d_and_skips_pixels_in_b(height, width, rng):
    x = rng.random((1, height, width, 32), np.float32)
    tops, lefts = range(0, height, 2), range(0, width, 2)
    means = [[x[0, i : i + 2, j : j + 2].mean((0, 1)) for j in lefts] for i in tops]
    for variant, seen in (("d", np.array(means)), ("b", x[0, ::2, ::2])):
        block = resnet(stage_depths=(1, 1, 1, 1), variant=variant).res3[0]
        expected = np.maximum(seen @ np.asarray(block.shortcut.kernel[...])[0, 0], 0)
        np.testing.assert_allclose(
            shortcut_of(block, jnp.asarray(x))[0], expected, rtol=1e-4, atol=1e-5
        )


def test_the_shortcut_of_res2_is_not_pooled_in_variant_d(rng):
    x = jnp.asarray(rng.random((1, 3, 5, 8), np.float32))
    block = resnet(stage_depths=(1, 1, 1, 1), variant="d").res2[0]
    expected = np.maximum(np.asarray(x[0]) @ np.asarray(block.shortcut.kernel[...])[0, 0], 0)
    np.testing.assert_allclose(shortcut_of(block, x)[0], expected, rtol=1e-4, atol=1e-5)


def test_variant_d_has_three_convolutions_in_the_stem():
    model = resnet(stage_depths=(1, 1, 1, 1), variant="d")
    _, params, _ = functional(model)
    shapes = {name: value["kernel"].shape for name, value in params["stem"].items()}
    assert shapes == {"conv1": (3, 3, 3, 4), "conv2": (3, 3, 4, 4), "conv3": (3, 3, 4, 8)}


@pytest.mark.parametrize("modulated, channels", [(False, 18), (True, 27)])
def test_every_block_of_the_named_stages_is_deformable(modulated, channels):
    model = resnet(
        stage_depths=(1, 2, 3, 1), deformable_stages=("res3", "res4"), modulated=modulated
    )
    _, params, _ = functional(model)
    found = {path: path for path in paths(params) if "offset" in path}
    blocks = ("res3/0", "res3/1", "res4/0", "res4/1", "res4/2")
    assert set(found) == {f"{b}/conv2_offset/{leaf}" for b in blocks for leaf in ("kernel", "bias")}
    offset = params["res4"]["0"]["conv2_offset"]
    assert offset["kernel"].shape == (3, 3, 32, channels)
    assert offset["bias"].shape == (channels,)
    assert not np.asarray(offset["kernel"]).any() and not np.asarray(offset["bias"]).any()


def test_fresh_deformable_blocks_start_as_ordinary_ones(rng):
    """Zero offsets move nothing, so ImageNet weights mean the same in a deformable network."""
    images = jnp.asarray(rng.standard_normal((1, 70, 66, 3)), jnp.float32)

    def features(stages):
        model = resnet(stage_depths=(1, 2, 1, 1), variant="d", deformable_stages=stages)
        apply, params, statistics = functional(model)
        return jax.jit(lambda images: apply(params, statistics, images)[0])(images)

    for before, after in zip(features(()), features(("res3", "res5")), strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4 * float(before.max()))


def test_resnet_101_has_23_blocks_in_res4():
    model = resnet(stage_depths=(3, 4, 23, 3))
    assert [len(getattr(model, f"res{n}")) for n in (2, 3, 4, 5)] == [3, 4, 23, 3]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"variant": "c"}, "variant must be b or d, got 'c'"),
        (
            {"deformable_stages": ("res4", "res6")},
            "deformable_stages must be a tuple of",
        ),
        ({"deformable_stages": "res4"}, "deformable_stages must be a tuple of"),
        ({"modulated": True}, "modulated is True, but no convolution is deformable"),
    ],
)
def test_options_that_no_resnet_has_are_named(options, message):
    usual = dict(
        stage_depths=(3, 4, 6, 3),
        width=64,
        norm="batch_norm",
        variant="b",
        deformable_stages=(),
        modulated=False,
    )
    (fault,) = ResNet.faults(**(usual | options))
    assert fault.startswith(message)
    assert ResNet.faults(**usual) == []
