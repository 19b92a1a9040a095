"""Which configuration describes the network of a weights file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparseinst_jax.models.functional import Tree, functional
from sparseinst_jax.setup.builders import build_model
from sparseinst_jax.setup.config import load_config
from sparseinst_jax.weights import fit
from sparseinst_jax.weights.convert import original_shapes
from sparseinst_jax.weights.table import shorten


def empty_weights(model_config: Any, num_classes: int) -> tuple[Tree, Tree]:
    """Parameters and statistics of a network as shapes: zeros that take no memory."""
    _, params, statistics = functional(build_model(model_config, num_classes, seed=None))
    return params, statistics


def suggest(arrays: Mapping[str, Any], num_classes: int, folder: Path) -> str:
    """Say which of a folder's configurations fits the arrays of a file, or comes closest.

    Args:
      arrays: under the original's names.
      num_classes: that the file was trained with.
      folder: holds configurations; files that are none are passed over.
    """
    networks: dict[str, tuple[fit.Fit, list[str]]] = {}  # networks that several files describe
    for path in sorted(folder.glob("*.py")):
        try:
            model = load_config(path).model
            key = str(sorted(model.to_dict().items()))
            if key not in networks:
                own = original_shapes(*empty_weights(model, num_classes))
                networks[key] = (fit.compare(arrays, own), [])
        except (ValueError, FileNotFoundError, AttributeError):
            continue
        networks[key][1].append(path.name)
    exact = [path for found, paths in networks.values() if found.is_exact for path in paths]
    if exact:
        verb = "fits" if len(exact) == 1 else "fit"
        return f"what {verb} every array of the file, of {folder}: {shorten(exact)}"
    if not networks:
        return f"there is no other configuration in {folder}"
    best, paths = max(networks.values(), key=lambda one: one[0].agreeing - one[0].strangers)
    return (
        f"no configuration in {folder} fits; the closest is {paths[0]}: {best.agreeing} of its "
        f"{best.expected} arrays agree, {best.strangers} of the file's have no place in it"
    )
