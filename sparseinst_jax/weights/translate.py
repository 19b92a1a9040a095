"""Any implementation's state dict, in the names and layouts of the original release."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from sparseinst_jax.weights import original, rules
from sparseinst_jax.weights.arrays import WeightsFileError, name_some
from sparseinst_jax.weights.ecosystems import ECOSYSTEMS, IGNORED, Ecosystem

BACKBONE = "backbone."
_UNKNOWN = Ecosystem("an unknown implementation", "an unknown implementation", "")


class Translated(NamedTuple):
    """A state dict under the original's names.

    Attributes:
      arrays: original name -> array in PyTorch layout; a name that nobody knows stays as it was.
      file_names: original name -> name in the file.
      ignored: name in the file -> why it holds nothing of the model.
      ecosystem: the implementation that the file comes from.
      evidence: how that was seen, for people.
      is_backbone: whether the file holds a backbone alone.
    """

    arrays: dict[str, np.ndarray]
    file_names: dict[str, str]
    ignored: dict[str, str]
    ecosystem: str
    evidence: str
    is_backbone: bool


def translate(state_dict: Mapping[str, np.ndarray]) -> Translated:
    """Rename and lay out a state dict as the original's; the naming is recognised by its names.

    Args:
      state_dict: name in the file -> array, as files are read.

    Raises:
      WeightsFileError: if two names of the file mean the same array.
    """
    is_backbone = not any(name.startswith(("encoder.", "decoder.")) for name in state_dict)
    has_prefix = any(name.startswith(BACKBONE) for name in state_dict)
    ecosystem, clue = _recognise(state_dict)
    prefix = BACKBONE if is_backbone and not has_prefix and clue else ""
    title = ecosystem.backbone_title if is_backbone else ecosystem.title
    evidence = f"it has {clue}" if clue else "its names are of no known implementation"
    result = Translated({}, {}, {}, title, evidence, is_backbone)
    twice = []
    for file_name, array in state_dict.items():
        known = f"{prefix}{file_name}"
        why = rules.reason_to_ignore((*original.IGNORED, *IGNORED), known)
        if why:
            result.ignored[file_name] = why
            continue
        name, array = _rename(ecosystem, known, np.asarray(array))
        if name in result.arrays:
            twice.append(f"{result.file_names[name]} and {file_name}")
        result.arrays[name], result.file_names[name] = array, file_name
    if twice:
        raise WeightsFileError(f"two names mean the same array: {name_some(twice)}")
    return result


def _recognise(names: Iterable[str]) -> tuple[Ecosystem, str | None]:
    """The implementation, and the name in the file that gave it away."""
    behind = {name.removeprefix(BACKBONE): name for name in names}
    for ecosystem in ECOSYSTEMS:
        clue = next((known for known in behind if re.fullmatch(ecosystem.evidence, known)), None)
        if clue is not None:
            return ecosystem, behind[clue]
    return _UNKNOWN, None


def _rename(ecosystem: Ecosystem, name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    module, _, leaf_name = name.rpartition(".")
    if module.startswith(BACKBONE):  # the encoder's and the decoder's names are everywhere equal
        inner = module.removeprefix(BACKBONE)
        module = BACKBONE + (rules.rename_module(ecosystem.renames, inner) or inner)
    leaf = rules.find_leaf(ecosystem.leaves, leaf_name, array.ndim)
    if leaf is not None:
        leaf_name, array = leaf.ours, array.transpose(leaf.axes)
    return f"{module}.{leaf_name}" if module else leaf_name, array
