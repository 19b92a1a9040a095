"""Any implementation's state dict, in the names and layouts of the original release."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sparseinst_jax.weights import convert, original, rules
from sparseinst_jax.weights.arrays import WeightsFileError, name_some
from sparseinst_jax.weights.ecosystems import ECOSYSTEMS, IGNORED, Ecosystem
from sparseinst_jax.weights.files import read_weights_file

BACKBONE = "backbone."
_OURS = ("params/", "statistics/")
_UNKNOWN = Ecosystem("an unknown implementation", "an unknown implementation", "")


def load_weights(
    path: str | Path, params: convert.Tree, statistics: convert.Tree
) -> tuple[convert.Tree, convert.Tree]:
    """Reads a weights file of any kind and implementation into the given trees' form.

    Args:
      path: the file.
      params: nested dict that says which parameters exist, with their shapes and dtypes.
      statistics: the same for the normalisation statistics.

    Returns:
      New `(params, statistics)`; the trees given are not changed.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is of another kind or does not fit; the message lists every fault.
    """
    arrays = translate(read_weights_file(path).arrays).arrays
    return convert.original_to_ours(arrays, params, statistics, source=str(path))


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
    if all(name.startswith(_OURS) for name in state_dict):
        return _translate_ours(state_dict)
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


def _translate_ours(state_dict: Mapping[str, np.ndarray]) -> Translated:
    """Rename what `sparseinst convert` wrote as `.safetensors`."""
    tree = convert.unflatten(state_dict)
    arrays = convert.ours_to_original(tree.get("params", {}), tree.get("statistics", {}))
    clue = f"it has {next(iter(state_dict))}"
    return Translated(arrays, {name: name for name in arrays}, {}, "sparseinst_jax", clue, False)


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
