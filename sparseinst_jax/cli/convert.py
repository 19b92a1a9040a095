"""The command `convert`: weights of any implementation into a checkpoint of ours, and back."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sparseinst_jax.cli import command_parser
from sparseinst_jax.cli.arguments import parse_command_line, words_of_overrides
from sparseinst_jax.models.families import FAMILIES
from sparseinst_jax.runtime.files import check_writable
from sparseinst_jax.runtime.messages import next_commands
from sparseinst_jax.setup.config import find_config, load_config
from sparseinst_jax.setup.converting import Converted, checkpoint_weights, convert_weights
from sparseinst_jax.weights.convert import ours_to_original
from sparseinst_jax.weights.network_files import write_arrays, write_weights

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
    parser = command_parser(
        "convert",
        DESCRIPTION,
        epilog="Any key of the configuration can be set: --config.model.num_masks=50.",
    )
    add = parser.add_argument
    add(
        "source",
        metavar="FILE_OR_RUN",
        help=".pth, .pkl, .pdparams, .npz or .safetensors; or a run folder or one checkpoint",
    )
    add("--config", metavar="FILE", help="the network of a file; a run has its own")
    add(
        "--output",
        metavar="PATH",
        required=True,
        help="a new folder, or a .safetensors (.npz) file",
    )
    add(
        "--to",
        choices=(OURS, ORIGINAL),
        default=OURS,
        help="whose names and layouts to write, default: %(default)s",
    )
    add(
        "--classes",
        metavar="JSON",
        help="list of class names, or annotations with them; default: what the file "
        "names, else for 80 classes COCO's",
    )
    add("--ema", action="store_true", help="take the moving average where a file holds both")
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


def _open_checkpoint(source: Path, arguments: argparse.Namespace) -> Converted:
    if arguments.config or arguments.classes:
        raise ValueError(
            f"{source} is a folder with a checkpoint, which has its own configuration and classes: "
            "leave --config and --classes out."
        )
    return checkpoint_weights(source, arguments.overrides)


def _open_file(source: Path, arguments: argparse.Namespace) -> Converted:
    if not arguments.config:
        raise ValueError("--config FILE must describe the network of the file, see sparseinst zoo.")
    config = load_config(arguments.config, arguments.overrides)
    folder = find_config(arguments.config).parent
    return convert_weights(source, config, arguments.classes, arguments.ema, folder)
