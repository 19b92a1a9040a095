"""A frozen part of the backbone stays as it is; the rest trains as if it were given."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparseinst_jax.models.backbones.resnet import STAGES, ResNet
from sparseinst_jax.models.trees import functional
from sparseinst_jax.training.optimizer import ParameterRules, make_optimizer

pytestmark = pytest.mark.usefixtures("quick_compilation")


def network(frozen_stages: int, norm: str = "batch_norm"):
    model = ResNet(
        stage_depths=(1, 1, 1, 1),
        width=4,
        norm=norm,
        frozen_stages=frozen_stages,
        rng=np.random.default_rng(0),
    )
    images = np.random.default_rng(1).normal(size=(2, 32, 32, 3)).astype(np.float32)
    apply, params, statistics = functional(model)
    return model, apply, params, jax.tree.map(jnp.asarray, statistics), images


def loss_of(apply, statistics, images):
    def loss(params):
        named = {}
        features, moved = apply(params, statistics, images, train=True, intermediates=named)
        return sum(jnp.square(f).sum() for f in features), (moved, named)

    return loss


def test_frozen_stages_keep_parameters_and_statistics_and_use_them_and_the_others_move():
    model, apply, params, statistics, images = network(4)
    frozen = STAGES[:4]
    assert model.frozen_names == frozen
    paths = tuple(f"backbone/{name}" for name in frozen)
    optimizer = make_optimizer({"backbone": params}, 1e-3, 0.5, 0.0, ParameterRules(paths))
    state, trained = optimizer.init({"backbone": params}), params
    gradient = jax.grad(loss_of(apply, statistics, images), has_aux=True)

    @jax.jit
    def step(trained, state):
        gradients, of_loss = gradient(trained)
        updates, state = optimizer.update({"backbone": gradients}, state, {"backbone": trained})
        return optax.apply_updates({"backbone": trained}, updates)["backbone"], state, of_loss

    for _ in range(2):
        trained, state, (moved, named) = step(trained, state)
    for name in STAGES:
        before, after = jax.tree.leaves(params[name]), jax.tree.leaves(trained[name])
        pairs = list(zip(before, after, strict=True))
        if name in frozen:
            assert all(np.array_equal(old, new) for old, new in pairs)
        else:
            assert all(not np.array_equal(old, new) for old, new in pairs if old.ndim == 4)
        is_same = jax.tree.leaves(jax.tree.map(np.array_equal, statistics[name], moved[name]))
        assert is_same == [name in frozen] * len(is_same)
    # The stem's means of 0 and variances of 1, and not the batch's.
    np.testing.assert_allclose(named["stem"], model.stem(images, False), rtol=1e-5, atol=1e-6)


def test_no_gradient_is_computed_below_the_border():
    # The gradients of the first convolution, one for its kernel: 7 wide. All stages hold 3-wide
    # ones, whose gradients are two convolutions each beside the forward one.
    counts = []
    for frozen_stages in (0, 1, 2, 5):
        _, apply, params, statistics, images = network(frozen_stages, "group_norm")
        loss = loss_of(apply, statistics, images)
        # Compiled: the traced program holds the forms of every platform.
        text = jax.jit(jax.grad(loss, has_aux=True)).lower(params).compile().as_text()
        counts.append(text.count(" convolution("))
    # Forward: the stem's and one in each of four blocks. Backward: kernel of the stem, kernel and
    # input of each block; the input of the first block that trains too, for the 1x1 before it.
    assert counts == [5 + 1 + 8, 5 + 8, 5 + 6, 5]


def test_weight_decay_leaves_what_is_frozen():
    params = {"backbone": {"stem": {"kernel": jnp.ones(1)}, "stem2": {"kernel": jnp.ones(1)}}}
    optimizer = make_optimizer(params, 0.5, 0.1, 0.0, ParameterRules(("backbone/stem",)))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    assert updates["backbone"]["stem"]["kernel"] == 0
    np.testing.assert_allclose(updates["backbone"]["stem2"]["kernel"], -0.05, rtol=1e-6)


def test_more_stages_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"from 0 to 5, .* stem, res2, .* got 6"):
        network(6)
