"""`sparseinst train|eval|predict`: the scripts of the repository as one command."""

import importlib
import sys
from collections.abc import Sequence

from sparseinst_jax.runtime import process

_COMMANDS = {
    "train": "train on COCO-format data, or continue a run",
    "eval": "COCO mask AP of a run, a checkpoint, weights or a results file",
    "predict": "masks, labels and scores of images",
    "check-data": "what a data set holds, what is wrong with it, what will be lost",
    "debug-batch": "draw any batch of a training run and say what is in it",
    "import-data": "YOLO, LabelMe and VIA labels and mask images to a COCO json",
    "build-tfds": "a COCO folder to a few large files that TFDS reads",
    "convert": "weights of other implementations to a checkpoint, and back",
    "zoo": "every published model: AP, sizes, where the weights are",
    "benchmark": "speed and memory: inference, training, input, scoring",
    "summary": "parameters, operations and memory of a network, part by part",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand with the arguments after its name.

    Args:
      argv: arguments without the program's name; those of the process by default.

    Returns:
      The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    lines = "\n".join(f"  {name:13}{text}" for name, text in _COMMANDS.items())
    usage = f"usage: sparseinst COMMAND ...\n\n{lines}\n\nsparseinst COMMAND --help says more."
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage)
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in _COMMANDS:
        print(f"error: unknown command {name!r}\n{usage}", file=sys.stderr)
        return 2
    return run(name, rest)


def run(command: str, argv: Sequence[str]) -> int:
    """Prepare the process, then import and call `sparseinst_jax.cli.<command>.main`."""
    process.prepare()
    module = importlib.import_module(f"sparseinst_jax.cli.{command.replace('-', '_')}")
    return process.call(module.main, argv)
