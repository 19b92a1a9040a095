"""Int8: the convolutions alone, a scale for each channel, ranges from photos.

A quantiser's default also rounds the products that make masks and scores, which halves the AP.
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

from sparseinst_jax.export.verify import counted_images
from sparseinst_jax.runner.predictor import BasePredictor

# Stays float32: the ranges of EfficientNet-Lite's first channels differ by so much that their
# rounding alone takes most of the AP (a trained network on five photos: 12.1, all convolutions in
# int8 2.7, all but these 11.7).
FLOAT_PARTS = ("backbone/conv_stem/", "backbone/blocks/0/")


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
                nodes_to_exclude=[
                    node.name for node in model.graph.node if node.name.startswith(FLOAT_PARTS)
                ],
                per_channel=True,
                # With int8 a runtime makes uint8 of some of them, and mixed ones are not fused.
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
            return onnx.load(path)
    finally:
        logger.removeFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Leave out the advice to fold batch norms before, which they are."""
    return "pre-processing before quantization" not in record.getMessage()


def _inputs(exported: BasePredictor, photos: Sequence[np.ndarray]) -> Iterator[dict[str, Any]]:
    for photo in counted_images(photos, sys.stderr, "calibrated"):
        item = exported.prepare(photo)
        height, width = item.image.shape[:2]
        images = np.zeros((1, *exported.padded_size(item), 3), np.uint8)
        images[0, :height, :width] = item.image
        yield {"images": images, "valid_size": np.array([[height, width]], np.int64)}
