"""What programs hold when they are lowered for a GPU or a TPU, here on a CPU."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparseinst_jax.checkpoints.state import TrainState
from sparseinst_jax.data.batch import Batch
from sparseinst_jax.models import layers
from sparseinst_jax.models.backbones.pvt import DepthwiseConv
from sparseinst_jax.setup import builders
from sparseinst_jax.setup.config import load_config
from sparseinst_jax.setup.run import make_step
from sparseinst_jax.training.optimizer import ParameterRules
from sparseinst_jax.weights import zoo

ROOT = Path(__file__).parents[2]
NETWORKS = {row.network: row.config for row in reversed(zoo.ROWS)}  # one configuration of each
CONVOLUTION = "stablehlo.convolution"
NUM_CLASSES = 80


def _shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)), tree)


@functools.cache
def _network(config_name: str):
    """The pure function of a network, shapes for its weights, and its number of convolutions."""
    config = load_config(ROOT / f"configs/{config_name}.py")
    model = builders.build_model(config.model, NUM_CLASSES, None)
    kinds = layers.Conv, DepthwiseConv
    number = sum(isinstance(module, kinds) for _, module in nnx.iter_graph(model))
    apply, params, statistics = layers.functional(model)
    return config, apply, _shapes(params), _shapes(statistics), number


def _export(config_name: str, platform: str, batch) -> str:
    _, apply, params, statistics, _ = _network(config_name)
    images = jax.ShapeDtypeStruct((batch, 640, 864, 3), jnp.float32)

    def forward(params, statistics, images):
        return apply(params, statistics, images)[0]

    exported = jax.export.export(jax.jit(forward), platforms=[platform])
    return exported(params, statistics, images).mlir_module()


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_for_another_platform_holds_each_convolution_once(network, platform):
    name = NETWORKS[network]
    assert _export(name, platform, 1).count(CONVOLUTION) == _network(name)[-1]


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_a_network_for_any_number_of_images_holds_each_convolution_once(platform):
    (batch,) = jax.export.symbolic_shape("b")
    text = _export("giam_r50", platform, batch)
    assert text.count(CONVOLUTION) == _network("giam_r50")[-1]


def _batch(size: int = 2, height: int = 256, width: int = 256, targets: int = 8) -> Batch:
    return Batch(
        jax.ShapeDtypeStruct((size, height, width, 3), jnp.uint8),
        jax.ShapeDtypeStruct((size, 2), jnp.int32),
        jax.ShapeDtypeStruct((size, targets), jnp.int32),
        jax.ShapeDtypeStruct((size, targets, height // 4, width // 4), jnp.uint8),
        jax.ShapeDtypeStruct((size, targets), jnp.bool_),
        None,
    )


def _training_halves(config_name: str, platform: str) -> list[str]:
    """Lower both halves of a training step on one device."""
    config, apply, params, statistics, _ = _network(config_name)
    step, _ = make_step(config, apply, params, ParameterRules())
    opt_state = jax.eval_shape(step.optimizer.init, params)
    scalar = functools.partial(jax.ShapeDtypeStruct, ())
    state = TrainState(scalar(jnp.int32), params, statistics, opt_state)
    batch = _batch()
    places = jax.ShapeDtypeStruct((2,), jnp.int32)
    counts = _shapes(step.objective.count(jax.tree.map(lambda x: np.ones(x.shape), batch)))
    counts = scalar(jnp.float32), counts

    first = step._first_half, params, statistics, state.step, places, batch
    outputs, pull_back, statistics, scores = jax.eval_shape(*first)
    matches = {name: jax.ShapeDtypeStruct(batch.labels.shape, jnp.int32) for name in scores}
    rest = outputs, pull_back, statistics, batch, matches, counts, places
    second_half = functools.partial(step._second_half, is_last=True)
    second = second_half, state, scalar(jnp.int32), None, *rest

    def lower(function, *arguments):
        # One device: with `vmap`, its axis is there without a device.
        mapped = jax.vmap(function, in_axes=None, axis_name=layers.DEVICE_AXIS, axis_size=1)
        traced = jax.jit(mapped).trace(*arguments)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    return [lower(*first), lower(*second)]


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_training_for_another_platform_holds_each_convolution_and_its_two_gradients(platform):
    first, second = _training_halves("giam_r50", platform)
    number = _network("giam_r50")[-1]
    assert first.count(CONVOLUTION) == number
    # Images have no gradient.
    assert second.count(CONVOLUTION) == 2 * number - 1
