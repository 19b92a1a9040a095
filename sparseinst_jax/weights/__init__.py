"""Weights of other implementations: reading, renaming and checking them."""

from sparseinst_jax.weights.arrays import WeightsFileError
from sparseinst_jax.weights.convert import original_to_ours, ours_to_original, read_state_dict
from sparseinst_jax.weights.files import WeightsFile, read_weights_file
from sparseinst_jax.weights.translate import load_weights

__all__ = [
    "WeightsFile",
    "WeightsFileError",
    "load_weights",
    "original_to_ours",
    "ours_to_original",
    "read_state_dict",
    "read_weights_file",
]
