"""The command `convert`: weights of any implementation into a checkpoint of ours, and back."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparseinst_jax.checkpoints.store import Checkpoints
from sparseinst_jax.cli.arguments import parse_command_line
from sparseinst_jax.cli.convert_fit import empty_weights, suggest
from sparseinst_jax.cli.convert_output import ORIGINAL, OURS, check_output, write_arrays, write_ours
from sparseinst_jax.data.annotations import coco_classes
from sparseinst_jax.data.coco import load_coco
from sparseinst_jax.models.layers import Tree
from sparseinst_jax.runtime.files import read_json
from sparseinst_jax.setup.config import find_config, load_config
from sparseinst_jax.weights import fit
from sparseinst_jax.weights.convert import original_shapes, original_to_ours, ours_to_original
from sparseinst_jax.weights.files import read_weights_file
from sparseinst_jax.weights.table import by_reason, part_table
from sparseinst_jax.weights.translate import Translated, translate

DESCRIPTION = """\
Turn weights of the original release, PaddleDetection or mmdetection into a checkpoint, and back.

  sparseinst convert model.pth --config configs/giam_r50.py --output converted
  sparseinst convert model.pdparams --config configs/paddle_giam_r50.py --output giam.safetensors
  sparseinst convert RUN --to original --output model.safetensors

eval.py --checkpoint, predict.py --checkpoint and train.py --init-from read the result.
"""


class _Weights(NamedTuple):
    """What is converted.

    Attributes:
      params, statistics: nested dicts of NumPy arrays.
      meta: stored with them: config, classes, where they come from.
      lines: for the user.
    """

    params: Tree
    statistics: Tree
    meta: dict[str, Any]
    lines: list[str]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = parse_command_line(_parser(), argv)
    output, source = Path(arguments.output), Path(arguments.source)
    check_output(output, arguments.to)
    if source.is_dir():
        weights = _open_checkpoint(source, arguments)
    else:
        weights = _open_file(source, arguments)
    print("\n".join(weights.lines))
    if arguments.to == ORIGINAL:
        arrays = ours_to_original(weights.params, weights.statistics)
        write_arrays(output, arrays, {"converted_from": weights.meta["converted_from"]})
        print(f"{len(arrays)} arrays under the original's names: {output}")
    else:
        write_ours(output, weights.params, weights.statistics, weights.meta)
        print(f"{len(weights.meta['class_names'])} classes, {_next_step(output, arguments)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sparseinst convert",
        description=DESCRIPTION,
        epilog="Any key of the configuration can be set: --config.model.num_masks=50.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        metavar="FILE_OR_RUN",
        help=".pth, .pkl, .pdparams, .npz or .safetensors; or a run folder or one checkpoint",
    )
    parser.add_argument("--config", metavar="FILE", help="the network of a file; a run has its own")
    parser.add_argument(
        "--output",
        metavar="PATH",
        required=True,
        help="a new folder, or a .safetensors (.npz) file",
    )
    parser.add_argument(
        "--to",
        choices=(OURS, ORIGINAL),
        default=OURS,
        help="whose names and layouts to write, default: %(default)s",
    )
    parser.add_argument(
        "--classes",
        metavar="JSON",
        help="list of class names, or annotations with them; default for 80 classes: COCO's",
    )
    parser.add_argument(
        "--ema", action="store_true", help="take the moving average where a file holds both"
    )
    return parser


def _open_checkpoint(source: Path, arguments: argparse.Namespace) -> _Weights:
    if arguments.config or arguments.classes:
        raise ValueError(
            f"{source} is a folder with a checkpoint, which has its own configuration and classes: "
            "leave --config and --classes out."
        )
    with Checkpoints(source, read_only=True) as checkpoints:
        params, statistics, meta = checkpoints.restore_model()
    meta["config"] = load_config(meta["config"], arguments.overrides).to_dict()
    facts = {"file": str(source), "kind": f"checkpoint of step {meta['step']}", **_now()}
    lines = [f"weights of {source}, step {meta['step']}"]
    return _Weights(params, statistics, {**meta, "converted_from": facts}, lines)


def _open_file(source: Path, arguments: argparse.Namespace) -> _Weights:
    if not arguments.config:
        raise ValueError("--config FILE must describe the network of the file, see sparseinst zoo.")
    config = load_config(arguments.config, arguments.overrides)
    file = read_weights_file(source, arguments.ema)
    found = translate(file.arrays)
    num_classes = fit.count_classes(found.arrays)
    if num_classes is None:
        raise ValueError(_without_classes(source, found))
    class_names, category_ids = _classes(arguments.classes, num_classes, source)
    own = empty_weights(config.model, num_classes)
    try:
        params, statistics = original_to_ours(found.arrays, *own, source=str(source))
    except ValueError as error:
        hint = suggest(found.arrays, num_classes, find_config(arguments.config).parent)
        raise ValueError(f"{error}\n{found.ecosystem}: {found.evidence}\n{hint}") from error
    lines = [
        f"weights of {source} ({file.kind}, sha256 {file.sha256}):",
        f"  names of {found.ecosystem}: {found.evidence}",
        *(f"  {note}" for note in file.notes),
        *_table(found, original_shapes(*own), file.arrays),
    ]
    facts = {"file": str(source), "kind": file.kind, "sha256": file.sha256}
    meta = {
        "config": config.to_dict(),
        "class_names": class_names,
        "category_ids": category_ids,
        "code_version": _version(),
        "converted_from": {**facts, "ecosystem": found.ecosystem, **_now()},
    }
    return _Weights(params, statistics, meta, lines)


def _table(
    found: Translated, own: Mapping[str, Any], in_file: Mapping[str, np.ndarray]
) -> list[str]:
    columns = {
        "loaded": {name: np.broadcast_to(np.float32(0), shape) for name, shape in own.items()},
        "ignored": {name: in_file[name] for name in found.ignored},
    }
    return [*part_table(columns, own), *by_reason("ignored", found.ignored)]


def _without_classes(source: Path, found: Translated) -> str:
    if found.is_backbone:
        return (
            f"{source} holds a backbone alone ({found.ecosystem}: {found.evidence}), not a whole "
            f"network: start training from it with train.py --init-from {source}."
        )
    return (
        f"{source} has no {fit.CLASS_BIAS}, so it is no SparseInst network: {found.evidence}. Give "
        "a checkpoint of the original release, PaddleDetection or mmdetection (docs/convert.md)."
    )


def _classes(path: str | None, num_classes: int, source: Path) -> tuple[list[str], list[int]]:
    """Names and ids of the classes: those of COCO, or those in a json."""
    if path is None:
        if num_classes == len(coco_classes.CLASS_NAMES):
            return list(coco_classes.CLASS_NAMES), list(coco_classes.CATEGORY_IDS)
        raise ValueError(
            f"{source} finds {num_classes} classes and does not say which: give their names by "
            "--classes FILE.json, a list of names or the annotations that it was trained with."
        )
    with Path(path).open("rb") if Path(path).is_file() else _nothing(path) as file:
        is_list = file.read(64).lstrip().startswith(b"[")
    if is_list:
        names = read_json(path, "--classes", "give a list of names")
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"--classes {path} must be a list of names, or annotations of COCO.")
        ids = list(range(1, len(names) + 1))
    else:
        dataset = load_coco(path, None)
        names, ids = list(dataset.class_names), list(dataset.category_ids)
    if len(names) != num_classes:
        raise ValueError(f"{source} has {num_classes} classes, {path} has {len(names)}.")
    return names, ids


def _nothing(path: str) -> Any:
    raise FileNotFoundError(f"--classes {path} is no file; give a json")


def _next_step(output: Path, arguments: argparse.Namespace) -> str:
    if output.suffix == ".safetensors":
        return f"weights under our names: {output} (use it with --weights and --config)"
    return f"checkpoint: {output}\n  predict.py --checkpoint {output} PHOTO.jpg --output out"


def _now() -> dict[str, str]:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"date": now, "converted_by": f"sparseinst_jax {_version()}"}


def _version() -> str:
    try:
        return importlib.metadata.version("sparseinst_jax")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # run from a clone
