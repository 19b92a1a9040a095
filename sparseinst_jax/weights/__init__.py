"""Weights of other implementations: reading, renaming and checking them."""

from sparseinst_jax.weights.convert import (
    load_weights,
    original_to_ours,
    ours_to_original,
    read_state_dict,
)

__all__ = ["load_weights", "original_to_ours", "ours_to_original", "read_state_dict"]
