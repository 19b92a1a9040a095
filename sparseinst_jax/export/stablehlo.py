"""A network as StableHLO by `jax.export`: one artefact for CPUs, NVIDIA GPUs and TPUs.

It is of one padded size and any number of images, which makes it hold the plain form of every
operation: nothing of it was chosen for the machine that wrote it. What it says of itself lies in a
JSON beside it, bound to it by the sha256 of its bytes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from sparseinst_jax.models.family import Selection
from sparseinst_jax.models.ops import normalize_images
from sparseinst_jax.models.trees import functional
from sparseinst_jax.runner.file_predictor import GraphPredictor
from sparseinst_jax.runner.metadata import Metadata
from sparseinst_jax.runner.predictor import Size

PLATFORMS = ("cpu", "cuda", "tpu")
SUFFIX = ".stablehlo"


def artefact(module: Any, select: Any, size: Size) -> bytes:
    """Export a network with its weights: (images, valid_size) to the arrays of a `Selection`."""
    apply, params, statistics = functional(module)

    def run(images: jax.Array, valid_size: jax.Array) -> Selection:
        outputs, _ = apply(params, statistics, normalize_images(images, valid_size), train=False)
        return Selection(*select(outputs))

    (batch,) = jax_export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *size, 3), jnp.uint8)
    valid_size = jax.ShapeDtypeStruct((batch, 2), jnp.int32)
    exported = jax_export.export(jax.jit(lambda *given: tuple(run(*given))), platforms=PLATFORMS)(
        images, valid_size
    )
    return bytes(exported.serialize())


def predictor(content: bytes, metadata: Metadata) -> GraphPredictor:
    """Run an artefact on this machine."""
    call = jax.jit(jax_export.deserialize(bytearray(content)).call)
    masks = "mask_logits" if metadata.masks_are_logits else "mask_probs"
    names = ("scores", "labels", "query_index", "is_kept", masks)

    def run(images: np.ndarray, valid_size: np.ndarray) -> dict[str, np.ndarray]:
        found = call(images, valid_size.astype(np.int32))
        return dict(zip(names, map(np.asarray, found), strict=True))

    return GraphPredictor("the artefact", metadata, run)


def sidecar(path: Path) -> Path:
    """Where the metadata of an artefact lies."""
    return path.with_name(f"{path.name}.json")


def sidecar_text(content: bytes, metadata: Metadata) -> str:
    """The metadata with the artefact's sha256."""
    plain = json.loads(metadata.to_json())
    return json.dumps({**plain, "sha256": hashlib.sha256(content).hexdigest()}, indent=1) + "\n"
