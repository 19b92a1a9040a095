"""The command `convert`: weights of any implementation into a checkpoint of ours, and back."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparseinst_jax.checkpoints.store import Checkpoints
from sparseinst_jax.cli.arguments import parse_command_line, words_of_overrides
from sparseinst_jax.data.classes import COCO_CATEGORY_IDS, COCO_CLASS_NAMES
from sparseinst_jax.data.coco import load_coco
from sparseinst_jax.models.families import FAMILIES
from sparseinst_jax.models.trees import Tree, functional
from sparseinst_jax.runtime import process
from sparseinst_jax.runtime.files import check_writable, read_json
from sparseinst_jax.runtime.messages import listed, next_commands
from sparseinst_jax.setup.builders import build_model
from sparseinst_jax.setup.config import find_config, load_config
from sparseinst_jax.setup.loading import names_and_ids
from sparseinst_jax.weights.convert import Shapes, original_shapes, ours_to_original
from sparseinst_jax.weights.network_files import (
    ConvertedWeights,
    classes_that_fit,
    closest_network,
    convert_file,
    write_arrays,
    write_weights,
)

DESCRIPTION = """\
Turn weights of the original release or another implementation into a checkpoint, and back.

  sparseinst convert model.pth --config configs/giam_r50.py --output converted
  sparseinst convert model.pdparams --config configs/giam_r50.py --output giam.safetensors
  sparseinst convert RUN --to original --output model.safetensors

`sparseinst eval` and `predict` read the result by --checkpoint, `sparseinst train` by --init-from.
"""
OURS, ORIGINAL = "ours", "original"
# A folder may have a dot in its name, but who gives one of these means a file.
_OTHER_FILES = (".npz", ".pth", ".pt", ".pkl", ".pdparams", ".ckpt", ".bin", ".h5", ".json")


class _Converted(NamedTuple):
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
    _check_output(output, arguments.to)
    converted = (_open_checkpoint if source.is_dir() else _open_file)(source, arguments)
    print("\n".join(converted.lines))
    meta = converted.meta
    if arguments.to == ORIGINAL:
        names = FAMILIES[meta["config"]["model"]["family"]].weights
        arrays = ours_to_original(converted.params, converted.statistics, names)
        write_arrays(output, arrays, {"converted_from": meta["converted_from"]})
        print(f"{len(arrays)} arrays under the original's names: {output}")
        use = [f"--config={arguments.config or source / 'config.json'}", f"--weights={output}"]
    else:
        write_weights(output, converted.params, converted.statistics, meta)
        use, kind = [f"--checkpoint={output}"], "checkpoint"
        if output.suffix == ".safetensors":
            use = [f"--config={arguments.config or source / 'config.json'}", f"--weights={output}"]
            kind = "weights under our names"
        print(f"{len(meta['class_names'])} classes, {kind}: {output}")
    predict = ["sparseinst", "predict", *use, *words_of_overrides(arguments), "PHOTO.jpg"]
    train = ["sparseinst", "train", "--config=finetune", f"--init-from={output}"]
    print(next_commands(predict, train))
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
        help="list of class names, or annotations with them; default: what the file "
        "names, else for 80 classes COCO's",
    )
    parser.add_argument(
        "--ema", action="store_true", help="take the moving average where a file holds both"
    )
    return parser


def _check_output(output: Path, form: str) -> None:
    """Refuse an output that exists, that cannot be written or that is of no known kind."""
    if output.exists():
        raise ValueError(f"--output {output} exists: give another one, or move it away.")
    kinds, is_known = "a .safetensors or .npz file", output.suffix in (".safetensors", ".npz")
    if form == OURS:
        kinds = "a folder for a checkpoint, or a .safetensors file"
        is_known = output.suffix not in _OTHER_FILES
    if not is_known:
        raise ValueError(
            f"--output must be {kinds} where weights are written with --to {form}, got {output}."
        )
    check_writable(output.parent, "--output")


def _open_checkpoint(source: Path, arguments: argparse.Namespace) -> _Converted:
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
    return _Converted(params, statistics, {**meta, "converted_from": facts}, lines)


def _open_file(source: Path, arguments: argparse.Namespace) -> _Converted:
    if not arguments.config:
        raise ValueError("--config FILE must describe the network of the file, see sparseinst zoo.")
    config = load_config(arguments.config, arguments.overrides)

    def make_trees(num_classes: int) -> tuple[Tree, Tree]:
        return _empty_trees(config.model, num_classes)

    def suggest(arrays: Mapping[str, Any], num_classes: int) -> str:
        folder = find_config(arguments.config).parent
        return closest_network(arrays, _networks(folder, num_classes), folder)

    names = FAMILIES[config.model.family].weights
    weights = convert_file(source, names, make_trees, arguments.ema, suggest)
    class_names, category_ids, origin = _classes(arguments.classes, weights, source)
    meta = {
        "config": config.to_dict(),
        "class_names": list(class_names),
        "category_ids": list(category_ids),
        "code_version": process.version(),
        "converted_from": {**weights.facts, **_now()},
    }
    lines = [*weights.lines, f"  classes of {origin}: {listed(class_names, 8)}"]
    return _Converted(weights.params, weights.statistics, meta, lines)


def _empty_trees(model_config: Any, num_classes: int) -> tuple[Tree, Tree]:
    """Parameters and statistics of a network as shapes: zeros that take no memory."""
    _, params, statistics = functional(build_model(model_config, num_classes, seed=None))
    return params, statistics


def _networks(folder: Path, num_classes: int) -> Iterator[tuple[list[str], Shapes]]:
    """The networks that the configurations of a folder describe; other files are skipped."""
    networks: dict[str, tuple[list[str], Shapes]] = {}  # several files can describe one
    for path in sorted(folder.glob("*.py")):
        try:
            model = load_config(path).model
            key = str(sorted(model.to_dict().items()))
            if key not in networks:
                trees = _empty_trees(model, num_classes)
                networks[key] = [], original_shapes(*trees, FAMILIES[model.family].weights)
        except (ValueError, FileNotFoundError, AttributeError):
            continue
        networks[key][0].append(path.name)
    yield from networks.values()


def _classes(
    path: str | None, weights: ConvertedWeights, source: Path
) -> tuple[Sequence[str], Sequence[int], str]:
    """Names and ids of the classes, and where they are from: a json, the file itself, or COCO."""
    num_classes = weights.num_classes
    if path is None:
        if named := classes_that_fit(weights.classes, num_classes, source):
            return *names_and_ids(named), f"the file, {named.place}"
        if num_classes == len(COCO_CLASS_NAMES):
            return COCO_CLASS_NAMES, COCO_CATEGORY_IDS, "COCO, as the file names none"
        raise ValueError(
            f"{source} finds {num_classes} classes and does not say which: give their names by "
            "--classes FILE.json, a list of names or the annotations that it was trained with."
        )
    if not Path(path).is_file():
        raise FileNotFoundError(f"--classes {path} is no file; give a json")
    with Path(path).open("rb") as file:
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
    named = weights.classes
    is_other = named is not None and named.names != list(names)
    instead = f", not the {listed(named.names, 8)} of the file" if named and is_other else ""
    return names, ids, f"{path}{instead}"


def _now() -> dict[str, str]:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"date": now, "converted_by": f"sparseinst_jax {process.version()}"}
