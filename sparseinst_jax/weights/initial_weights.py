"""Start training from trained weights, and say of each part what became of it."""

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparseinst_jax.checkpoints.store import Checkpoints
from sparseinst_jax.models.trees import Tree
from sparseinst_jax.models.weight_names import WeightNames
from sparseinst_jax.runtime.messages import listed
from sparseinst_jax.runtime.pages import page
from sparseinst_jax.weights.convert import original_to_ours, ours_to_original, rename_to_original
from sparseinst_jax.weights.network_files import (
    by_reason,
    count_classes,
    part_table,
)
from sparseinst_jax.weights.reading import read_weights_file

_BACKBONE = "backbone."
# No classification network has these; they start at zero, which samples where a kernel's taps are.
_OFFSETS = ".conv2_offset."
_MIN_BACKBONE_SHARE = 0.9
_NOT_IN_MODEL = "not in the model"
ANY_CLASS = ("thing",)  # the classes of a file whose one class stands for all


class InitialWeights(NamedTuple):
    """Weights to start from, and how they came about."""

    params: Tree  # nested dict of NumPy arrays
    statistics: Tree  # nested dict of NumPy arrays
    lines: list[str]  # a table of what was loaded, re-initialised and ignored, for the user
    fresh: dict[str, str]  # the original's name of each array that keeps its fresh value, and why
    ignored: dict[str, str]  # names in the file that the model has no place for, and why


class _GivenWeights(NamedTuple):
    title: str
    arrays: dict[str, Any]  # original name -> array in PyTorch layout
    class_names: tuple[str, ...] | None  # None where the file does not say
    file_names: dict[str, str]  # original name -> name in the file
    ignored: dict[str, str]  # name in the file -> why it holds nothing of a model
    remarks: tuple[str, ...] = ()


def load_initial_weights(
    source: str | Path | Sequence[str | Path],
    params: Tree,
    statistics: Tree,
    class_names: Sequence[str],
    names: WeightNames,
) -> InitialWeights:
    """Replace fresh weights by those of a file or checkpoint, as far as it has them.

    An array is loaded where name and shape agree, whatever the norm does with it: scale, bias,
    mean and variance go from frozen into trainable batch norms and back. The class head keeps its
    fresh weights where the number or the names of the classes differ, unless the file's one class
    is `ANY_CLASS`, which is repeated; other arrays do where the file lacks them or has another
    shape. The names of every implementation that `convert` reads are understood, also those of
    classification weights, which are a backbone alone.

    Args:
      source: a weights file of any kind and implementation, or a run folder or the folder of one
        checkpoint; or several, of which the last that has a part gives it.
      params: nested dict of fresh parameters.
      statistics: nested dict of fresh statistics.
      class_names: the K classes that will be trained.
      names: of the model family.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it cannot be read, or less than 90 % of the backbone's numbers were loaded, not
        counting the offsets of deformable convolutions.
    """
    own = ours_to_original(params, statistics, names)
    paths = [source] if isinstance(source, str | Path) else source
    given = functools.reduce(_joined, (_read(Path(path), names) for path in paths))
    head = [name for name in own if names.is_of_class_layer(name)]
    if is_of_any := given.class_names == ANY_CLASS:
        given = _for_each_class(given, head, class_names)
    fresh = {
        name: reason
        for name, array in own.items()
        if (reason := _reason_to_stay_fresh(name, array, given, class_names, name in head))
    }
    strange = {name: array for name, array in given.arrays.items() if name not in own}
    ignored = given.ignored | {given.file_names[name]: _NOT_IN_MODEL for name in strange}
    _refuse_another_backbone(given, own, fresh)
    merged = {name: own[name] if name in fresh else given.arrays[name] for name in own}
    loaded = original_to_ours(merged, params, statistics, names, source=given.title)
    columns = {
        "loaded": {name: own[name] for name in own if name not in fresh},
        "re-initialised": {name: own[name] for name in fresh},
        "ignored": strange,
    }
    lines = [
        f"weights of {given.title}:",
        *(f"  {remark}" for remark in given.remarks),
        *part_table(columns, own, names),
        *by_reason("re-initialised", fresh),
        *by_reason("ignored", ignored),
        f"  the class head {_fate_of_head(head, given, fresh, class_names, is_of_any)}",
        *_norm_warnings(own, given.arrays),
    ]
    return InitialWeights(*loaded, lines, fresh, ignored)


def _joined(first: _GivenWeights, second: _GivenWeights) -> _GivenWeights:
    return _GivenWeights(
        f"{first.title} and {second.title}",
        first.arrays | second.arrays,
        second.class_names or first.class_names,
        first.file_names | second.file_names,
        first.ignored | second.ignored,
        first.remarks + second.remarks,
    )


def _for_each_class(
    given: _GivenWeights, head: Sequence[str], class_names: Sequence[str]
) -> _GivenWeights:
    """Let each class begin as the one that was learned: it knows what is an instance."""
    found = [name for name in head if name in given.arrays]
    rows = {name: np.repeat(given.arrays[name], len(class_names), axis=0) for name in found}
    return given._replace(arrays=given.arrays | rows, class_names=tuple(class_names))


def _read(path: Path, names: WeightNames) -> _GivenWeights:
    if path.is_dir():
        with Checkpoints(path, read_only=True) as checkpoints:
            params, statistics, meta = checkpoints.restore_model()
        arrays = ours_to_original(params, statistics, names)
        file_names = {name: name for name in arrays}
        title = f"{path}, step {meta['step']}"
        return _GivenWeights(title, arrays, tuple(meta["class_names"]), file_names, {})
    if not path.exists():
        raise FileNotFoundError(
            f"there are no weights to start from at {path}: --init-from takes a weights file of"
            " PyTorch, Paddle, detectron2, .npz or .safetensors, a run folder, the folder of one"
            " checkpoint, or a name of `sparseinst download --list`, such as r50 or giam_r50."
        )
    file = read_weights_file(path)
    found = rename_to_original(file.arrays, names)
    remarks = (f"{file.kind}, {found.ecosystem}: {found.evidence}", *file.notes)
    named, count = file.classes, count_classes(found.arrays, names)
    classes = tuple(named.names) if named and len(named.names) == count else None
    return _GivenWeights(str(path), found.arrays, classes, found.file_names, found.ignored, remarks)


def _reason_to_stay_fresh(
    name: str, array: Any, given: _GivenWeights, class_names: Sequence[str], is_head: bool
) -> str | None:
    """Say why an array is not taken from what is given; None where it is."""
    if name not in given.arrays:
        return "not in the file"
    found, wanted = np.shape(given.arrays[name]), np.shape(array)
    if is_head:
        if given.class_names is not None and given.class_names != tuple(class_names):
            return "other classes"
        if found[:1] != wanted[:1]:
            return f"{found[0] if found else 0} classes in the file, {wanted[0]} here"
    return None if found == wanted else f"{found} in the file, {wanted} here"


def _fate_of_head(
    head: Sequence[str],
    given: _GivenWeights,
    fresh: Mapping[str, str],
    class_names: Sequence[str],
    is_of_any: bool,
) -> str:
    if is_of_any:
        return "begins as that of any thing, for each class"
    if any(name in fresh for name in head):
        if given.class_names is None:
            return "starts from random weights"
        there, here = listed(given.class_names, 8), listed(class_names, 8)
        return f"starts from random weights: {there} there, {here} here"
    if given.class_names is not None:
        return f"was taken over: the same {len(class_names)} classes"
    return (
        f"was taken over: {len(class_names)} classes in the file too, whose names it does not say."
        " If they are others, it will have to unlearn them."
    )


def _norm_warnings(own: Mapping[str, Any], arrays: Mapping[str, Any]) -> list[str]:
    there, here = _has_running_statistics(arrays), _has_running_statistics(own)
    if there == here:
        return []
    batch, group = "batch norm", "group norm"
    return [
        "  WARNING: the backbone's norm is another:"
        f" {batch if there else group} in the file, {batch if here else group} here. Its"
        " weights fit together with their own norm only: set --config.model.backbone.norm="
        + ("frozen_batch_norm or batch_norm." if there else "group_norm.")
    ]


def _has_running_statistics(arrays: Mapping[str, Any]) -> bool:
    return any(name.startswith(_BACKBONE) and name.endswith(".running_mean") for name in arrays)


def _refuse_another_backbone(
    given: _GivenWeights, own: Mapping[str, Any], fresh: Mapping[str, str]
) -> None:
    names = [name for name in own if name.startswith(_BACKBONE) and _OFFSETS not in name]
    whole = sum(np.size(own[name]) for name in names)
    missing = [name for name in names if name in fresh]
    share = 1 - sum(np.size(own[name]) for name in missing) / max(whole, 1)
    if share >= _MIN_BACKBONE_SHARE:
        return
    rows = [f"{name} ({fresh[name]})" for name in missing]
    raise ValueError(
        f"{given.title} does not fit the backbone: {share:.1%} of its {whole:,} numbers would be"
        f" loaded, at least {_MIN_BACKBONE_SHARE:.0%} must be.\n  re-initialised would be"
        f" {len(missing)} of {len(names)} arrays: {listed(rows, 8)}"
        f"\n  {_guess(given, own)}"
    )


def _guess(given: _GivenWeights, own: Mapping[str, Any]) -> str:
    """Say which configuration the backbone in a file was made with, read from its names."""
    there, here = _resnet_options(given.arrays), _resnet_options(own)
    if there is None:
        names = listed(given.file_names.values(), 8)
        return f"Names in the file: {names}. What can be read: {page('foreign-weights')}"
    if there == here:
        return "The file has this backbone's stages and width, but not all: download it again."
    options = " ".join(f"--config.model.backbone.{key}={there[key]}" for key in there)
    return f"The file was made with {options}: set these, or give other weights."


def _resnet_options(arrays: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read a ResNet's options from its blocks and its stem; None if it is another network."""
    blocks: dict[int, int] = {}
    for name in arrays:
        match = re.match(r"backbone\.(res|layer)([1-5])\.(\d+)\.", name)
        if match:
            stage = int(match[2]) + (match[1] == "layer")
            blocks[stage] = max(blocks.get(stage, 0), int(match[3]) + 1)
    stems = {"b": "backbone.stem.conv1.weight", "d": "backbone.conv1.6.weight"}
    variants = [variant for variant, name in stems.items() if name in arrays]
    if sorted(blocks) != [2, 3, 4, 5] or not variants:
        return None
    depths = tuple(blocks[stage] for stage in (2, 3, 4, 5))
    width = np.shape(arrays[stems[variants[0]]])[0]
    return {"stage_depths": f'"{depths}"', "width": width, "variant": variants[0]}
