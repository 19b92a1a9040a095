"""What SparseInst is to the rest of the package, and which of its options make no network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args

from sparseinst_jax.data.target_masks import QUARTER_LEVELS
from sparseinst_jax.models.family import Family
from sparseinst_jax.models.sparseinst import inference
from sparseinst_jax.models.sparseinst.model import MAP_STRIDE, MASK_STRIDE, Normalizer, SparseInst
from sparseinst_jax.models.sparseinst.objective import SparseInstObjective
from sparseinst_jax.models.sparseinst.weights import NAMES
from sparseinst_jax.runtime.messages import brief

# Nobody needs these; a configuration that came with a checkpoint may hold any number.
MAX_SIZE, MAX_CONVS = 1 << 16, 1 << 8
SIZES = {
    "encoder_channels": MAX_SIZE,
    "decoder_channels": MAX_SIZE,
    "decoder_convs": MAX_CONVS,
    "num_masks": MAX_SIZE,
    "num_groups": MAX_SIZE,
    "kernel_dim": MAX_SIZE,
}


def faults(*, normalizer: Any, **options: Any) -> list[str]:
    """List what is wrong with the options of the network."""
    found, known = [], get_args(Normalizer)
    if normalizer not in known:
        found.append(f"normalizer must be one of {', '.join(known)}, got {normalizer!r}")
    for key, most in SIZES.items():
        value = options[key]
        if type(value) is not int:
            found.append(f"{key} must be an integer, got {brief(value)}")
        elif not 1 <= value <= most:
            limit = "at least 1" if value < 1 else f"at most {most}"
            found.append(f"{key} must be {limit}, got {brief(value)}")
    return found


def make_objective(
    apply: Callable[..., Any], options: Mapping[str, Any], **weights: float
) -> SparseInstObjective:
    """Make the training objective of a network with these options."""
    return SparseInstObjective(apply, options["num_masks"], **weights)


SPARSEINST = Family(
    model=SparseInst,
    objective=make_objective,
    select=inference.select,
    faults=faults,
    num_masks=lambda options: options["num_masks"],
    targets=QUARTER_LEVELS,
    mask_stride=MASK_STRIDE,
    map_stride=MAP_STRIDE,
    mask_threshold=inference.MASK_THRESHOLD,
    weights=NAMES,
)
