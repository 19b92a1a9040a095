"""Int8: the convolutions alone, a scale for each channel, ranges from photos.

A quantiser's default also rounds the products that make masks and scores, which halves the AP.
What else stays float32 was measured on two trained networks (docs/export.md): the first
convolutions of EfficientNet-Lite, whose channels' ranges differ too much for one scale; the few
channels that masks are products of; and the coordinates, which would share a scale with features.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from sparseinst_jax.export.blocks import COORDINATES
from sparseinst_jax.runner.file_predictor import stacked
from sparseinst_jax.runner.predictor import BasePredictor
from sparseinst_jax.runtime.progress import with_progress

FLOAT_PARTS = (
    *("backbone/conv_stem/", "backbone/blocks/0/", "backbone/blocks/1/"),
    "decoder/mask_branch/projection/",
)


def quantized(
    model: onnx.ModelProto, exported: BasePredictor, photos: Sequence[np.ndarray]
) -> onnx.ModelProto:
    """Make the convolutions of a model int8.

    Args:
      model: of float32.
      exported: the same, running; resizes the photos.
      photos: uint8 [h, w, 3]; the ranges of activations are those that they reach.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):
        """One photo after the other, resized and padded."""

        def __init__(self) -> None:
            self._photos = _inputs(exported, photos)

        def get_next(self) -> Any:
            return next(self._photos, None)

    model = _with_coordinates_apart(model)
    stays = (*FLOAT_PARTS, f"{COORDINATES}/")
    logger = logging.getLogger()
    logger.addFilter(_is_news)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "int8.onnx"
            quantize_static(
                model,
                path,
                Reader(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["Conv"],
                nodes_to_exclude=[n.name for n in model.graph.node if n.name.startswith(stays)],
                per_channel=True,
                # With int8 a runtime makes uint8 of some of them, and mixed ones are not fused.
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
            return onnx.load(path)
    finally:
        logger.removeFilter(_is_news)


def _with_coordinates_apart(model: onnx.ModelProto) -> onnx.ModelProto:
    """Convolve coordinates beside features, not as channels of one map: the sum is the same."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    joined = {node.output[0]: node for node in graph.node if node.op_type == "Concat"}
    constants = {constant.name: constant for constant in graph.initializer}
    nodes = []
    for node in graph.node:
        source = joined.get(node.input[0]) if node.op_type == "Conv" else None
        if source is None or COORDINATES not in source.input[0].split("/"):
            nodes.append(node)
            continue
        whole = constants[node.input[1]]
        graph.initializer.remove(whole)
        kernel = numpy_helper.to_array(whole)  # [out, in, h, w]
        sums = []
        for x, name, part, bias in (
            (source.input[0], f"{COORDINATES}/{node.name}", kernel[:, :2], []),
            (source.input[1], node.name, kernel[:, 2:], node.input[2:]),
        ):
            weights = numpy_helper.from_array(np.ascontiguousarray(part), f"{name}/kernel")
            graph.initializer.append(weights)
            result = f"{name}/part"
            half = helper.make_node("Conv", [x, weights.name, *bias], [result], name)
            half.attribute.extend(node.attribute)
            nodes.append(half)
            sums.append(result)
        nodes.append(helper.make_node("Add", sums, node.output, f"{node.name}/sum"))
    del graph.node[:]
    graph.node.extend(nodes)
    return changed


def _is_news(record: logging.LogRecord) -> bool:
    """Leave out the advice to fold batch norms before, which they are."""
    return "pre-processing before quantization" not in record.getMessage()


def _inputs(exported: BasePredictor, photos: Sequence[np.ndarray]) -> Iterator[dict[str, Any]]:
    for photo in with_progress(photos, len(photos), sys.stderr, "calibrated"):
        item = exported.prepare_whole(photo)
        images, valid_size = stacked([item], exported.padded_size(item))
        yield {"images": images, "valid_size": valid_size}
