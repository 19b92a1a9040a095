"""The predictor of an exported file: the same `Prediction`s, without JAX."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparseinst_jax.data.transforms import resize_image
from sparseinst_jax.runner.masks import MaskCut, upsample_masks
from sparseinst_jax.runner.metadata import Metadata
from sparseinst_jax.runner.onnx_file import CURE, read_metadata
from sparseinst_jax.runner.predictor import BasePredictor, Fetched, Prepared, Size
from sparseinst_jax.runner.sessions import Run, open_session

DEFAULT_RUNTIME = "onnxruntime"


def stacked(items: Sequence[Prepared], size: Size) -> tuple[np.ndarray, np.ndarray]:
    """What a graph is given: images uint8 [B, *size, 3], padded, and valid_size int64 [B, 2]."""
    images = np.zeros((len(items), *size, 3), np.uint8)
    valid_size = np.zeros((len(items), 2), np.int64)
    for row, item in enumerate(items):
        height, width = item.image.shape[:2]
        images[row, :height, :width] = item.image
        valid_size[row] = height, width
    return images, valid_size


class GraphPredictor(BasePredictor):
    """Find instances with a graph that something computes.

    Args:
        name: of the graph, for messages.
        metadata: what its file says of it.
        run: computes it, (images, valid_size) to named outputs, see `runner.metadata`.
        eval_size: (shortest, longest) side of resized images instead of the metadata's.
        classes: names and category ids instead of the metadata's, see `BasePredictor`.
        batch_size: images that go through the network together.
    """

    def __init__(
        self,
        name: str,
        metadata: Metadata,
        run: Run,
        *,
        eval_size: Size | None = None,
        classes: tuple[Sequence[str], Sequence[int | None]] | None = None,
        batch_size: int = 1,
        zoom: float = 1.0,
    ) -> None:
        self.name, self.metadata, self._run = name, metadata, run
        self.mask_threshold = metadata.mask_threshold
        cut = MaskCut(
            metadata.mask_threshold,
            metadata.mask_stride,
            metadata.masks_are_logits,
            metadata.scores_at_original_size,
        )
        names, ids = classes or (metadata.class_names, metadata.category_ids)
        size = eval_size or (metadata.shortest_side, metadata.longest_side)
        # A graph of one size is of one image.
        batch_size = batch_size if metadata.fixed_size is None else 1
        super().__init__(names, ids, size, cut, batch_size, metadata.protocol, zoom)

    def prepare_whole(self, image: np.ndarray) -> Prepared:
        """Resize an image uint8 [h, w, 3] by the test rule, and so that it fits into the graph."""
        prepared, fixed = super().prepare_whole(image), self.metadata.fixed_size
        height, width = prepared.image.shape[:2]
        if fixed is None or (height <= fixed[0] and width <= fixed[1]):
            return prepared
        original = prepared.original_size
        scale = min(fixed[0] / original[0], fixed[1] / original[1])
        size = max(int(original[0] * scale + 0.5), 1), max(int(original[1] * scale + 0.5), 1)
        return Prepared(resize_image(image, size), original, size)

    def padded_size(self, item: Prepared) -> Size:
        """The size that the graph sees."""
        return self.metadata.fixed_size or super().padded_size(item)

    def select(self, items: Sequence[Prepared], size: Size) -> dict[str, np.ndarray]:
        """Compute the graph for images padded to one size."""
        return self.run_graph(*stacked(items, size))

    def run_graph(self, images: np.ndarray, valid_size: np.ndarray) -> dict[str, np.ndarray]:
        """Compute the graph itself, see `runner.metadata`.

        Args:
            images: uint8 [B, H, W, 3], padded.
            valid_size: int64 [B, 2].

        Raises:
            ValueError: the sides are no multiples of 32 or not the graph's, or the file gives
                something else than it says.
        """
        sides, data = images.shape[1:3], self.metadata
        if data.fixed_size is not None and sides != data.fixed_size:
            raise ValueError(
                f"{self.name} takes images padded to {data.fixed_size} only, got {sides}: pad them,"
                " or export without --size"
            )
        if any(side % data.size_multiple for side in sides):
            padded = tuple(-(-side // data.size_multiple) * data.size_multiple for side in sides)
            raise ValueError(
                f"images must be padded to multiples of {data.size_multiple}, got {sides}. Pad with"
                f" zeros on the right and at the bottom to {padded}."
            )
        found = self._run(images, valid_size)
        name = "mask_logits" if data.masks_are_logits else "mask_probs"
        wanted = ("scores", "labels", "is_kept", name, *["query_index"] * data.masks_are_logits)
        grid = tuple(side // data.mask_stride for side in sides)
        if (
            not set(wanted) <= found.keys()
            or found[name].shape[2:] != grid
            or found[name].shape[1] > data.num_masks
            or not _is_below(found["labels"], len(data.class_names))
            or not _is_below(found.get("query_index", found["labels"][:0]), data.num_masks)
        ):
            raise ValueError(f"{self.name}: its graph is not what its metadata says; {CURE}")
        return found

    def fetch(self, selection: dict[str, np.ndarray]) -> Fetched:
        """Name what the graph gave."""
        masks = selection.get("mask_probs", selection.get("mask_logits"))
        assert masks is not None  # `run_graph` checks it
        labels = selection["labels"].astype(np.int32)
        query_index = np.broadcast_to(np.arange(labels.shape[1], dtype=np.int32), labels.shape)
        query_index = selection.get("query_index", query_index)

        def upsample(row: int, chosen: np.ndarray, item: Prepared) -> Any:
            sizes = item.mask_size, item.original_size
            return upsample_masks(masks[row], chosen, *sizes, self.cut)

        is_kept = selection["is_kept"].astype(bool)
        return Fetched(selection["scores"], labels, query_index, is_kept, masks, upsample)


class FilePredictor(GraphPredictor):
    """Find instances with an exported file.

    Classes, sizes and thresholds are those of the file, which holds them beside the graph.

    Args:
        source: an ONNX file, or its content, that `sparseinst export` wrote.
        runtime: what computes it: "onnxruntime", "openvino", or "openvino_bf16", which is
            faster on CPUs that have bfloat16, and less exact (docs/export.md).
        options: of `GraphPredictor`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not one of our files, or the runtime cannot open it.
    """

    def __init__(
        self,
        source: str | os.PathLike | bytes,
        runtime: str = DEFAULT_RUNTIME,
        **options: Any,
    ) -> None:
        source = source if isinstance(source, bytes) else Path(source)
        name = "the content" if isinstance(source, bytes) else str(source)
        metadata = read_metadata(source)
        if metadata.precision == "int8" and runtime == "openvino_bf16":
            raise ValueError(f"{name} is int8 already: give the runtime openvino or onnxruntime")
        super().__init__(name, metadata, open_session(source, runtime), **options)


def _is_below(index: np.ndarray, number: int) -> bool:
    return bool(index.size == 0 or (index.min() >= 0 and index.max() < number))
