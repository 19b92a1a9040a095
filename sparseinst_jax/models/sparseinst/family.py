"""What SparseInst is to the rest of the package, and which of its options make no network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args

from sparseinst_jax.data.target_masks import QUARTER_LEVELS
from sparseinst_jax.models.family import MAX_SIZE, Family, size_faults
from sparseinst_jax.models.sparseinst import inference
from sparseinst_jax.models.sparseinst.model import MAP_STRIDE, MASK_STRIDE, Normalizer, SparseInst
from sparseinst_jax.models.sparseinst.objective import SparseInstObjective
from sparseinst_jax.models.sparseinst.weights import NAMES

MAX_CONVS = 1 << 8  # nobody needs more
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
    return found + size_faults(options, SIZES)


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
    activations=inference.activations,
)
