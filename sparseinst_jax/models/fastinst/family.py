"""What FastInst is to the rest of the package, and which of its options make no network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sparseinst_jax.data.target_masks import FULL_BITS
from sparseinst_jax.models.family import MAX_SIZE, Family, size_faults
from sparseinst_jax.models.fastinst import inference
from sparseinst_jax.models.fastinst.model import MASK_STRIDE, PROPOSAL_STRIDE, FastInst
from sparseinst_jax.models.fastinst.objective import FastInstObjective
from sparseinst_jax.models.fastinst.weights import MAX_LAYERS, NAMES

SIZES = {
    "channels": MAX_SIZE,
    "num_layers": MAX_LAYERS,
    "num_queries": MAX_SIZE,
    "num_auxiliary": MAX_SIZE,
    "num_heads": MAX_SIZE,
    "ffn_width": MAX_SIZE,
}


def faults(**options: Any) -> list[str]:
    """List what is wrong with the options of the network."""
    found = size_faults(options, SIZES)
    if not found and options["channels"] % options["num_heads"]:
        found.append(
            f"channels must be a multiple of num_heads, got {options['channels']} and "
            f"{options['num_heads']}"
        )
    return found


def make_objective(
    apply: Callable[..., Any], options: Mapping[str, Any], **weights: Any
) -> FastInstObjective:
    """Make the training objective of a network with these options."""
    return FastInstObjective(apply, options["num_layers"], options["num_queries"], **weights)


FASTINST = Family(
    model=FastInst,
    objective=make_objective,
    select=inference.select,
    faults=faults,
    num_masks=lambda options: options["num_queries"],
    targets=FULL_BITS._replace(keeps_empty=True),
    mask_stride=MASK_STRIDE,
    map_stride=PROPOSAL_STRIDE,
    mask_threshold=inference.MASK_THRESHOLD,
    masks_are_logits=True,
    scores_at_original_size=True,
    weights=NAMES,
    activations=inference.activations,
)
