"""What programs hold when they are lowered for a GPU or a TPU, here on a CPU."""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparseinst_jax.checkpoints.state import TrainState
from sparseinst_jax.data.batch import DEVICE_AXIS, Batch
from sparseinst_jax.models import layers
from sparseinst_jax.models.backbones.pvt import DepthwiseConv
from sparseinst_jax.models.trees import functional
from sparseinst_jax.setup import builders
from sparseinst_jax.setup.config import load_config
from sparseinst_jax.setup.run import make_step
from sparseinst_jax.weights import zoo
from tests.shallow import shallow

NETWORKS = {row.network: row.config for row in reversed(zoo.ROWS)}  # one configuration of each
CONVOLUTION = "stablehlo.convolution"
NUM_CLASSES = 80
(ANY,) = jax.export.symbolic_shape("b")


def _shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)), tree)


class Network(NamedTuple):
    """A network without numbers; how many convolutions it has, and how many are not 1x1."""

    config: Any
    model: Any
    apply: Any
    params: Any
    statistics: Any
    convolutions: int
    wide: int


@functools.cache
def _network(config_name: str, is_shallow: bool = False) -> Network:
    config = load_config(config_name)
    config = shallow(config) if is_shallow else config
    model = builders.build_model(config.model, NUM_CLASSES, None)
    kinds = layers.Conv, DepthwiseConv
    modules = [module for _, module in nnx.iter_graph(model) if isinstance(module, kinds)]
    wide = [module for module in modules if module.kernel[...].shape[0] > 1]
    apply, params, statistics = functional(model)
    shapes = _shapes(params), _shapes(statistics)
    return Network(config, model, apply, *shapes, len(modules), len(wide))


@functools.cache
def _traced(config_name: str, batch: Any = 1) -> Any:
    """A network at inference, before any platform is chosen: tracing takes most of the time."""
    network = _network(config_name)
    images = jax.ShapeDtypeStruct((batch, 640, 864, 3), jnp.float32)

    def forward(params, statistics, images):
        return network.apply(params, statistics, images)[0]

    return jax.jit(forward).trace(network.params, network.statistics, images)


def _lowered(config_name: str, platform: str, batch: Any = 1) -> str:
    return _traced(config_name, batch).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_for_another_platform_holds_each_convolution_once(network):
    name = NETWORKS[network]
    assert _lowered(name, "tpu").count(CONVOLUTION) == _network(name).convolutions


@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_for_a_gpu_holds_each_convolution_once_and_1x1_as_products(network):
    name = NETWORKS[network]
    # Both branches of SparseInst's decoder convolve the coordinates, which all images share, on
    # their own.
    shared = 2 if _network(name).config.model.family == "sparseinst" else 0
    assert _lowered(name, "cuda").count(CONVOLUTION) == _network(name).wide + shared


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_a_network_for_any_number_of_images_holds_each_convolution_once(platform):
    assert (
        _lowered("giam_r50", platform, ANY).count(CONVOLUTION) == _network("giam_r50").convolutions
    )


def _batch(size: int = 2, height: int = 256, width: int = 256, targets: int = 8) -> Batch:
    return Batch(
        jax.ShapeDtypeStruct((size, height, width, 3), jnp.uint8),
        jax.ShapeDtypeStruct((size, 2), jnp.int32),
        jax.ShapeDtypeStruct((size, targets), jnp.int32),
        jax.ShapeDtypeStruct((size, targets, height // 4, width // 4), jnp.uint8),
        jax.ShapeDtypeStruct((size, targets), jnp.bool_),
        None,
    )


@functools.cache
def _training_halves(config_name: str, platform: str) -> list[str]:
    """Lower both halves of a training step on one device."""
    network = _network(config_name, is_shallow=True)
    params, statistics = network.params, network.statistics
    step, _ = make_step(network.config, network.model, network.apply, params)
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
        mapped = jax.vmap(function, in_axes=None, axis_name=DEVICE_AXIS, axis_size=1)
        traced = jax.jit(mapped).trace(*arguments)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    return [lower(*first), lower(*second)]


def test_training_for_another_platform_holds_each_convolution_and_its_two_gradients():
    first, second = _training_halves("giam_r50", "tpu")
    number = _network("giam_r50", is_shallow=True).convolutions
    assert first.count(CONVOLUTION) == number
    assert second.count(CONVOLUTION) == 2 * number - 1  # images have no gradient


def test_training_for_a_gpu_holds_each_convolution_and_its_two_gradients():
    first, second = _training_halves("giam_r50_bf16", "cuda")
    number = _network("giam_r50_bf16", is_shallow=True).wide + 2
    assert first.count(CONVOLUTION) == number
    assert second.count(CONVOLUTION) == 2 * number - 3  # neither have coordinates


def _operands_and_result(text: str) -> list[list[tuple[int, str]]]:
    """Number of channels (the last axis) and type of what each convolution reads and makes."""
    lines = [line for line in text.splitlines() if CONVOLUTION in line]
    tensor = re.compile(r"tensor<(?:\d+x)*(\d+)x([a-z]+\d+)>")
    return [
        [(int(size), kind) for size, kind in tensor.findall(line.rpartition(" : ")[2])]
        for line in lines
    ]


@pytest.mark.parametrize("half", ["inference", "first half", "second half"])
def test_every_convolution_for_a_gpu_is_bfloat16_and_has_multiples_of_8_channels(half):
    if half == "inference":
        text = _lowered("giam_r50_bf16", "cuda")
    else:
        text = _training_halves("giam_r50_bf16", "cuda")[half == "second half"]
    convolutions = _operands_and_result(text)
    assert len(convolutions) >= _network("giam_r50_bf16", half != "inference").wide
    for tensors in convolutions:
        assert len(tensors) == 3
        assert all(channels % 8 == 0 and kind == "bf16" for channels, kind in tensors), tensors
