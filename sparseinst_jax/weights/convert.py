"""Names and layouts of weights: any implementation's to the original release's, and these to ours.

Everything here is NumPy. A file is read without unpickling (`reading`); its names become the
original's (`rename_to_original`), and these become ours (`original_to_ours`): each name must find a
place, each place a name, and each shape must agree. All faults are reported in one error.

What the family's own modules are called comes in as `names`, from `models.families`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from sparseinst_jax.models.trees import Tree
from sparseinst_jax.models.weight_names import (
    WeightNames,
    find_leaf,
    reason_to_ignore,
    rename_module,
)
from sparseinst_jax.runtime.messages import listed
from sparseinst_jax.weights import ecosystems
from sparseinst_jax.weights.ecosystems import Ecosystem
from sparseinst_jax.weights.reading import read_weights_file
from sparseinst_jax.weights.reading.stored_arrays import WeightsFileError, short

Shapes = Mapping[str, tuple[int, ...]]
_BACKBONE = "backbone."
_OURS = ("params/", "statistics/")
_CURE_OF_NUMBERS = (
    "They are quantised, too large, or the bits of another type: save them as float32, float16 or "
    "bfloat16 where they were made."
)


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """Reads the arrays of a weights file of any kind; the short form of `read_weights_file`.

    Raises:
      FileNotFoundError: if there is no such file.
      WeightsFileError: a ValueError, if it cannot be read as weights.
    """
    return read_weights_file(path).arrays


def load_weights(
    path: str | Path, params: Tree, statistics: Tree, names: WeightNames
) -> tuple[Tree, Tree]:
    """Reads a weights file of any kind and implementation into the given trees' form.

    Args:
      path: the file.
      params: nested dict that says which parameters exist, with their shapes and dtypes.
      statistics: the same for the normalisation statistics.
      names: of the model family.

    Returns:
      New `(params, statistics)`; the trees given are not changed.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is of another kind or does not fit; the message lists every fault.
    """
    arrays = rename_to_original(read_weights_file(path).arrays, names).arrays
    return original_to_ours(arrays, params, statistics, names, source=str(path))


# Between ours and the original's


def original_to_ours(
    state_dict: Mapping[str, np.ndarray],
    params: Tree,
    statistics: Tree,
    names: WeightNames,
    source: str = "the state dict",
) -> tuple[Tree, Tree]:
    """Renames and transposes an original state dict into the given trees' form.

    Args:
      state_dict: original name -> array in PyTorch layout.
      params: nested dict that says which parameters exist, with their shapes and dtypes.
      statistics: the same for the normalisation statistics.
      names: of the model family.
      source: what to call the state dict in an error.

    Returns:
      New `(params, statistics)` of NumPy arrays with the dtypes of the trees given.

    Raises:
      ValueError: if names are left over on either side or shapes differ (counts them all), or if
        numbers are not floating-point or too large.
    """
    places = {place.name: place for place in _places(params, statistics, names)}
    ignored = (*names.ignored, *ecosystems.IGNORED)
    given = {name: x for name, x in state_dict.items() if not reason_to_ignore(ignored, name)}
    found: dict[str, np.ndarray] = {}
    misshapen, uncastable = [], []
    for name, place in places.items():
        if name not in given:
            continue
        array, dtype = np.asarray(given[name]), place.ours.dtype
        if array.shape != place.shape:
            misshapen.append(f"{name} {array.shape} instead of {place.shape}")
        elif fault := _cast_fault(array, dtype):
            uncastable.append(f"{name} {fault}")
        else:
            array = array.transpose(np.argsort(place.axes))
            found[place.path] = np.ascontiguousarray(array, dtype=dtype)
    kinds = (
        ("in the file but not in the model", [name for name in given if name not in places]),
        (
            "in the model but not in the file",
            [f"{name} {place.shape}" for name, place in places.items() if name not in given],
        ),
        ("of another shape", misshapen),
    )
    faults = [f"{len(rows)} {what}: {listed(rows, 8)}\n  " for what, rows in kinds if rows]
    if faults:
        raise ValueError(
            f"{source} does not fit the model:\n  {''.join(faults)[:-2]}Use the config that the "
            f"weights were trained with ({names.options}, backbone, number of classes)."
        )
    if uncastable:
        raise WeightsFileError(
            f"{source} has no floating-point weights in {len(uncastable)} of its arrays: "
            f"{listed(uncastable, 8)}. {_CURE_OF_NUMBERS}"
        )
    return _filled(params, found), _filled(statistics, found)


def _cast_fault(array: np.ndarray, dtype: np.dtype) -> str | None:
    """Why an array's numbers would not be the same in another dtype, up to rounding."""
    if array.dtype.kind != np.dtype(dtype).kind:
        return f"({array.dtype}, expected {dtype})"
    if array.dtype.itemsize > np.dtype(dtype).itemsize:
        most = np.finfo(dtype).max if array.dtype.kind == "f" else np.iinfo(dtype).max
        if (np.abs(array[np.isfinite(array)]) > most).any():
            return f"({array.dtype} above {most:.3g}, the largest {dtype})"
    return None


def ours_to_original(params: Tree, statistics: Tree, names: WeightNames) -> dict[str, np.ndarray]:
    """Names and lays out parameters and statistics as the original's state dict.

    Args:
      params: nested dict of parameters.
      statistics: nested dict of normalisation statistics.
      names: of the model family.

    Returns:
      Original name -> array in PyTorch layout (no `num_batches_tracked`, no pixel constants).
    """
    return {
        place.name: np.ascontiguousarray(np.asarray(place.ours).transpose(place.axes))
        for place in _places(params, statistics, names)
    }


def original_shapes(params: Tree, statistics: Tree, names: WeightNames) -> Shapes:
    """The original's names and shapes of trees of arrays, or of anything with shapes."""
    return {place.name: place.shape for place in _places(params, statistics, names)}


class _Place(NamedTuple):
    """Where an array of ours lies in the original: axes are those that make the original's."""

    path: str
    ours: Any  # the array, or what has its shape
    name: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]


def _places(params: Tree, statistics: Tree, names: WeightNames) -> Iterator[_Place]:
    """The place of each array, in the original's names; what is ours alone has none."""
    leaves: dict[str, Any] = flatten_dict(params, sep="/") | flatten_dict(statistics, sep="/")
    renames = names.renames
    for clue, rules in ecosystems.BACKBONES_OF_OTHER_NAMES.items():
        renames += rules if clue in leaves else ()
    leaf_rules = (*ecosystems.LEAVES, *names.leaves)
    for path, array in leaves.items():
        if reason_to_ignore(ecosystems.OURS_ALONE, path):
            continue
        module, _, leaf_name = path.rpartition("/")
        shape = np.shape(array)
        leaf = find_leaf(leaf_rules, leaf_name, len(shape))
        if leaf is None:
            known = sorted({f"{leaf.theirs} (rank {leaf.rank})" for leaf in leaf_rules})
            raise ValueError(f"no rule for {path} of shape {shape}; known: {', '.join(known)}")
        theirs = rename_module(renames, module) or module.replace("/", ".")
        name = f"{theirs}.{leaf.ours}".lstrip(".")
        yield _Place(path, array, name, tuple(shape[axis] for axis in leaf.axes), leaf.axes)


def _filled(tree: Tree, found: Mapping[str, np.ndarray]) -> Tree:
    leaves = flatten_dict(tree, sep="/", keep_empty_nodes=True)
    return unflatten_dict({path: found.get(path, x) for path, x in leaves.items()}, sep="/")


# From any implementation's names to the original's


class RenamedWeights(NamedTuple):
    """A state dict under the original's names."""

    # original name -> array in PyTorch layout; an unknown name stays as it was
    arrays: dict[str, np.ndarray]
    file_names: dict[str, str]  # original name -> name in the file
    ignored: dict[str, str]  # name in the file -> why it holds nothing of the model
    ecosystem: str  # the implementation that the file comes from
    evidence: str  # how that was seen, for people
    is_backbone: bool  # whether the file holds a backbone alone


def rename_to_original(state_dict: Mapping[str, np.ndarray], names: WeightNames) -> RenamedWeights:
    """Rename and lay out a state dict as the original's; the naming is recognised by its names.

    Args:
      state_dict: name in the file -> array, as files are read.
      names: of the model family.

    Raises:
      WeightsFileError: if two names of the file mean the same array.
    """
    if all(name.startswith(_OURS) for name in state_dict):  # what `write_weights` wrote
        tree = unflatten_dict(dict(state_dict), sep="/")
        arrays = ours_to_original(tree.get("params", {}), tree.get("statistics", {}), names)
        clue = f"it has {next(iter(state_dict))}"
        own_names = {name: name for name in arrays}
        return RenamedWeights(arrays, own_names, {}, "sparseinst_jax", clue, False)
    is_backbone = not any(name.partition(".")[0] in names.parts for name in state_dict)
    has_prefix = any(name.startswith(_BACKBONE) for name in state_dict)
    ecosystem, clue = _recognise(state_dict)
    prefix = _BACKBONE if is_backbone and not has_prefix and clue else ""
    title = ecosystem.backbone_title if is_backbone else ecosystem.title
    evidence = f"it has {clue}" if clue else "its names are of no known implementation"
    result = RenamedWeights({}, {}, {}, title, evidence, is_backbone)
    twice = []
    for file_name, array in state_dict.items():
        known = f"{prefix}{file_name}"
        why = reason_to_ignore((*names.ignored, *ecosystems.IGNORED), known)
        if why:
            result.ignored[file_name] = why
            continue
        name, array = _rename(ecosystem, known, np.asarray(array))
        if name in result.arrays:
            twice.append(f"{short(result.file_names[name])} and {short(file_name)}")
        result.arrays[name], result.file_names[name] = array, file_name
    if twice:
        raise WeightsFileError(f"two names mean the same array: {listed(twice)}")
    return result


def _recognise(names: Iterable[str]) -> tuple[Ecosystem, str | None]:
    """The implementation, and the name in the file that gave it away."""
    behind = {name.removeprefix(_BACKBONE): name for name in names}
    for ecosystem in ecosystems.ECOSYSTEMS:
        clue = next((known for known in behind if re.fullmatch(ecosystem.evidence, known)), None)
        if clue is not None:
            return ecosystem, behind[clue]
    return ecosystems.UNKNOWN, None


def _rename(ecosystem: Ecosystem, name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    module, _, leaf_name = name.rpartition(".")
    if module.startswith(_BACKBONE):  # a family's own names are the same everywhere
        inner = module.removeprefix(_BACKBONE)
        module = _BACKBONE + (rename_module(ecosystem.renames, inner) or inner)
    leaf = find_leaf(ecosystem.leaves, leaf_name, array.ndim)
    if leaf is not None:
        leaf_name, array = leaf.ours, array.transpose(leaf.axes)
    return f"{module}.{leaf_name}" if module else leaf_name, array
