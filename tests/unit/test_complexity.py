"""Parameters and multiply-accumulates against sums done by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparseinst_jax.configs import tiny
from sparseinst_jax.models import layers, ops
from sparseinst_jax.models.complexity import Parameters, count_macs, count_parameters, trace_macs
from sparseinst_jax.setup import builders

RNG = np.random.default_rng(0)


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize(
    ("conv", "macs"),
    [
        (layers.Conv(4, 8, 3, rng=RNG), 10 * 12 * 8 * 3 * 3 * 4),
        (layers.Conv(4, 8, 3, stride=2, rng=RNG), 5 * 6 * 8 * 3 * 3 * 4),
        (layers.Conv(4, 8, 1, stride=2, rng=RNG), 5 * 6 * 8 * 4),
        (layers.Conv(4, 8, 3, groups=2, rng=RNG), 10 * 12 * 8 * 3 * 3 * 2),
    ],
    ids=["3x3", "stride 2", "1x1", "two groups"],
)
def test_a_convolution_costs_its_taps_and_input_channels_for_each_value(conv, macs):
    assert trace_macs(conv, _floats(1, 10, 12, 4)) == {"": macs}


def test_a_depthwise_convolution_costs_nine_for_each_value():
    macs = trace_macs(jax.checkpoint(ops.depthwise_3x3), _floats(2, 5, 7, 6), _floats(3, 3, 1, 6))
    assert macs == {"": 2 * 5 * 7 * 6 * 9}


def test_a_product_of_matrices_costs_its_inner_length_for_each_value():
    product = lambda a, b: jnp.einsum("bnd,bhwd->bnhw", a, b)  # noqa: E731
    assert trace_macs(product, _floats(2, 3, 5), _floats(2, 4, 6, 5)) == {"": 2 * 3 * 4 * 6 * 5}


def test_a_loop_counts_every_turn_and_a_branch_its_most_expensive():
    square = lambda x: x @ x  # noqa: E731

    def function(x):
        x = jax.lax.scan(lambda carry, _: (square(carry), None), x, length=7)[0]
        return jax.lax.cond(x[0, 0] > 0, lambda x: square(square(x)), square, x)

    assert trace_macs(function, _floats(3, 3)) == {"": (7 + 2) * 27}


def test_a_loop_of_unknown_length_is_refused():
    loop = lambda x: jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ x, x)  # noqa: E731
    with pytest.raises(ValueError, match="loop of unknown length"):
        trace_macs(loop, _floats(3, 3))


def test_norms_activations_and_bilinear_resizing_count_nothing():
    model = nnx.Sequential(layers.BatchNorm(4), jax.nn.relu)
    assert trace_macs(model, _floats(1, 4, 4, 4)) == {"": 0}
    assert trace_macs(lambda x: ops.resize_bilinear(x, (8, 8)), _floats(1, 4, 4, 4)) == {"": 0}


def test_every_module_has_the_sum_of_what_is_inside():
    model = builders.build_model(tiny.get_config().model, 3, 0)
    macs = count_macs(model, 64, 96)  # the encoder's map is 8 x 12
    masks, kernel_dim, channels = 10, 8, 16
    assert macs["decoder/inst_branch/iam_conv"] == 96 * 9 * 4 * masks * channels // 4
    assert macs["decoder/mask_branch/projection"] == 96 * channels * kernel_dim
    assert macs["decoder/mask_branch"] == 96 * (9 * 18 * channels + channels * kernel_dim)
    assert macs["encoder/fpn_laterals/2"] == 96 * model.backbone.out_channels[0] * channels
    assert macs[""] == macs["backbone"] + macs["encoder"] + macs["decoder"]
    # What is in no module inside: the product that is the masks.
    inside = macs["decoder/inst_branch"] + macs["decoder/mask_branch"]
    assert macs["decoder"] - inside == 96 * masks * kernel_dim
    stages = [macs[f"backbone/{name}"] for name in ("stem", "res2", "res3", "res4", "res5")]
    assert macs["backbone"] == sum(stages)
    assert list(macs)[1] == "backbone", "in the order of the computation"


def test_counting_leaves_the_classes_as_they_were():
    before = layers.Conv.__call__, layers.BatchNorm.__call__
    model = builders.build_model(tiny.get_config().model, 3, 0)
    count_macs(model, 64, 64)
    with pytest.raises(ValueError, match="multiples of 32"):
        count_macs(model, 64, 65)
    assert (layers.Conv.__call__, layers.BatchNorm.__call__) == before


@pytest.mark.parametrize(
    ("norm", "parameters"),
    [
        ("frozen_batch_norm", Parameters(3 * 3 * 4 * 8, 2 * 8, 2 * 8)),
        ("batch_norm", Parameters(3 * 3 * 4 * 8 + 2 * 8, 0, 2 * 8)),
        ("group_norm", Parameters(3 * 3 * 4 * 8 + 2 * 8, 0, 0)),
    ],
)
def test_parameters_are_told_from_frozen_values_and_statistics(norm, parameters):
    conv = layers.Conv(4, 8, 3, bias_init=None, norm=layers.NORMS[norm](8), rng=RNG)
    assert count_parameters(conv) == parameters
