"""The table of published models agrees with the configurations, the originals and the document."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from sparseinst_jax.cli import zoo as command
from sparseinst_jax.models import layers, ops
from sparseinst_jax.models.complexity import count_macs, count_parameters, trace_macs
from sparseinst_jax.setup import builders
from sparseinst_jax.setup.config import load_config
from sparseinst_jax.weights import zoo

ROOT = Path(__file__).parents[2]
CONFIGS = {row.config: row for row in zoo.ROWS}
NETWORKS = {row.network: row.config for row in zoo.ROWS}  # one configuration of each
NUM_CLASSES = 80


@functools.cache
def _build(name: str):
    config = load_config(ROOT / "configs" / f"{name}.py")
    model = builders.build_model(config.model, NUM_CLASSES, seed=None)
    graphdef, state = nnx.split(model)  # kept as shapes alone
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    return nnx.merge(graphdef, shapes)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_holds_as_many_parameters_as_its_row_says(name):
    network = zoo.NETWORKS[CONFIGS[name].network]
    assert count_parameters(_build(name)) == network[:3]


@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_costs_what_its_row_says(network):
    macs = count_macs(_build(NETWORKS[network]), 640, 864)[""]
    assert round(macs / 1e9, 2) == zoo.NETWORKS[network].gmacs


class Original(NamedTuple):
    """What the original code's own counter says; norm values as its buffers, GMACs at 640 x 640."""

    parameters: int
    norm_values: int
    backbone: float
    encoder: float
    decoder: float
    total_640x864: float


ORIGINALS = {
    "iam_r50": Original(31_584_373, 106_240, 33.36, 7.75, 32.20, 98.98),
    "iam_r50vd": Original(31_603_477, 106_496, 35.32, 7.75, 32.20, 101.62),
    "giam_r50": Original(32_794_785, 106_240, 33.36, 7.75, 32.82, 99.76),
    "giam_softmax_r50": Original(32_794_786, 106_240, 33.36, 7.75, 32.82, 99.76),
    "giam_r50_dcn": Original(33_292_611, 106_240, 33.86, 7.75, 32.82, 100.43),
    "giam_r50vd": Original(32_813_889, 106_496, 35.32, 7.75, 32.82, 102.40),
    "giam_r50vd_dcn": Original(33_311_715, 106_496, 35.82, 7.75, 32.82, 103.07),
    "giam_r101": Original(51_734_689, 210_688, 63.67, 7.75, 32.82, 140.67),
    "giam_r101_dcn": Original(52_937_845, 210_688, 65.29, 7.75, 32.82, 142.87),
    "giam_cspdarknet53": Original(35_498_306, 35_395, 41.04, 7.02, 32.82, 109.13),
    "giam_darknet53": Original(49_466_049, 35_764, 58.18, 7.02, 32.82, 132.27),
    "giam_pvt_b1": Original(22_164_129, 0, 21.76, 6.68, 32.82, 85.05),
    "giam_pvt_b2_linear": Original(30_708_641, 0, 30.35, 6.68, 32.82, 94.16),
}
FASTINST_PARAMETERS = {
    "fastinst_r50_x1": 29_658_035,
    "fastinst_r50_x3": 34_176_597,
    "fastinst_r101_x3": 53_116_501,
    "fastinst_r50vd_dcn_x1": 30_174_965,
    "fastinst_r50vd_dcn_x3": 34_693_527,
}
# PyTorch's batch norm also holds a counter of batches; one for each norm.
BATCH_COUNTERS = {"giam_cspdarknet53": 67, "giam_darknet53": 52}
PADDLE_PARAMETERS = {
    "paddle_iam_r50": 31_637_493,
    "paddle_iam_r50_aug": 31_637_493,
    "paddle_giam_r50": 32_847_905,
    "paddle_giam_r50_aug": 32_847_905,
    "paddle_giam_r50vd_aug": 32_867_137,
    "paddle_giam_r50vd_ssld_aug": 32_867_137,
    "paddle_giam_r50vd_ssld_dcn_aug": 33_738_400,
    "mmdet_iam_r50": 31_637_493,
}


@pytest.mark.parametrize("network", ORIGINALS)
def test_parameters_and_frozen_norm_values_equal_the_originals(network):
    original, ours = ORIGINALS[network], zoo.NETWORKS[network]
    assert ours.parameters == original.parameters
    norm_values = ours.frozen_affine + ours.statistics + BATCH_COUNTERS.get(network, 0)
    assert norm_values == original.norm_values


@pytest.mark.parametrize("name", PADDLE_PARAMETERS)
def test_with_the_norms_affine_values_they_equal_paddledetections_and_mmdetections(name):
    network = zoo.NETWORKS[CONFIGS[name].network]
    assert network.parameters + network.frozen_affine == PADDLE_PARAMETERS[name]


def test_the_originals_table_and_ours_hold_the_same_networks():
    known = ORIGINALS.keys() | FASTINST_PARAMETERS.keys() | {"giam_r50vd_dcnv2"}
    assert known == zoo.NETWORKS.keys()
    counted = {name: zoo.NETWORKS[name].parameters for name in FASTINST_PARAMETERS}
    assert counted == FASTINST_PARAMETERS


@pytest.mark.parametrize("network", ORIGINALS)
def test_the_cost_is_the_originals_less_what_its_counter_adds(network, monkeypatch):
    original, model = ORIGINALS[network], _build(NETWORKS[network])
    macs, norms = _macs_and_norm_costs(model, monkeypatch)
    pooling = macs["encoder/ppm"] - macs["encoder/ppm/stages"] - macs["encoder/ppm/bottleneck"]
    three_levels, four_pools = 3 * 80 * 80 * 256, 4 * 20 * 20 * 64
    encoder = macs["encoder"] - pooling + 4 * (three_levels + four_pools)
    decoder = macs["decoder"] + 4 * 100 * 160 * 160
    backbone = macs["backbone"] + norms - _pool_excess(network)
    ours = [round(part / 1e9, 2) for part in (backbone, encoder, decoder)]
    assert ours == [original.backbone, original.encoder, original.decoder]
    total = zoo.NETWORKS[network].gmacs / original.total_640x864
    assert 0.997 < total <= 1


def _macs_and_norm_costs(model, monkeypatch) -> tuple[dict[str, int], int]:
    """Norms cost two for each value of a trained batch norm, five of a layer norm."""
    costs = []
    for kind, cost in ((layers.BatchNorm, 2), (layers.LayerNorm, 5)):

        def call(self, x, *args, original=kind.__call__, cost=cost, **kwargs):
            costs.append(cost * x.size)
            return original(self, x, *args, **kwargs)

        monkeypatch.setattr(kind, "__call__", call)
    return count_macs(model, 640, 640), sum(costs)


def _pool_excess(network: str) -> int:
    """What the linear attention's pooling to 7 x 7 costs as matrix products above one an input."""
    if network != "giam_pvt_b2_linear":
        return 0
    maps = [(3, 160, 64), (4, 80, 128), (6, 40, 320), (3, 20, 512)]  # blocks, side, channels

    def excess(side: int, channels: int) -> int:
        x = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
        return trace_macs(lambda x: ops.adaptive_average_pool(x, 7), x)[""] - x.size

    return sum(blocks * excess(side, channels) for blocks, side, channels in maps)


def test_the_documents_table_is_what_the_command_prints():
    text = (ROOT / "docs/zoo.md").read_text()
    (table,) = re.findall(r"<!-- table -->\n(.*)\n<!-- end of table -->", text, re.S)
    assert table.strip() == command.markdown(zoo.ROWS).strip(), (
        "copy what `sparseinst zoo --markdown` prints between the two comments of docs/zoo.md"
    )
