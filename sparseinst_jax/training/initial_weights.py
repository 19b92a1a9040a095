"""Start training from trained weights: an original's file or a checkpoint of this package."""

from pathlib import Path
from typing import Any

import numpy as np

from sparseinst_jax.structures import Tree
from sparseinst_jax.training.checkpoints import Checkpoints
from sparseinst_jax.weights import convert

# Layers that depend on the classes: they start afresh where the classes are others.
_CLASS_LAYER = ".cls_score."


def load_initial_weights(
    path: str | Path, params: Tree, statistics: Tree
) -> tuple[Tree, Tree, list[str]]:
    """Replace fresh weights by those of a file, as far as it has them.

    The class layer keeps its fresh weights where the number of classes differs, and so does every
    top-level part (backbone, encoder, decoder) of which the file holds nothing: a file of
    backbone weights alone is welcome.

    Args:
      path: `.npz` or `.safetensors` with the original's names, or a run folder or checkpoint.
      params: nested dict of fresh parameters.
      statistics: nested dict of fresh statistics.

    Returns:
      New (params, statistics), and the original's names of what stayed fresh.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file does not fit; the message lists every fault.
    """
    state = convert.ours_to_original(params, statistics)
    given = _read(Path(path))
    parts = {name.partition(".")[0] for name in given}
    fresh = []
    for name, array in state.items():
        if name not in given:
            if name.partition(".")[0] not in parts or _CLASS_LAYER in name:
                fresh.append(name)
        elif _CLASS_LAYER in name and np.shape(given[name]) != array.shape:
            fresh.append(name)
    merged = {**given, **{name: state[name] for name in fresh}}
    # Strict conversion: what is left over, missing or of another shape is refused there.
    return (*convert.original_to_ours(merged, params, statistics, source=str(path)), fresh)


def _read(path: Path) -> dict[str, Any]:
    if path.is_dir():
        with Checkpoints(path, read_only=True) as checkpoints:
            params, statistics, _ = checkpoints.restore_model()
        return convert.ours_to_original(params, statistics)
    return convert.read_state_dict(path)
