"""`sparseinst train`: train, or continue a run."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from sparseinst_jax.cli import command_parser
from sparseinst_jax.cli.arguments import add_config_arguments, parse_command_line
from sparseinst_jax.runtime import hosts, process
from sparseinst_jax.runtime.messages import next_commands
from sparseinst_jax.setup.config import default_workdir, load_config
from sparseinst_jax.setup.train import TrainResult, train
from sparseinst_jax.training.nonfinite import NonFiniteLossError

_DESCRIPTION = """Train on COCO-format data. Starting the same command again continues the run.
Exit codes: 0 done, 1 error or non-finite loss, 73 another process trains in the folder, 75 another
host was lost, 129, 130 and 143 saved and stopped by a signal."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse `--config NAME [--workdir DIR] [--init-from PATH] [--config.KEY=VALUE ...]` and train.

    Or `--workdir RUN` alone, to continue it.

    Returns:
      The exit code, see `_DESCRIPTION`.
    """
    parser = command_parser("train", _DESCRIPTION)
    add_config_arguments(parser)
    parser.add_argument(
        "--init-from",
        metavar="PATH",
        help="start from these weights, the same as --config.train.init_from: a published name"
        " (`sparseinst download --list`), such as giam_r50 or r50; a file (.pth, .pkl, .pdparams,"
        " .npz, .safetensors), or a run or checkpoint folder; several joined by +, as in"
        " lite0+things, the last of which gives what several have",
    )
    hosts.add_argument(parser)
    arguments = parse_command_line(parser, argv)
    source = arguments.config
    if source is None:  # a run has its own
        source = Path(arguments.workdir or "") / "config.json"
        if not arguments.workdir or not source.is_file():
            parser.error(
                "--config NAME is needed, such as --config finetune; or the --workdir of a run to "
                f"continue{f': {source} does not exist' if arguments.workdir else ''}"
            )
    if arguments.init_from is not None:
        if "train.init_from" in arguments.overrides:
            parser.error("give --init-from or --config.train.init_from, not both")
        arguments.overrides["train.init_from"] = arguments.init_from
    # Faults are reported before the hosts wait for one another.
    load_config(source, arguments.overrides)
    process.unmap_freed_blocks()
    hosts.join(arguments.distributed)
    workdir = arguments.workdir or default_workdir(source)
    try:
        result = train(source, workdir, arguments.overrides)
    except NonFiniteLossError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if result.exit_code == 0 and jax.process_index() == 0:
        print(next_commands(_look_at(result)))
    return result.exit_code


def _look_at(result: TrainResult) -> list[str]:
    """The command that shows what a finished run has learned."""
    run, stored = f"--workdir={result.workdir}", result.workdir / "config.json"
    data: Any = load_config(stored).data if stored.is_file() else None
    if data is not None and not (data.val.annotations or data.val.tfds):
        return ["sparseinst", "predict", run, data.train.images or "PHOTOS"]
    scores = [row["AP"] for row in result.rows if "AP" in row]
    is_best = not scores or scores[-1] == max(scores)
    return ["sparseinst", "eval", run, *["--step=best"] * (not is_best)]
