"""From a network to an ONNX model: written from the modules, not traced.

What a trace would bake in, the forms that this machine's platform likes, is not here; and nodes
have the names of modules, so that a message of a runtime can be understood.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import onnx

from sparseinst_jax.export import fastinst, sparseinst
from sparseinst_jax.export.backbones import BACKBONE_WRITERS
from sparseinst_jax.export.blocks import normalized_images
from sparseinst_jax.export.graph import FLOAT, INT64, Graph, Size
from sparseinst_jax.models.fastinst.model import FastInst
from sparseinst_jax.models.sparseinst.model import SparseInst
from sparseinst_jax.runner.metadata import KEY, Metadata

# A family's `write` makes everything after the backbone, its `num_masks` is N of a network.
FAMILY_WRITERS: dict[type, Any] = {SparseInst: sparseinst, FastInst: fastinst}


def num_masks(module: Any) -> int:
    """N of a network."""
    return _writer(FAMILY_WRITERS, module, "network").num_masks(module)


def write_onnx(
    module: Any, options: Mapping[str, Any], metadata: Metadata, size: Size | None
) -> onnx.ModelProto:
    """Write a network.

    Args:
      module: the network, an `nnx.Module` of a family.
      options: of the family's `select`.
      metadata: goes into the file.
      size: padded (H, W) for a graph of one image of that size; None for any number and size.

    Raises:
      ValueError: there is no writer for the network or its backbone.
    """
    g = Graph(size)
    with g.scope("images"):
        x = normalized_images(g)
    with g.scope("backbone"):
        maps = _writer(BACKBONE_WRITERS, module.backbone, "backbone")(g, module.backbone, x)
    results = _writer(FAMILY_WRITERS, module, "network").write(g, module, maps, options)
    rename(g, results)
    batch, sides = ("batch", ("height", "width")) if size is None else (1, size)
    inputs = {
        "images": (onnx.TensorProto.UINT8, [batch, *sides, 3]),
        "valid_size": (INT64, [batch, 2]),
    }
    masks = ["mask_height", "mask_width"]
    if size is not None:
        masks = [side // metadata.mask_stride for side in size]
    kinds = {"scores": FLOAT, "labels": INT64, "query_index": INT64}
    kinds["is_kept"] = onnx.TensorProto.BOOL
    number: int | str = metadata.num_masks
    candidates: int | str = number
    if "query_index" in results:  # of a small image there are fewer
        number, candidates = "masks", "candidates"
    outputs = {
        name: (kinds[name], [batch, candidates])
        if name in kinds
        else (FLOAT, [batch, number, *masks])
        for name in results
    }
    return g.model(inputs, outputs, {KEY: metadata.to_json()})


def _writer(writers: Mapping[type, Any], module: Any, what: str) -> Any:
    if type(module) not in writers:
        known = ", ".join(kind.__name__ for kind in writers)
        raise ValueError(
            f"there is no ONNX writer for the {what} {type(module).__name__}, only for {known}: add"
            " one to sparseinst_jax/export, or export with --format stablehlo"
        )
    return writers[type(module)]


def rename(g: Graph, results: Mapping[str, str]) -> None:
    """Give results of nodes the names of the graph's outputs."""
    names = {result: name for name, result in results.items()}
    for node in g.nodes:
        for values in (node.input, node.output):
            values[:] = [names.get(value, value) for value in values]


def weights_sha256(*trees: Any) -> str:
    """Hash nested dicts of arrays: names, types, shapes and numbers, in the order of names."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(trees):
        name, array = jax.tree_util.keystr(path[1:], simple=True, separator="/"), np.asarray(leaf)
        digest.update(f"/{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
