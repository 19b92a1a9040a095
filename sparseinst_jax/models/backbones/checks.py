"""Checks of options that every backbone has; a fault starts with the option's name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparseinst_jax.models import layers


def depth_faults(stage_depths: Sequence[int], example: tuple[int, ...]) -> list[str]:
    """Refuse anything but as many positive numbers as the example has."""
    if len(stage_depths) == len(example) and min(stage_depths) >= 1:
        return []
    number = {4: "four", 5: "five"}[len(example)]
    return [
        f"stage_depths must be the blocks of {number} stages, such as {example}, got {stage_depths}"
    ]


def width_faults(width: int) -> list[str]:
    """Refuse less than two channels, which no norm over groups can have."""
    return [] if width >= 2 else [f"width must be at least 2, got {width}"]


def norm_faults(norm: Any) -> list[str]:
    """Refuse unknown norms."""
    if norm in layers.NORMS:
        return []
    return [f"norm must be one of {', '.join(layers.NORMS)}, got {norm!r}"]


def first_stages(stages: Sequence[str], frozen_stages: int) -> tuple[str, ...]:
    """Return the names of the stages that are not trained.

    Raises:
      ValueError: if there are fewer.
    """
    if not 0 <= frozen_stages <= len(stages):
        raise ValueError(
            f"frozen_stages must be from 0 to {len(stages)}, the number of the first of"
            f" {', '.join(stages)} that are not trained, got {frozen_stages}."
        )
    return tuple(stages[:frozen_stages])
