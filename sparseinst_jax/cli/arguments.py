"""The arguments that several commands share: a configuration, a model, a size."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparseinst_jax.runner.file_predictor import DEFAULT_RUNTIME
from sparseinst_jax.runner.onnx_file import SUFFIX, read_metadata
from sparseinst_jax.runner.prediction import score_fault
from sparseinst_jax.runner.predictor import BasePredictor
from sparseinst_jax.runner.sessions import RUNTIMES
from sparseinst_jax.runtime.pages import page
from sparseinst_jax.setup.config import default_workdir, flatten, load_config
from sparseinst_jax.setup.datasets import draw_missing_data
from sparseinst_jax.setup.loading import (
    exported_config,
    load_exported,
    load_run,
    load_weights_file,
    run_folder,
    stored_meta,
)
from sparseinst_jax.setup.published import config_of
from sparseinst_jax.weights.zoo import published

_PREFIX = "--config."


class NamedModel(NamedTuple):
    """The model that the command line names, and what belongs to it.

    Attributes:
        predictor: the model.
        config: its configuration, overrides applied.
        workdir: the run folder, where outputs go by default.
        title: one line for the user that says what was loaded.
    """

    predictor: BasePredictor
    config: Any
    workdir: Path
    title: str


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--config NAME` and `--workdir DIR`, and the usage of `--config.KEY=VALUE`."""
    parser.add_argument(
        "--config", metavar="NAME", help="configuration, such as giam_r50, or a file"
    )
    parser.add_argument("--workdir", metavar="DIR", help="run folder; default: runs/<config name>")
    note = "Any key of the configuration can be set: --config.train.batch_size=8; tuples as"
    parser.epilog = f'{parser.epilog or ""} {note} --config.data.eval_size="(352, 469)".'.strip()


def parse_command_line(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """Parse a command line that may hold `--config.KEY=VALUE` arguments anywhere.

    What is not known is answered with what was probably meant.

    Args:
      parser: of the command.
      argv: arguments without the program's name; those of the process by default.

    Returns:
      The namespace of the parser with `overrides`, dotted key to text, added.
    """
    rest, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    # Images may stand between the options.
    namespace, unknown = parser.parse_known_intermixed_args(rest)
    if unknown:
        options = [option for action in parser._actions for option in action.option_strings]
        keys = list(flatten(load_config("base")))
        meant = [_probably_meant(argument, options, keys) for argument in unknown]
        hint = "".join(f"\n  did you mean {each}?" for each in dict.fromkeys(filter(None, meant)))
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    namespace.overrides = overrides
    return namespace


def _probably_meant(argument: str, options: Sequence[str], keys: Sequence[str]) -> str:
    """The option, or the key of the configuration, that an unknown argument is close to; or ""."""
    name, equals, value = argument.partition("=")
    if "." in name:  # train.batch_size=8, without the dashes
        named = [key for key in keys if key == name]
    else:
        last = name.strip("-").replace("-", "_")
        named = [key for key in keys if name.startswith("-") and key.split(".")[-1] == last]
    close = difflib.get_close_matches(name, options, 1, 0.7) if name.startswith("-") else []
    found = [f"{_PREFIX}{key}" for key in named] or close
    return " or ".join(f"{each}{equals}{value}" for each in found)


def split_overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Take `--config.KEY=VALUE` and `--config.KEY VALUE` out of an argument list.

    Returns:
      The other arguments in order, and dotted key to text; the last of a repeated key counts.

    Raises:
      ValueError: an override without a value, or without `config.`: `--train.batch_size=8`.
    """
    rest: list[str] = []
    overrides: dict[str, str] = {}
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--":
            rest += [argument, *arguments]
        elif re.match(r"--(model|objective|data|train|eval)\.", argument):
            raise ValueError(f"{argument}: did you mean {_PREFIX}{argument.removeprefix('--')}?")
        elif argument.startswith(_PREFIX):
            key, equals, text = argument[len(_PREFIX) :].partition("=")
            value = text if equals else next(arguments, None)
            if value is None:
                raise ValueError(f"{argument} needs a value: {argument}=VALUE.")
            overrides[key] = value
        else:
            rest.append(argument)
    return rest, overrides


def parse_size(text: str) -> tuple[int, int]:
    """Read HEIGHTxWIDTH, for argparse."""
    height, _, width = text.lower().partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH such as 640x864, got {text!r}")
    return int(height), int(width)


def size_fault(name: str, size: tuple[int, int] | None) -> str:
    """Say what is wrong with the size of a padded image; "" if nothing is."""
    if size is None or (min(size) > 0 and not size[0] % 32 and not size[1] % 32):
        return ""
    return f"{name} must be multiples of 32, got {size[0]}x{size[1]}"


def add_model_arguments(parser: argparse.ArgumentParser, **runtime: Any) -> None:
    """Add the arguments that name a model: --workdir, --checkpoint, --config, --weights, ..."""
    add_config_arguments(parser)
    add = parser.add_argument
    add(
        "--checkpoint",
        metavar="DIR_OR_FILE",
        help="folder of one checkpoint, or of a run; or a file of `sparseinst export`, model.onnx",
    )
    add(
        "--runtime",
        choices=tuple(RUNTIMES),
        help=f"what computes an exported file, default: {DEFAULT_RUNTIME}; openvino_bf16 is the"
        " fastest where the CPU has bfloat16, and less exact",
        **runtime,
    )
    add(
        "--weights",
        metavar="NAME_OR_FILE",
        help="a published model by its name (`sparseinst download --list`), such as giam_r50_aug; "
        "or weights of this package, the original release or another implementation, which need "
        "--config; the class names come from config.data.val.annotations or, where that is missing "
        "and there are 80, are COCO's",
    )
    add("--step", metavar="N", help='step of the run\'s checkpoint, or "best"; default: the last')


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse combinations that name no model or two.

    Raises:
        ValueError: all faults in one message.
    """
    faults = []
    if arguments.weights and not arguments.config:
        arguments.config = config_of(arguments.weights)  # a published name has one
    if arguments.weights and not arguments.config:
        missing = "" if Path(arguments.weights).is_file() else f"; {arguments.weights} is no file"
        faults.append(
            f"--weights needs --config FILE, which describes the network of the file{missing}"
        )
    if arguments.weights and arguments.checkpoint:
        faults.append("give --weights or --checkpoint, not both")
    if arguments.checkpoint and arguments.workdir:
        faults.append("give --checkpoint or --workdir, not both")
    # Only `eval` has --predictions.
    only_config_is_read = arguments.weights or getattr(arguments, "predictions", None)
    if arguments.config and (arguments.workdir or arguments.checkpoint) and not only_config_is_read:
        faults.append(
            "give --config without --workdir and --checkpoint: a run has its own configuration; "
            "override its keys with --config.KEY=VALUE"
        )
    if arguments.step and is_exported(arguments):
        faults.append(
            "--step chooses among the checkpoints of a run, an exported file has one state"
        )
    # `benchmark` exports the model itself, for several runtimes.
    if isinstance(arguments.runtime, str) and not is_exported(arguments):
        faults.append(f"--runtime is for an exported file: --checkpoint=model{SUFFIX}")
    if arguments.step and arguments.weights:
        faults.append("--step chooses among the checkpoints of a run, --weights has one state")
    if arguments.step and arguments.step != "best" and not arguments.step.isdigit():
        faults.append(f'--step expects a number or "best", got {arguments.step!r}')
    if not (arguments.config or arguments.workdir or arguments.checkpoint):
        faults.append(
            "no model named: give --workdir RUN, --checkpoint DIR or --weights NAME, such as "
            "--weights=giam_r50_aug (`sparseinst download --list`), or --weights FILE with --config"
        )
    if fault := score_fault(getattr(arguments, "score_threshold", 0.0)):
        faults.append(f"--score-threshold: {fault}")
    if faults:
        raise ValueError("\n".join(faults))


def words_of_model(arguments: argparse.Namespace) -> list[str]:
    """The arguments that name the model, for another command about the same one."""
    names = ("config", "workdir", "checkpoint", "runtime", "weights", "step")
    given = {name: getattr(arguments, name) for name in names}
    words = [f"--{name}={value}" for name, value in given.items() if value]
    return words + words_of_overrides(arguments)


def words_of_overrides(arguments: argparse.Namespace) -> list[str]:
    """The changed keys of the configuration as arguments."""
    return [f"{_PREFIX}{key}={value}" for key, value in arguments.overrides.items()]


def is_exported(arguments: argparse.Namespace) -> bool:
    """Whether the model is a file that `sparseinst export` wrote."""
    return Path(getattr(arguments, "checkpoint", None) or "").suffix.lower() == SUFFIX


def workdir_of(arguments: argparse.Namespace) -> Path:
    """Return the run folder that the arguments mean, where outputs go by default."""
    if arguments.workdir:
        return Path(arguments.workdir)
    if is_exported(arguments):
        return default_workdir(arguments.checkpoint)
    if arguments.checkpoint:
        return run_folder(arguments.checkpoint)
    return default_workdir(arguments.config)


def open_model(arguments: argparse.Namespace) -> NamedModel:
    """Load the model that the arguments name.

    Raises:
        FileNotFoundError: a file or checkpoint is missing.
        ValueError: the arguments or the files do not fit.
    """
    workdir = workdir_of(arguments)
    if is_exported(arguments):
        predictor, config = load_exported(
            arguments.checkpoint, arguments.overrides, arguments.runtime or DEFAULT_RUNTIME
        )
        return NamedModel(predictor, config, workdir, f"exported file {arguments.checkpoint}")
    if arguments.weights:
        config: Any = load_config(arguments.config, arguments.overrides)
        draw_missing_data(config)
        predictor, origin = load_weights_file(config, arguments.weights)
        title = f"weights {arguments.weights}, class names from {origin}"
        return NamedModel(predictor, config, workdir, title)
    name = Path(arguments.config or "").stem
    if name in published() and not workdir.exists():
        raise FileNotFoundError(
            f"there is no run {workdir}: for the published weights give --weights={name}, for a "
            f"run of your own --workdir {page('weights')}"
        )
    path = arguments.checkpoint or workdir
    step = int(arguments.step) if (arguments.step or "").isdigit() else arguments.step
    predictor, config, step = load_run(path, step, arguments.overrides)
    return NamedModel(predictor, config, workdir, f"checkpoint of step {step} in {workdir}")


def stored_config(arguments: argparse.Namespace) -> Any:
    """Load the configuration alone, for a command that needs no model."""
    if arguments.config:
        return load_config(arguments.config, arguments.overrides)
    if is_exported(arguments):
        return exported_config(read_metadata(arguments.checkpoint), arguments.overrides)
    workdir = workdir_of(arguments)
    if (workdir / "config.json").is_file():
        return load_config(workdir / "config.json", arguments.overrides)
    path = getattr(arguments, "checkpoint", None) or workdir
    return load_config(stored_meta(path)["config"], arguments.overrides)
