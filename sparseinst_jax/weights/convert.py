"""Weights in the original's names and layouts, to and from the parameter trees of this package.

Everything here is NumPy. A file is read without unpickling; each name must find a place, each
place a name, and each shape must agree: all faults are reported in one error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparseinst_jax.weights import original, rules
from sparseinst_jax.weights.files import read_weights_file
from sparseinst_jax.weights.table import shorten

Tree = dict[str, Any]


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """Reads the arrays of a weights file of any kind; the short form of `read_weights_file`.

    Raises:
      FileNotFoundError: if there is no such file.
      WeightsFileError: a ValueError, if it cannot be read as weights.
    """
    return read_weights_file(path).arrays


def original_to_ours(
    state_dict: Mapping[str, np.ndarray],
    params: Tree,
    statistics: Tree,
    source: str = "the state dict",
) -> tuple[Tree, Tree]:
    """Renames and transposes an original state dict into the given trees' form.

    Args:
      state_dict: original name -> array in PyTorch layout.
      params: nested dict that says which parameters exist, with their shapes and dtypes.
      statistics: the same for the normalisation statistics.
      source: what to call the state dict in an error.

    Returns:
      New `(params, statistics)` of NumPy arrays with the dtypes of the trees given.

    Raises:
      ValueError: if names are left over on either side or shapes differ; counts them all and names
        the first.
    """
    expected = {**_flatten(params), **_flatten(statistics)}
    places = {place.name: place for place in _places(expected)}
    given = without_ignored(state_dict)
    found: dict[str, np.ndarray] = {}
    misshapen = []
    for name, place in places.items():
        if name not in given:
            continue
        if np.shape(given[name]) != place.shape:
            misshapen.append(f"{name} {np.shape(given[name])} instead of {place.shape}")
            continue
        array = np.asarray(given[name]).transpose(np.argsort(place.axes))
        found[place.path] = np.ascontiguousarray(array, dtype=expected[place.path].dtype)
    unplaced = [name for name in given if name not in places]
    unfilled = [f"{name} {place.shape}" for name, place in places.items() if name not in given]
    _refuse(source, unplaced, unfilled, misshapen)
    return _fill(params, found), _fill(statistics, found)


def ours_to_original(params: Tree, statistics: Tree) -> dict[str, np.ndarray]:
    """Names and lays out parameters and statistics as the original's state dict.

    Args:
      params: nested dict of parameters.
      statistics: nested dict of normalisation statistics.

    Returns:
      Original name -> array in PyTorch layout (no `num_batches_tracked`, no pixel constants).
    """
    leaves = {**_flatten(params), **_flatten(statistics)}
    return {
        place.name: np.ascontiguousarray(np.asarray(leaves[place.path]).transpose(place.axes))
        for place in _places(leaves)
    }


def original_shapes(params: Tree, statistics: Tree) -> dict[str, tuple[int, ...]]:
    """The original's names and shapes of trees of arrays, or of anything with shapes."""
    return {
        place.name: place.shape for place in _places({**_flatten(params), **_flatten(statistics)})
    }


def named_arrays(params: Tree, statistics: Tree) -> dict[str, np.ndarray]:
    """Names the arrays of the trees by their paths, as `params/...` and `statistics/...`."""
    return _flatten({"params": params, "statistics": statistics})


def unflatten(arrays: Mapping[str, np.ndarray]) -> Tree:
    """The nested dict of arrays that are named by their paths."""
    tree: Tree = {}
    for path, array in arrays.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = array
    return tree


def without_ignored(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Leaves out the names that hold nothing of a model, such as counters and pixel constants."""
    return {
        name: array
        for name, array in state_dict.items()
        if rules.reason_to_ignore(original.IGNORED, name) is None
    }


class _Place(NamedTuple):
    """Where an array of ours lies in the original: axes are those that make the original's."""

    path: str
    name: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]


def _places(leaves: Mapping[str, Any]) -> Iterator[_Place]:
    """The place of each array, in the original's names; what is ours alone has none."""
    is_resnet_d = "backbone/stem/conv3/kernel" in leaves
    renames = (*original.RENAMES, *(original.RESNET_D if is_resnet_d else ()))
    for path, array in leaves.items():
        if rules.reason_to_ignore(original.OURS_ALONE, path):
            continue
        module, _, leaf_name = path.rpartition("/")
        shape = np.shape(array)
        leaf = rules.find_leaf(original.LEAVES, leaf_name, len(shape))
        if leaf is None:
            known = sorted({f"{leaf.theirs} (rank {leaf.rank})" for leaf in original.LEAVES})
            raise ValueError(f"no rule for {path} of shape {shape}; known: {', '.join(known)}")
        theirs = rules.rename_module(renames, module) or module.replace("/", ".")
        name = f"{theirs}.{leaf.ours}".lstrip(".")
        yield _Place(path, name, tuple(shape[axis] for axis in leaf.axes), leaf.axes)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    return dict(_leaves(tree, prefix))


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _fill(tree: Mapping[str, Any], found: Mapping[str, np.ndarray], prefix: str = "") -> Tree:
    return {
        key: _fill(value, found, f"{prefix}{key}/")
        if isinstance(value, Mapping)
        else found.get(f"{prefix}{key}", value)
        for key, value in tree.items()
    }


def _refuse(source: str, unplaced: list[str], unfilled: list[str], misshapen: list[str]) -> None:
    kinds = (
        ("in the file but not in the model", unplaced),
        ("in the model but not in the file", unfilled),
        ("of another shape", misshapen),
    )
    faults = [f"{len(rows)} {what}: {shorten(rows)}" for what, rows in kinds if rows]
    if faults:
        listed = "\n  ".join(faults)
        raise ValueError(
            f"{source} does not fit the model:\n  {listed}\nUse the config that the weights were "
            "trained with (num_groups, normalizer, backbone, number of classes)."
        )
