"""Weights of other implementations: reading, renaming and checking them."""

from sparseinst_jax.weights.convert import (
    load_weights,
    original_to_ours,
    ours_to_original,
    read_state_dict,
)
from sparseinst_jax.weights.reading import WeightsFile, read_weights_file
from sparseinst_jax.weights.reading.stored_arrays import WeightsFileError

__all__ = [
    "WeightsFile",
    "WeightsFileError",
    "load_weights",
    "original_to_ours",
    "ours_to_original",
    "read_state_dict",
    "read_weights_file",
]
