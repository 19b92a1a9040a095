"""CSPDarkNet and DarkNet against the same networks written with NumPy loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseinst_jax.models.backbones.cspdarknet import STAGES, CSPDarkNet
from sparseinst_jax.models.trees import functional
from sparseinst_jax.training.optimizer import ParameterRules, decay_mask

pytestmark = pytest.mark.usefixtures("quick_compilation")

DEPTHS = (1, 2, 1, 1, 1)


def network(cross_stage=True, **options):
    options = dict(stage_depths=DEPTHS, width=2) | options
    model = CSPDarkNet(cross_stage=cross_stage, **options, rng=np.random.default_rng(0))
    apply, params, statistics = functional(model)
    return apply, params, jax.tree.map(jnp.asarray, statistics)


def shaken(tree):
    """Weights that are neither 0 nor 1 anywhere, so that each of them matters."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: np.asarray(x) + rng.uniform(0.2, 0.6, x.shape).astype(np.float32), tree
    )


def images(height=32, width=64):
    return np.random.default_rng(2).normal(size=(2, height, width, 3)).astype(np.float32)


class Oracle:
    """The network in float64 from the weights' names, one window at a time."""

    def __init__(self, params, statistics, train):
        self.params, self.statistics, self.train = params, statistics, train

    def conv(self, x, path, stride=1):
        params, statistics = self.params, self.statistics
        for key in path.split("/"):
            params, statistics = params[key], statistics[key]
        kernel = np.asarray(params["conv"]["kernel"], np.float64)
        size = kernel.shape[0]
        x = np.pad(x, ((0, 0), (size // 2,) * 2, (size // 2,) * 2, (0, 0)))
        rows = range(0, x.shape[1] - size + 1, stride)
        columns = range(0, x.shape[2] - size + 1, stride)
        y = np.stack(
            [
                np.stack(
                    [np.tensordot(x[:, i : i + size, j : j + size], kernel, 3) for j in columns],
                    axis=1,
                )
                for i in rows
            ],
            axis=1,
        )
        mean, var = statistics["bn"]["mean"], statistics["bn"]["var"]
        if self.train:
            mean, var = y.mean((0, 1, 2)), y.var((0, 1, 2))
        y = (y - mean) / np.sqrt(var + 1e-5) * params["bn"]["scale"] + params["bn"]["bias"]
        return np.where(y > 0, y, 0.01 * y)

    def blocks(self, x, stage, depth):
        for block in range(depth):
            path = f"stages/{stage}/blocks/{block}"
            x = x + self.conv(self.conv(x, f"{path}/conv1"), f"{path}/conv2")
        return x

    def maps(self, x, cross_stage):
        x, maps = self.conv(x.astype(np.float64), "stem/conv1"), []
        for stage, depth in enumerate(DEPTHS):
            x = self.conv(x, f"stages/{stage}/conv_down", 2)
            if cross_stage:
                x = self.conv(x, f"stages/{stage}/conv_exp")
                half = x.shape[-1] // 2
                processed = self.blocks(x[..., half:], stage, depth)
                processed = self.conv(processed, f"stages/{stage}/conv_transition_b")
                x = np.concatenate([x[..., :half], processed], axis=-1)
                x = self.conv(x, f"stages/{stage}/conv_transition")
            else:
                x = self.blocks(x, stage, depth)
            maps.append(x)
        return maps


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("cross_stage", [False, True])
def test_every_stage_equals_the_same_network_in_numpy(cross_stage, train):
    apply, params, statistics = network(cross_stage)
    params, statistics = shaken(params), shaken(statistics)

    @jax.jit
    def run(params, statistics, x):
        named = {}
        maps, moved = apply(params, statistics, x, train=train, intermediates=named)
        return maps, moved, named

    maps, moved, named = run(params, statistics, images())
    oracle = Oracle(params, statistics, train)
    wanted = oracle.maps(images(), cross_stage)
    assert [m.shape for m in maps] == [(2, 4, 8, 16), (2, 2, 4, 32), (2, 1, 2, 64)]
    for stage, want in enumerate(wanted):
        scale = np.abs(want).max()
        np.testing.assert_allclose(named[f"csp{stage}"], want, rtol=0, atol=2e-5 * scale)
    assert all(np.array_equal(maps[i], named[f"csp{i + 2}"]) for i in range(3))
    assert named["stem"].shape == (2, 32, 64, 2)
    is_same = jax.tree.leaves(jax.tree.map(np.array_equal, statistics, moved))
    assert is_same == [not train] * len(is_same)


def test_fresh_blocks_are_identities_and_kernels_have_the_deviation_of_the_fan_out():
    _, params, _ = network(width=16)
    stage = params["stages"]["4"]
    assert not stage["blocks"]["0"]["conv2"]["bn"]["scale"].any()
    assert (stage["blocks"]["0"]["conv1"]["bn"]["scale"] == 1).all()
    kernel = stage["conv_down"]["conv"]["kernel"]  # [3, 3, 256, 512]
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (9 * 512)), rtol=0.01)


def test_frozen_stages_get_no_gradient_and_keep_their_statistics():
    apply, params, statistics = network(frozen_stages=3)
    params, x = shaken(params), images()
    model = CSPDarkNet(width=2, frozen_stages=3, rng=np.random.default_rng(0))
    assert model.frozen_names == ("stem", "stages/0", "stages/1")

    def loss(params):
        maps, moved = apply(params, statistics, x, train=True)
        return sum(jnp.square(m).sum() for m in maps), moved

    gradients, moved = jax.jit(jax.grad(loss, has_aux=True))(params)
    for path in STAGES:
        branches = gradients, moved, statistics
        for key in path.split("/"):
            branches = tuple(branch[key] for branch in branches)
        is_zero = [not np.any(g) for g in jax.tree.leaves(branches[0])]
        is_same = jax.tree.leaves(jax.tree.map(np.array_equal, *branches[1:]))
        frozen = path in STAGES[:3]
        assert is_same == [frozen] * len(is_same), path
        assert all(is_zero) if frozen else not any(is_zero), path
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(branches[0]))


def test_more_frozen_stages_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"from 0 to 6, .* stem, stages/0, .* got 7"):
        network(frozen_stages=7)


@pytest.mark.parametrize("norm", ["frozen_batch_norm", "group_norm"])
def test_other_norms_take_the_same_place(norm):
    apply, params, statistics = network(norm=norm)
    trained = "bn" in params["stages"]["0"]["conv_down"]
    assert trained == (norm == "group_norm")
    maps, moved = jax.jit(lambda p, x: apply(p, statistics, x, train=True))(params, images())
    assert all(np.isfinite(m).all() and np.std(m) > 0 for m in maps)
    assert jax.tree.all(jax.tree.map(np.array_equal, moved, statistics))


def test_its_batch_norms_decay_because_their_name_lacks_the_word_norm():
    _, params, _ = network()
    mask = decay_mask({"backbone": params}, ParameterRules(undecayed=("norm",)))
    assert mask["backbone"]["stages"]["0"]["conv_down"] == {
        "bn": {"scale": True, "bias": True},
        "conv": {"kernel": True},
    }
    assert all(jax.tree.leaves(mask))
