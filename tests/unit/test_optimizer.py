from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from sparseinst_jax.models.backbones.pvt import PyramidVisionTransformer
from sparseinst_jax.models.trees import functional
from sparseinst_jax.setup.builders import build_model
from sparseinst_jax.setup.config import load_config
from sparseinst_jax.training.optimizer import (
    ParameterRules,
    decay_mask,
    make_optimizer,
    make_schedule,
    rules_of,
)


def test_update_is_torch_adamw_computed_by_hand():
    # Two steps of torch.optim.AdamW(lr=0.1, weight_decay=0.05) written out in float64.
    gradients = [np.array([0.5, -2.0]), np.array([1.0, 0.25])]
    value = np.array([1.0, -3.0])
    first = second = np.zeros(2)
    for t, g in enumerate(gradients, start=1):
        value = value * (1 - 0.1 * 0.05)
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
        value = value - 0.1 * (first / (1 - 0.9**t)) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
    params = {"conv": {"kernel": jnp.array([1.0, -3.0])}}
    optimizer = make_optimizer(params, 0.1, 0.05)
    state = optimizer.init(params)
    for g in gradients:
        updates, state = optimizer.update({"conv": {"kernel": jnp.asarray(g)}}, state, params)
        params = optax.apply_updates(params, updates)
    # Optax computes 1 - 0.999^t in float32: 3e-5 of the first updates, which are 0.1 here.
    np.testing.assert_allclose(params["conv"]["kernel"], value, rtol=0, atol=5e-6)


def test_only_names_with_the_originals_words_are_exempt_from_decay():
    params = {
        "backbone": {
            "res2": {"0": {"conv1": {"kernel": 0.0, "norm": {"scale": 0.0, "bias": 0.0}}}},
            "patch_embed1": {"proj": {"kernel": 0.0}},
            "cls_token": 0.0,
        },
        "decoder": {"fc": {"kernel": 0.0, "bias": 0.0}, "softmax_bias": 0.0},
    }
    rules = ParameterRules(undecayed=("norm", *PyramidVisionTransformer.undecayed))
    assert decay_mask(params, rules) == {
        "backbone": {
            "res2": {"0": {"conv1": {"kernel": True, "norm": {"scale": False, "bias": False}}}},
            "patch_embed1": {"proj": {"kernel": False}},
            "cls_token": False,
        },
        "decoder": {"fc": {"kernel": True, "bias": True}, "softmax_bias": True},
    }


def test_weight_decay_alone_shrinks_only_what_decays():
    params = {"fc": {"bias": jnp.ones(2)}, "norm": {"bias": jnp.ones(2)}}
    optimizer = make_optimizer(params, 0.5, 0.1, rules=ParameterRules(undecayed=("norm",)))
    updates, _ = optimizer.update(
        jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
    )
    np.testing.assert_allclose(updates["fc"]["bias"], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(updates["norm"]["bias"], 0.0)


def test_a_rate_factor_scales_the_whole_update_of_what_lies_below_its_path():
    """As PyTorch's AdamW with a learning rate for each group: the weight decay is scaled too."""
    params = {part: {"kernel": jnp.ones(1)} for part in ("backbone", "backbone2", "decoder")}
    gradients = jax.tree.map(lambda p: 3.0 * p, params)
    rules = ParameterRules(rate_factors=(("backbone", 0.1),))
    optimizer = make_optimizer(params, 0.5, 0.2, 0.0, rules)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    whole = -0.5 * (1 + 0.2)  # in the first step the moments' ratio is 1
    for part, factor in (("backbone", 0.1), ("backbone2", 1.0), ("decoder", 1.0)):
        np.testing.assert_allclose(updates[part]["kernel"], factor * whole, rtol=2e-5)


def test_a_model_says_what_is_frozen_what_does_not_decay_and_what_learns_slower():
    backbone = SimpleNamespace(frozen_names=("stem", "res2"))
    model = SimpleNamespace(
        backbone=backbone, undecayed=("norm",), learning_rate_factors=(("backbone", 0.1),)
    )
    wanted = ParameterRules(("backbone/stem", "backbone/res2"), ("norm",), (("backbone", 0.1),))
    assert rules_of(model) == wanted
    assert rules_of(SimpleNamespace(backbone=None)) == ParameterRules()


def test_first_update_uses_the_learning_rate_of_step_zero():
    schedule = make_schedule(1.0, 10, 0.001, (), 0.1)
    params = {"w": jnp.ones(1)}
    optimizer = make_optimizer(params, schedule, 0.0)
    updates, state = optimizer.update({"w": jnp.ones(1)}, optimizer.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.001, rtol=1e-5)
    updates, _ = optimizer.update({"w": jnp.ones(1)}, state, params)
    np.testing.assert_allclose(updates["w"], -(0.001 * 0.9 + 0.1), rtol=1e-4)


def test_schedule_without_warmup_and_milestones_is_constant():
    schedule = make_schedule(0.25, 0, 0.001, (), 0.1)
    assert [float(schedule(step)) for step in (0, 7, 10**6)] == [0.25] * 3


def test_milestones_that_do_not_increase_are_refused():
    with pytest.raises(ValueError, match=r"increasing steps, got \(20, 10\)"):
        make_schedule(0.1, 0, 0.1, (20, 10), 0.1)


def test_a_long_gradient_is_scaled_to_the_clip_norm_before_it_reaches_the_moments():
    params = {"w": jnp.zeros(2)}
    first, then = jnp.asarray([30.0, 40.0]), jnp.asarray([0.3, 0.4])  # norms 50 and 0.5

    def second_update(clip_norm):
        optimizer = make_optimizer(params, 1.0, 0.0, clip_norm)
        _, state = optimizer.update({"w": first}, optimizer.init(params), params)
        updates, _ = optimizer.update({"w": then}, state, params)
        return np.asarray(updates["w"])

    def by_hand(first):
        mean = 0.9 * 0.1 * first + 0.1 * np.asarray(then)
        square = 0.999 * 0.001 * first**2 + 0.001 * np.asarray(then) ** 2
        return -(mean / (1 - 0.9**2)) / np.sqrt(square / (1 - 0.999**2))

    np.testing.assert_allclose(second_update(0.0), by_hand(np.asarray(first)), rtol=1e-3)
    np.testing.assert_allclose(second_update(5.0), by_hand(np.asarray(first) / 10), rtol=1e-3)


@pytest.mark.parametrize("name", ["tiny", "fastinst_lite0"])
def test_backbone_and_class_layers_have_rates_of_their_own(name):
    config = load_config(name)
    model = build_model(config.model, 3, None)
    _, params, _ = functional(model)
    rules = rules_of(model, 0.5, 20.0)
    flat = flatten_dict(params, sep="/")
    for layer in model.class_layers:
        assert ("decoder" in layer) and (layer, 20.0) in rules.rate_factors
        outputs = 3 + (name == "fastinst_lite0")  # one for no object
        assert flat[f"{layer}/bias"].shape == (outputs,)
    assert ("backbone", 0.5) in rules.rate_factors
    with pytest.raises(ValueError, match=r"class_rate=20.0 needs a model that says"):
        rules_of(object(), class_rate=20.0)
