"""Whether a state dict fits a network, by the original's names and shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

Shapes = dict[str, tuple[int, ...]]
CLASS_BIAS = "decoder.inst_branch.cls_score.bias"  # one number for each class


class Fit(NamedTuple):
    """How a file's arrays compare with a network's.

    Attributes:
      agreeing: how many have the same name and shape.
      expected: how many arrays the network has.
      strangers: how many of the file's it has no place for.
    """

    agreeing: int
    expected: int
    strangers: int

    @property
    def is_exact(self) -> bool:
        """Whether every array of either side has its partner."""
        return self.agreeing == self.expected and not self.strangers


def compare(arrays: Mapping[str, Any], own: Shapes) -> Fit:
    """Compare a file's arrays, under the original's names, with a network's names and shapes."""
    agreeing = sum(np.shape(arrays[name]) == shape for name, shape in own.items() if name in arrays)
    return Fit(agreeing, len(own), sum(name not in own for name in arrays))


def count_classes(arrays: Mapping[str, Any]) -> int | None:
    """The number of classes that a state dict under the original's names was trained with."""
    shape = np.shape(arrays.get(CLASS_BIAS, 0))
    return shape[0] if len(shape) == 1 else None
