"""Files of whole networks: read into our form, reported on, and written."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from sparseinst_jax.checkpoints.state import TrainState
from sparseinst_jax.models.trees import Tree
from sparseinst_jax.models.weight_names import WeightNames
from sparseinst_jax.runtime.files import written_whole
from sparseinst_jax.runtime.messages import columns, listed
from sparseinst_jax.runtime.pages import page
from sparseinst_jax.weights.convert import (
    RenamedWeights,
    Shapes,
    original_shapes,
    original_to_ours,
    rename_to_original,
)
from sparseinst_jax.weights.reading import WeightsFile, read_weights_file
from sparseinst_jax.weights.reading.stored_arrays import WeightsFileError
from sparseinst_jax.weights.reading.trainer_content import FileClasses

_CLASS_HEAD = "class head"  # the layer that depends on the classes: a row of its own
_OTHER = "other"
_MOST_NAMES = 8  # names written out; the others are counted


class ConvertedWeights(NamedTuple):
    """The weights of a file in our form, and how they came about."""

    params: Tree  # nested dict of NumPy arrays
    statistics: Tree  # nested dict of NumPy arrays
    num_classes: int  # that the file was trained with
    classes: FileClasses | None  # that the file names; None where it does not
    facts: dict[str, str]  # where they come from, to be stored with them
    lines: list[str]  # what was read, loaded and ignored, for people


def count_classes(arrays: Mapping[str, Any], names: WeightNames) -> int | None:
    """The number of classes that a state dict under the original's names was trained with."""
    shape = np.shape(arrays.get(f"{names.class_layers[0]}.bias", 0))
    return shape[0] - names.has_no_object if len(shape) == 1 else None


def classes_that_fit(
    named: FileClasses | None, num_classes: int | None, path: str | Path
) -> FileClasses | None:
    """The classes that a file names; None where it names none.

    Raises a ValueError if its network finds another number of classes, or two have one name.
    """
    if named is None or (len(named.names) == 1 and num_classes != 1):
        return None  # some text under the name, no list
    found = f"{len(named.names)} classes (under {named.place}: {listed(named.names, _MOST_NAMES)})"
    cure = "give the right names by sparseinst convert --classes FILE.json."
    if num_classes not in (None, len(named.names)):
        raise ValueError(f"{path} finds {num_classes} classes and names {found}: {cure}")
    twice = [name for name, count in Counter(named.names).items() if count > 1]
    if twice:
        raise ValueError(f"{path} names {found}, of these {listed(twice)} twice: {cure}")
    return named


def convert_file(
    path: str | Path,
    names: WeightNames,
    make_trees: Callable[[int], tuple[Tree, Tree]],
    prefer_ema: bool = False,
    suggest: Callable[[Mapping[str, Any], int], str] | None = None,
) -> ConvertedWeights:
    """Reads a file of a whole network, of any kind and implementation, into a network's form.

    Args:
      path: the file.
      names: of the model family.
      make_trees: from the number of classes, which the file knows, to the network's
        `(params, statistics)`; shapes will do.
      prefer_ema: take the moving average of the weights where the file holds both.
      suggest: from the file's arrays under the original's names and its number of classes to a
        line of advice for an error, such as `closest_network` gives.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is no whole network of the family, or does not fit.
    """
    file = read_weights_file(path, prefer_ema)
    found = rename_to_original(file.arrays, names)
    num_classes = count_classes(found.arrays, names)
    if num_classes is None:
        raise ValueError(_no_whole_network(path, found, names))
    own = make_trees(num_classes)
    try:
        params, statistics = original_to_ours(found.arrays, *own, names, source=str(path))
    except WeightsFileError:
        raise  # the network is the right one
    except ValueError as error:
        advice = suggest(found.arrays, num_classes) if suggest else ""
        message = f"{error}\n{found.ecosystem}: {found.evidence}\n{advice}"
        raise ValueError(message.rstrip()) from error
    facts = {"file": str(path), "kind": file.kind, "sha256": file.sha256}
    lines = _report(path, file, found, original_shapes(*own, names), names)
    facts["ecosystem"] = found.ecosystem
    return ConvertedWeights(params, statistics, num_classes, file.classes, facts, lines)


def _report(
    path: str | Path, file: WeightsFile, found: RenamedWeights, own: Shapes, names: WeightNames
) -> list[str]:
    arrays = {
        "loaded": {name: np.broadcast_to(np.float32(0), shape) for name, shape in own.items()},
        "ignored": {name: file.arrays[name] for name in found.ignored},
    }
    return [
        f"weights of {path} ({file.kind}, sha256 {file.sha256}):",
        f"  names of {found.ecosystem}: {found.evidence}",
        *(f"  {note}" for note in file.notes),
        *part_table(arrays, own, names),
        *by_reason("ignored", found.ignored),
    ]


def _no_whole_network(path: str | Path, found: RenamedWeights, names: WeightNames) -> str:
    if found.is_backbone:
        return (
            f"{path} holds a backbone alone ({found.ecosystem}: {found.evidence}), not a whole "
            f"network: start training from it with sparseinst train --init-from {path}."
        )
    return (
        f"{path} has no {names.class_layers[0]}.bias, so it is no {names.title} network: "
        f"{found.evidence}. Give a checkpoint of the original release or of an implementation in "
        f"the docs {page('foreign-weights')}"
    )


def closest_network(
    arrays: Mapping[str, Any],
    networks: Iterable[tuple[list[str], Shapes]],
    folder: Path,
) -> str:
    """Find which of some networks fits a state dict, or comes closest.

    Args:
      arrays: under the original's names.
      networks: for each, the configurations that describe it, and its names and shapes.
      folder: that holds these configurations, for the message.
    """
    exact, best, closest = [], None, ""
    for files, own in networks:
        agreeing = sum(
            np.shape(arrays[name]) == shape for name, shape in own.items() if name in arrays
        )
        unknown = sum(name not in own for name in arrays)
        if agreeing == len(own) and not unknown:
            exact += files
        if best is None or agreeing - unknown > best:
            best = agreeing - unknown
            closest = (
                f"no configuration in {folder} fits; the closest is {files[0]}: {agreeing} of its "
                f"{len(own)} arrays agree, {unknown} arrays of the file are unused"
            )
    if exact:
        verb = "fits" if len(exact) == 1 else "fit"
        return f"what {verb} every array of the file, of {folder}: {listed(exact, _MOST_NAMES)}"
    return closest or f"there is no other configuration in {folder}"


def part_of(name: str, names: WeightNames) -> str:
    """The row of an array with an original name."""
    first, _, rest = name.partition(".")
    return _CLASS_HEAD if names.is_of_class_layer(name) else first if rest else _OTHER


def part_table(
    arrays: Mapping[str, Mapping[str, Any]], own: Iterable[str], names: WeightNames
) -> list[str]:
    """Lines that count arrays and their numbers for each part of the model, below headings.

    Args:
      arrays: heading -> original name -> array.
      own: original names of the model's arrays, whose parts come first.
      names: of the model family.
    """
    own_parts = dict.fromkeys(part_of(name, names) for name in own)
    own_parts = sorted(own_parts, key=lambda part: part == _CLASS_HEAD)
    named = (part_of(name, names) for column in arrays.values() for name in column)
    strange = dict.fromkeys(part for part in named if part not in own_parts)
    rows = [["part", *arrays]]
    for part in (*own_parts, *strange):
        sizes = [
            [np.size(array) for name, array in column.items() if part_of(name, names) == part]
            for column in arrays.values()
        ]
        rows.append([part, *(f"{len(s)} ({sum(s):,})" if s else "-" for s in sizes)])
    first, *lines = (f"  {line}" for line in columns(rows, len(rows[0])))
    return [f"{first}   in arrays (and numbers)", *lines]


def by_reason(what: str, reasons: Mapping[str, str]) -> list[str]:
    """One line for each reason, with the names that have it; `what` starts each line."""
    lines = []
    for reason in dict.fromkeys(reasons.values()):
        names = [name for name, why in reasons.items() if why == reason]
        count = f" ({len(names)})" if len(names) > _MOST_NAMES else ""
        lines.append(f"  {what}, {reason}{count}: {listed(names, _MOST_NAMES)}")
    return lines


# Writing, whole or not at all


def write_arrays(
    output: Path, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any] | None = None
) -> None:
    """Write a `.safetensors` file, with facts as json in its header, or a `.npz` file."""
    from safetensors.numpy import save_file

    plain = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    texts = {key: json.dumps(value) for key, value in (facts or {}).items()}

    with written_whole(output) as temporary:
        if output.suffix == ".npz":
            with temporary.open("wb") as file:
                np.savez(file, **plain)  # type: ignore[arg-type]
        else:
            save_file(plain, temporary, metadata=texts)


def write_weights(output: Path, params: Tree, statistics: Tree, meta: Mapping[str, Any]) -> None:
    """Write weights under our names: a `.safetensors` file or, by any other suffix, a checkpoint.

    The checkpoint is a run folder with one, of step 0, that holds weights and no optimizer.

    Args:
      output: must not exist.
      params: nested dict of NumPy arrays.
      statistics: nested dict of NumPy arrays.
      meta: what `Checkpoints.save` stores: configuration, class names, category ids.
    """
    if output.suffix == ".safetensors":
        tree: Tree = {"params": params, "statistics": statistics}
        arrays: Any = flatten_dict(tree, sep="/")
        return write_arrays(output, arrays, meta)
    from sparseinst_jax.checkpoints.store import Checkpoints  # Orbax: slow to import

    with written_whole(output) as temporary, Checkpoints(temporary) as checkpoints:
        checkpoints.save(TrainState(np.int32(0), params, statistics, None), meta)
