"""Start training from trained weights, and say of each part what became of it."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparseinst_jax.structures import Tree
from sparseinst_jax.training.checkpoints import Checkpoints
from sparseinst_jax.weights import convert

# Layers that depend on the classes: they start afresh where the classes are others.
_CLASS_LAYER = ".cls_score."
_BACKBONE = "backbone"
_CLASS_HEAD = "class head"
_OTHER = "other"
_MIN_BACKBONE_SHARE = 0.9
_MOST_NAMES = 8  # names written out after the table; the others are counted


class InitialWeights(NamedTuple):
    """Weights to start from, and how they came about.

    Attributes:
      params: nested dict of NumPy arrays.
      statistics: nested dict of NumPy arrays.
      lines: a table of what was loaded, re-initialised and ignored, for the user.
      fresh: the original's name of each array that keeps its fresh value, and why.
      ignored: names in the file that the model has no place for.
    """

    params: Tree
    statistics: Tree
    lines: list[str]
    fresh: dict[str, str]
    ignored: list[str]


class _Source(NamedTuple):
    title: str
    arrays: dict[str, Any]  # original name -> array in PyTorch layout
    class_names: tuple[str, ...] | None  # None where the file does not say


def load_initial_weights(
    path: str | Path, params: Tree, statistics: Tree, class_names: Sequence[str]
) -> InitialWeights:
    """Replace fresh weights by those of a file or checkpoint, as far as it has them.

    An array is loaded where name and shape agree, whatever the norm does with it: scale, bias,
    mean and variance go from frozen into trainable batch norms and back. The class head keeps its
    fresh weights where the number or the names of the classes differ; other arrays do where the
    file lacks them or has another shape. A file whose backbone alone is named without
    `backbone.` in front, as classification weights are, is understood.

    Args:
      path: `.npz` or `.safetensors` with the original's names, or a run folder or the folder of
        one checkpoint.
      params: nested dict of fresh parameters.
      statistics: nested dict of fresh statistics.
      class_names: the K classes that will be trained.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it cannot be read, or less than 90 % of the backbone's numbers were loaded.
    """
    own = convert.ours_to_original(params, statistics)
    source = _read(Path(path), own)
    fresh = {
        name: reason
        for name, array in own.items()
        if (reason := _reason_to_stay_fresh(name, array, source, class_names))
    }
    ignored = [name for name in source.arrays if name not in own]
    _refuse_another_backbone(source, own, fresh)
    merged = {name: own[name] if name in fresh else source.arrays[name] for name in own}
    loaded = convert.original_to_ours(merged, params, statistics, source=source.title)
    lines = [
        f"weights of {source.title}:",
        *_table(own, source.arrays, fresh, ignored),
        *_details(fresh, ignored),
        *_remarks(own, source, fresh, class_names),
    ]
    return InitialWeights(*loaded, lines, fresh, ignored)


def _read(path: Path, own: Mapping[str, Any]) -> _Source:
    if path.is_dir():
        with Checkpoints(path, read_only=True) as checkpoints:
            params, statistics, meta = checkpoints.restore_model()
        arrays = convert.ours_to_original(params, statistics)
        return _Source(f"{path}, step {meta['step']}", arrays, tuple(meta["class_names"]))
    if not path.exists():
        raise FileNotFoundError(
            f"there are no weights to start from at {path}: --init-from takes a .npz or"
            " .safetensors file, a run folder, or the folder of one checkpoint."
        )
    arrays = convert.without_ignored(convert.read_state_dict(path))
    if not any(name.startswith(f"{_BACKBONE}.") for name in arrays):
        arrays = {
            longer if (longer := f"{_BACKBONE}.{name}") in own else name: array
            for name, array in arrays.items()
        }
    return _Source(str(path), arrays, None)


def _reason_to_stay_fresh(
    name: str, array: Any, source: _Source, class_names: Sequence[str]
) -> str | None:
    """Say why an array is not taken from the source; None where it is."""
    if name not in source.arrays:
        return "not in the file"
    found, wanted = np.shape(source.arrays[name]), np.shape(array)
    if _CLASS_LAYER in name:
        if source.class_names is not None and source.class_names != tuple(class_names):
            return "other classes"
        if found[:1] != wanted[:1]:
            return f"{found[0] if found else 0} classes in the file, {wanted[0]} here"
    return None if found == wanted else f"{found} in the file, {wanted} here"


def _part(name: str) -> str:
    first, _, rest = name.partition(".")
    return _CLASS_HEAD if _CLASS_LAYER in name else first if rest else _OTHER


def _table(
    own: Mapping[str, Any],
    given: Mapping[str, Any],
    fresh: Mapping[str, str],
    ignored: Sequence[str],
) -> list[str]:
    """Count arrays and their numbers for each part."""
    columns = (
        {name: own[name] for name in own if name not in fresh},
        {name: own[name] for name in fresh},
        {name: given[name] for name in ignored},
    )
    own_parts = sorted(dict.fromkeys(map(_part, own)), key=lambda part: part == _CLASS_HEAD)
    strange = dict.fromkeys(part for name in ignored if (part := _part(name)) not in own_parts)
    rows = [["part", "loaded", "re-initialised", "ignored"]]
    for part in (*own_parts, *strange):
        sizes = [[np.size(a) for n, a in column.items() if _part(n) == part] for column in columns]
        cells = (f"{len(size)} ({sum(size):,})" if size else "-" for size in sizes)
        rows.append([part, *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines = [f"  {'  '.join(row).rstrip()}" for row in padded]
    return [f"{lines[0]}   in arrays (and numbers)", *lines[1:]]


def _details(fresh: Mapping[str, str], ignored: Sequence[str]) -> list[str]:
    lines = []
    for reason in dict.fromkeys(fresh.values()):
        names = [name for name, why in fresh.items() if why == reason]
        lines.append(f"  re-initialised, {reason}: {_shorten(names)}")
    if ignored:
        lines.append(f"  ignored, not in the model: {_shorten(ignored)}")
    return lines


def _remarks(
    own: Mapping[str, Any], source: _Source, fresh: Mapping[str, str], class_names: Sequence[str]
) -> list[str]:
    """Say what was done with the class head, and warn of norms of another kind."""
    head = [name for name in own if _CLASS_LAYER in name]
    lines = []
    if any(name in fresh for name in head):
        if source.class_names is not None:
            classes = f"{_shorten(source.class_names)} there, {_shorten(class_names)} here"
            lines.append(f"  the class head starts afresh: {classes}")
        else:
            lines.append("  the class head starts afresh")
    elif source.class_names is not None:
        lines.append(f"  the class head was taken over: the same {len(class_names)} classes")
    else:
        lines.append(
            f"  the class head was taken over: {len(class_names)} classes in the file too, whose"
            " names it does not say. If they are others, it will have to unlearn them."
        )
    kinds = _has_running_statistics(source.arrays), _has_running_statistics(own)
    if kinds[0] != kinds[1]:
        batch, group = "batch norm", "group norm"
        lines.append(
            "  WARNING: the backbone's norm is another:"
            f" {batch if kinds[0] else group} in the file, {batch if kinds[1] else group} here. Its"
            " weights fit together with their own norm only: set --config.model.backbone.norm="
            + ("frozen_batch_norm or batch_norm." if kinds[0] else "group_norm.")
        )
    return lines


def _has_running_statistics(arrays: Mapping[str, Any]) -> bool:
    return any(
        name.startswith(f"{_BACKBONE}.") and name.endswith(".running_mean") for name in arrays
    )


def _refuse_another_backbone(
    source: _Source, own: Mapping[str, Any], fresh: Mapping[str, str]
) -> None:
    names = [name for name in own if _part(name) == _BACKBONE]
    whole = sum(np.size(own[name]) for name in names)
    missing = [name for name in names if name in fresh]
    share = 1 - sum(np.size(own[name]) for name in missing) / max(whole, 1)
    if share >= _MIN_BACKBONE_SHARE:
        return
    listed = [f"{name} ({fresh[name]})" for name in missing]
    raise ValueError(
        f"{source.title} does not fit the backbone: {share:.1%} of its {whole:,} numbers would be"
        f" loaded, at least {_MIN_BACKBONE_SHARE:.0%} must be.\n  re-initialised would be"
        f" {len(missing)} of {len(names)} arrays: {_shorten(listed)}"
        f"\n  {_guess(source.arrays, own)}"
    )


def _guess(arrays: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """Say which configuration the backbone in a file was made with, read from its names."""
    there = _stages_and_width(arrays)
    if there is None:
        first = _shorten(list(arrays))
        return f"Names in the file: {first}. It must use the original release's names."
    if there == _stages_and_width(own):
        return "The file has this backbone's stages and width, but not all of it: get it anew."
    depths, width = there
    return (
        f'The file was made with --config.model.backbone.stage_depths="{depths}"'
        f" --config.model.backbone.width={width}: set these, or give other weights."
    )


def _stages_and_width(arrays: Mapping[str, Any]) -> tuple[tuple[int, ...], int] | None:
    """Count the blocks of res2 to res5 and the channels of the stem; None if it is no ResNet."""
    blocks: dict[int, int] = {}
    for name in arrays:
        match = re.match(r"(?:backbone\.)?res([2-5])\.(\d+)\.", name)
        if match:
            blocks[int(match[1])] = max(blocks.get(int(match[1]), 0), int(match[2]) + 1)
    stems = [a for n, a in arrays.items() if re.fullmatch(r"(backbone\.)?stem\.conv1\.weight", n)]
    if sorted(blocks) != [2, 3, 4, 5] or not stems:
        return None
    return tuple(blocks[stage] for stage in (2, 3, 4, 5)), np.shape(stems[0])[0]


def _shorten(names: Sequence[str]) -> str:
    rest = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")
