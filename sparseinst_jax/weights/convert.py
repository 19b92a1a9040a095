"""Weights in the original's names and layouts, to and from the parameter trees of this package.

Everything here is NumPy. A file is read without unpickling; each name must find a place, each
place a name, and each shape must agree: all faults are reported in one error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparseinst_jax.weights import original
from sparseinst_jax.weights.files import read_weights_file

Tree = dict[str, Any]


def load_weights(path: str | Path, params: Tree, statistics: Tree) -> tuple[Tree, Tree]:
    """Reads a `.npz` or `.safetensors` file of original weights into the given trees' form.

    Args:
      path: the file; its names and layouts are those of the original PyTorch release.
      params: nested dict that says which parameters exist, with their shapes and dtypes.
      statistics: the same for the normalisation statistics.

    Returns:
      New `(params, statistics)`; the trees given are not changed.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is of another kind or does not fit; the message lists every fault.
    """
    return original_to_ours(read_state_dict(path), params, statistics, source=str(path))


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
      ValueError: if names are left over on either side or shapes differ; lists them all.
    """
    expected = {**_flatten(params), **_flatten(statistics)}
    found: dict[str, np.ndarray] = {}
    unplaced, misshapen = [], []
    for name, array in state_dict.items():
        if _is_ignored(name):
            continue
        path, value = _to_ours(name, np.asarray(array))
        if path not in expected:
            unplaced.append(name)
        elif value.shape != expected[path].shape:
            want = _in_the_files_terms(path, expected[path].shape).removeprefix(f"{name} ")
            misshapen.append(f"{name} {np.shape(array)} instead of {want}")
        else:
            found[path] = np.ascontiguousarray(value, dtype=expected[path].dtype)
    fitting = {_to_ours(name, np.asarray(array))[0] for name, array in state_dict.items()}
    unfilled = [
        _in_the_files_terms(path, array.shape)
        for path, array in expected.items()
        if path not in fitting
    ]
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
    return dict(_to_original(path, np.asarray(array)) for path, array in leaves.items())


def without_ignored(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Leaves out the names that hold nothing of a model, such as counters and pixel constants."""
    return {name: array for name, array in state_dict.items() if not _is_ignored(name)}


def _is_ignored(name: str) -> bool:
    return any(re.fullmatch(rule.pattern, name) for rule in original.IGNORED)


def _to_ours(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """Our path and layout of an original name; a name without a rule keeps a path of its own."""
    module, _, leaf_name = name.rpartition(".")
    for leaf in original.LEAVES:
        if leaf.original == leaf_name and leaf.rank == array.ndim:
            path = f"{_module_to_ours(module)}/{leaf.ours}".lstrip("/")
            return path, array.transpose(leaf.axes)
    return name, array


def _to_original(path: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    module, _, leaf_name = path.rpartition("/")
    for leaf in original.LEAVES:
        if leaf.ours == leaf_name and leaf.rank == array.ndim:
            name = f"{_module_to_original(module)}.{leaf.original}".lstrip(".")
            return name, np.ascontiguousarray(array.transpose(np.argsort(leaf.axes)))
    raise ValueError(
        f"no rule for {path} of shape {array.shape}; known: "
        + ", ".join(sorted({f"{leaf.ours} (rank {leaf.rank})" for leaf in original.LEAVES}))
    )


def _module_to_ours(module: str) -> str:
    for rule in original.RENAMES:
        match = re.fullmatch(re.escape(rule.original).replace(r"\{\}", r"(\d+)"), module)
        if match and int(match[1]) % rule.step == 0:
            return rule.ours.format(int(match[1]) // rule.step)
    return module.replace(".", "/")


def _module_to_original(module: str) -> str:
    for rule in original.RENAMES:
        match = re.fullmatch(re.escape(rule.ours).replace(r"\{\}", r"(\d+)"), module)
        if match:
            return rule.original.format(int(match[1]) * rule.step)
    return module.replace("/", ".")


def _in_the_files_terms(path: str, shape: tuple[int, ...]) -> str:
    """The original's name and shape of a parameter of ours, for messages."""
    name, array = _to_original(path, np.broadcast_to(np.float32(0), shape))
    return f"{name} {array.shape}"


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
        else found[f"{prefix}{key}"]
        for key, value in tree.items()
    }


def _refuse(source: str, unplaced: list[str], unfilled: list[str], misshapen: list[str]) -> None:
    kinds = (
        ("in the file but not in the model", unplaced),
        ("in the model but not in the file", unfilled),
        ("of another shape", misshapen),
    )
    faults = [f"{len(rows)} {what}: {', '.join(rows)}" for what, rows in kinds if rows]
    if faults:
        raise ValueError(
            f"{source} does not fit the model: {'; '.join(faults)}. Use the config that the "
            "weights were trained with (num_groups, normalizer, backbone, number of classes)."
        )
