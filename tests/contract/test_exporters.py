"""Every backbone and family can be exported, with operators that all runtimes have."""

from __future__ import annotations

import pytest

from sparseinst_jax.export.backbones import BACKBONE_WRITERS
from sparseinst_jax.export.writer import FAMILY_WRITERS
from sparseinst_jax.models.families import BACKBONES, FAMILIES
from tests import exporting

# Of onnx-tensorrt's table (docs/operators.md, TensorRT 10.0, operator sets up to 20), what our
# graphs need; with the types that it takes there. NonZero, DeformConv, If and Loop are not among
# it: the first is not there for all types, the others are what users fail with.
TENSORRT = {
    *("Add", "And", "ArgMax", "AveragePool", "Cast", "Clip", "Concat", "Conv", "Div", "Equal"),
    *("Erf", "Exp", "Expand", "Gather", "GatherND", "Greater", "GreaterOrEqual", "GridSample"),
    *("InstanceNormalization", "LayerNormalization", "LeakyRelu", "Less", "MatMul", "Max"),
    *("MaxPool", "Min", "Mod", "Mul", "Neg", "Or", "Range", "Reciprocal", "ReduceMax"),
    *("ReduceMean", "ReduceSum", "Relu", "Reshape", "Resize", "Shape", "Sigmoid", "Slice"),
    *("Softmax", "Split", "Sqrt", "Squeeze", "Sub", "TopK", "Transpose", "Unsqueeze", "Where"),
}


def test_every_backbone_and_family_has_a_writer():
    assert set(BACKBONES.values()) == BACKBONE_WRITERS.keys()
    assert {family.model for family in FAMILIES.values()} == FAMILY_WRITERS.keys()


@pytest.mark.parametrize("name", exporting.published())
def test_graphs_hold_only_operators_that_tensorrt_has(name):
    for size in (None, (96, 128)):
        graph = exporting.written(exporting.narrow(name, norm=None), size).graph
        assert {node.op_type for node in graph.node} <= TENSORRT
        assert not any(node.domain for node in graph.node)
        # uint8 may only come in, to be converted at once.
        readers = [node.op_type for node in graph.node if "images" in node.input]
        assert set(readers) <= {"Cast", "Shape"}
        resizes = [node for node in graph.node if node.op_type == "Resize"]
        for node in resizes:
            assert "antialias" not in {attribute.name for attribute in node.attribute}


def test_activation_maps_are_not_made_by_the_sigmoid_of_a_runtime():
    graph = exporting.written(exporting.narrow("giam_r50")).graph
    sigmoids = [node.name for node in graph.node if node.op_type == "Sigmoid"]
    assert sigmoids == ["scores/Sigmoid"]  # of the masks, where absolute accuracy is enough
