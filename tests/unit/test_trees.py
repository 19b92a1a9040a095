"""The pure view of a module: its random keys, and its form for inference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparseinst_jax.data.batch import DEVICE_AXIS
from sparseinst_jax.models.trees import functional
from sparseinst_jax.setup import builders
from tests import exporting


class Noisy(nnx.Module):
    """Dropout of ordinary Flax, and a number drawn for the whole batch."""

    def __init__(self):
        self.scale = nnx.Param(np.ones((3,), np.float32))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(3))
        self.layers = nnx.List([nnx.Dropout(0.2, rngs=nnx.Rngs(4))])
        self.rngs = nnx.Rngs(noise=7)

    def __call__(self, images, train=False, intermediates=None):
        x = self.scale[...] * images
        for layer in (self.dropout, *self.layers):
            x = layer(x, deterministic=not train)
        shared = jax.random.normal(self.rngs.noise(), ()) if train else 0.0
        return x, jnp.broadcast_to(shared, (len(images),))

    def twice(self, x):
        """Another method that an objective may call."""
        return 2 * self.scale[...] * x


@pytest.fixture
def noisy():
    return functional(Noisy())


IMAGES = np.ones((8, 50, 3), np.float32)


def test_keys_are_statistics_of_plain_numbers_and_counted(noisy):
    apply, params, statistics = noisy
    assert params.keys() == {"scale"}
    leaves = jax.tree.leaves(statistics)
    assert {type(leaf) for leaf in leaves} == {np.ndarray}
    assert {leaf.dtype.name for leaf in leaves} == {"uint32"}
    (outputs, _), after = jax.jit(lambda s: apply(params, s, IMAGES, train=True))(statistics)
    assert jax.tree.map(np.shape, after) == jax.tree.map(np.shape, statistics)
    for before, now in (
        (statistics["dropout"]["rngs"], after["dropout"]["rngs"]),
        (statistics["layers"]["0"]["rngs"], after["layers"]["0"]["rngs"]),
        (statistics["rngs"]["noise"], after["rngs"]["noise"]),
    ):
        np.testing.assert_array_equal(before["key"], now["key"])
        assert now["count"] == before["count"] + 1
    kept = np.asarray(outputs) > 0
    assert abs(kept.mean() - 0.5 * 0.8) < 0.05
    np.testing.assert_allclose(np.unique(outputs), [0, 1 / (0.5 * 0.8)])
    assert not (kept[0] == kept[1]).all()  # each image draws its own


def test_nothing_is_drawn_outside_training(noisy):
    apply, params, statistics = noisy
    (outputs, _), after = apply(params, statistics, IMAGES)
    np.testing.assert_array_equal(outputs, IMAGES)
    jax.tree.map(np.testing.assert_array_equal, statistics, after)


def test_a_run_that_continues_draws_what_it_would_have_drawn(noisy):
    apply, params, statistics = noisy
    step = jax.jit(lambda s: apply(params, s, IMAGES, train=True))
    first, after = step(statistics)
    second, _ = step(after)
    stored = jax.tree.map(np.array, after)  # as from a checkpoint, into a new process' model
    again, *_ = functional(Noisy())
    resumed, _ = jax.jit(lambda s: again(params, s, IMAGES, train=True))(stored)
    jax.tree.map(np.testing.assert_array_equal, second, resumed)
    assert not np.array_equal(first[0], second[0]) and not np.array_equal(first[1], second[1])


@pytest.mark.parametrize("num_devices", [2, 4])
def test_a_batch_draws_the_same_on_any_number_of_devices(noisy, num_devices):
    apply, params, statistics = noisy
    whole, after = apply(params, statistics, IMAGES, train=True)
    shared = jax.vmap(lambda x: apply(params, statistics, x, train=True), axis_name=DEVICE_AXIS)
    parts, after_each = shared(IMAGES.reshape(num_devices, -1, 50, 3))
    for one, several in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(one, several.reshape(one.shape))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[0]), after, after_each)


def test_another_method_of_the_module_can_be_called(noisy):
    apply, params, statistics = noisy
    doubled, _ = apply(params, statistics, IMAGES, method="twice")
    np.testing.assert_array_equal(doubled, 2 * IMAGES)


def test_a_call_with_arrays_is_compiled_once_and_equal_to_the_traced_one():
    calls = []

    class Counting(nnx.Module):
        def __init__(self):
            self.scale = nnx.Param(np.ones((3,), np.float32))

        def __call__(self, images, train=False, intermediates=None):
            calls.append(train)
            if intermediates is not None:
                intermediates |= {"second": images, "first": 2 * images}
            return self.scale[...] * images + train

    apply, params, statistics = functional(Counting())
    for _ in range(2):
        plain, _ = apply(params, statistics, IMAGES)
        trained, _ = apply(params, statistics, IMAGES, train=True)
    assert calls == [False, True]
    traced, _ = jax.jit(lambda p: apply(p, statistics, IMAGES, train=True))(params)
    np.testing.assert_array_equal(trained, traced)
    np.testing.assert_array_equal(trained, plain + 1)
    named = {}
    apply(params, statistics, IMAGES, intermediates=named)
    assert list(named) == ["second", "first"]  # in the order of the network
    np.testing.assert_array_equal(named["first"], 2 * IMAGES)


# Compiling these takes the time; what is above compares bits.
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("config", "left"),
    [("giam_r50vd_dcn", 8), ("giam_cspdarknet53", 0), ("giam_pvt_b2_linear", 1)],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_made_for_inference_a_network_finds_the_same_with_fewer_numbers(config, left, dtype, rng):
    model = exporting.narrow(config).model
    model.dtype = dtype
    network, params, statistics = functional(builders.build_model(model, 3, 0))

    def vary(x):
        return np.float32(x * rng.uniform(0.5, 1.5, x.shape) + 0.1) if x.ndim else x

    statistics = jax.tree.map(vary, statistics)
    images = rng.standard_normal((1, 64, 64, 3), np.float32)

    def tensors(network, params, statistics):
        """All that is named on the way but what is 0 at the start, and the masks."""
        named = {}
        outputs, _ = network(params, statistics, images, intermediates=named)
        named = {name: x for name, x in named.items() if not name.startswith("offset")}
        return named | {"masks": outputs.mask_logits}

    expected = jax.jit(tensors, static_argnums=0)(network, params, statistics)
    folded, make = network.for_inference()
    made = jax.jit(make)(params, statistics)
    # The norms after deformable convolutions, and the counter of stochastic depth.
    assert len(jax.tree.leaves(made[1])) == left
    assert made[0]["decoder"]["mask_branch"]["projection"]["kernel"].dtype == dtype
    found = jax.jit(tensors, static_argnums=0)(folded, *made)
    tolerance = 1e-5 if dtype == "float32" else 0.05
    for name, theirs in expected.items():
        error = np.abs(np.float32(found[name]) - np.float32(theirs)).max()
        assert error <= tolerance * np.abs(theirs).max(), name
