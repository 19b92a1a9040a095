"""`sparseinst train|eval|predict|...`: every command, and what its errors and exit codes are.

`python -m sparseinst_jax` is the same.

Exit codes: 0 done, 1 an error with one message (or a loss that is not finite), 2 wrong usage, 73
another process trains in the folder, 75 another host of the job was lost, 129, 130 and 143 ended by
SIGHUP, SIGINT and SIGTERM (training saves first; a second signal ends it at once). See
docs/faults.md.
"""

import argparse
import difflib
import errno
import gc
import importlib
import logging
import os
import platform
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparseinst_jax.runtime import hosts, process
from sparseinst_jax.runtime.host_watch import DONE, LOST_HOST
from sparseinst_jax.runtime.messages import printable
from sparseinst_jax.runtime.output import guard_output
from sparseinst_jax.runtime.pages import PAGES, where

_COMMANDS = {
    "start": "from a folder of labelled photos to a trained network, asked once",
    "train": "train on COCO-format data, or continue a run",
    "eval": "COCO mask AP of a run, a checkpoint, weights or a results file",
    "predict": "masks, labels and scores of images",
    "check-data": "what a data set holds, what is wrong with it, what will be lost",
    "debug-batch": "draw any batch of a training run and say what is in it",
    "import-data": "YOLO, LabelMe and VIA labels and mask images to a COCO json",
    "build-tfds": "a COCO folder to a few large files that TFDS reads",
    "convert": "weights of other implementations to a checkpoint, and back",
    "download": "published weights by name",
    "export": "one file that onnxruntime, OpenVINO and browsers run, verified",
    "zoo": "every published model: AP, sizes, where the weights are",
    "benchmark": "speed and memory: inference, training, input, scoring",
    "summary": "parameters, operations and memory of a network, part by part",
    "doctor": "what this machine has, whether it computes, and a cure for each fault",
}
# What the machine refuses, wherever it is met, and what to do about it.
_CURES = {
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
        "give another path, or change what is there",
    ),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space, or write to another disk"),
    errno.EFBIG: "raise the limit of the size of files (`ulimit -f`), or write to another disk",
    errno.EMFILE: "raise the limit of open files (`ulimit -n`)",
    errno.ENFILE: "close other programs, or raise the system's limit of open files",
    **dict.fromkeys((errno.EIO, errno.ESTALE), "look after the disk or the network drive"),
}
_INTERRUPTED = 130
_SECONDS_TO_END = 5.0  # after a failure: threads of libraries may wait for twenty minutes
_XLA_STATUS = re.compile(r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): ")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand with the arguments after its name.

    Args:
      argv: arguments without the program's name. None takes those of the process, which is the
        command's from then on: its output is guarded, and after a failure it ends soon.

    Returns:
      The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    lines = "\n".join(f"  {name:13}{text}" for name, text in _COMMANDS.items())
    usage = f"usage: sparseinst COMMAND ...\n\n{lines}\n\nsparseinst COMMAND --help says more."
    if arguments[:1] == ["help"] and arguments[1:] and arguments[1] in PAGES:
        print(where(arguments[1]))
        return 0
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:2], "--help"]
    name, *rest = arguments or [""]
    if name in _COMMANDS:
        return run(name, rest, is_process=argv is None)
    if argv is None:
        guard_output()
    if name in ("", "-h", "--help"):
        print(usage)
        return 0 if arguments else 2
    if name in ("-V", "--version", "version"):
        python = platform.python_version()
        print(f"sparseinst_jax {process.version()}, jax {process.version('jax')}, Python {python}")
        return 0
    close = difflib.get_close_matches(name, _COMMANDS, n=1)
    more = f": did you mean {close[0]}? `sparseinst help` lists all" if close else f"\n{usage}"
    print(f"error: unknown command {printable(repr(name))}{more}", file=sys.stderr)
    return 2


def run(
    command: str | Callable[[Sequence[str]], int | None],
    argv: Sequence[str] | None = None,
    *,
    is_process: bool = False,
) -> int:
    """Prepare the process, run a command and report its errors.

    A ValueError or FileNotFoundError raised by this package is a message to the user and is
    printed without a traceback (set `SPARSEINST_TRACEBACK=1` to see it), and so is what the machine
    refuses, such as to write on a full disk. Every other error is a fault of the program and passes
    with its traceback. One of several hosts reports it to the others and stops (see `hosts.leave`).

    Args:
      command: its name, or a function that takes the arguments and returns the exit code or None.
      argv: arguments after the name; None as in `main`. In each, `~` stands for the home folder.
      is_process: whether the process is the command's, as where argv is None.

    Returns:
      The exit code; 1 after a message to the user (or what the error asks for, such as 73), 130
      after an interruption (Ctrl-C), 75 after the loss of another host.
    """
    if argv is None:
        argv, is_process = sys.argv[1:], True
    if is_process:
        guard_output()
    function: Any = command
    code: Any = 1
    try:
        process.set_environment()
        process.shorten_plugin_errors()
        if isinstance(command, str):
            module = importlib.import_module(f"sparseinst_jax.cli.{command.replace('-', '_')}")
            function = module.main
        if "jax" in sys.modules:  # a few commands do without
            process.trim_after_compiling()
        logging.basicConfig(format="%(levelname)s: %(message)s")  # as in our own lines
        code = function([_at_home(word) for word in argv]) or 0
        hosts.report(DONE)
    except BaseException as error:
        reported = _report_error(error)
        if reported is None:
            code = error.code if isinstance(error, SystemExit) else 1
            raise
        code = reported
    finally:
        if is_process:
            gc.freeze()  # or Python goes through all that JAX made, for half a second, to no end
        if is_process and code:
            # What libraries leave unfinished says the same once more, in tracebacks.
            sys.unraisablehook = lambda _: None
            hosts.end_within(_SECONDS_TO_END, code if isinstance(code, int) else 1)
    return code


def command_parser(name: str, description: str, **options: Any) -> argparse.ArgumentParser:
    """Make the parser of a command; its description is shown as it is written."""
    options |= {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    return argparse.ArgumentParser(f"sparseinst {name}", description=description, **options)


def _at_home(word: str) -> str:
    """Expand `~/` where a shell does not: in `--workdir=~/runs`."""
    name, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    is_path = value == "~" or value.startswith("~/")
    return f"{name}{equals}{os.path.expanduser(value)}" if is_path else word


def _report_error(error: BaseException) -> int | None:
    """Print an error's message and return the exit code; None if it is to be raised, see `run`."""
    message = _message(error)
    if message is None or os.environ.get("SPARSEINST_TRACEBACK", "") not in ("", "0"):
        if hosts.are_joined() and not isinstance(error, SystemExit):
            traceback.print_exception(error)
            _leave_others(error)
        return None
    is_interruption = isinstance(error, KeyboardInterrupt)
    print(message if is_interruption else f"error: {printable(message)}", file=sys.stderr)
    code = _INTERRUPTED if is_interruption else getattr(error, "exit_code", 1)
    hosts.leave(message, code)
    return code


def _leave_others(error: BaseException) -> None:
    """Report an unexpected error to the other hosts, and stop."""
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    # A status of XLA is most likely that of a collective without its partner.
    if _XLA_STATUS.match(str(error)):
        print(
            "error: something that all hosts do together failed; probably another host ended, see"
            " its messages. The same command continues from the last checkpoint.",
            file=sys.stderr,
        )
        hosts.leave(text, LOST_HOST)
    hosts.leave(text, 1)


def _message(error: BaseException) -> str | None:
    """The message for the user; None where the error is a bug of the program."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, OSError) and error.errno in _CURES:
        place = f" at {error.filename}" if error.filename else ""
        return f"{error.strerror}{place}: {_CURES[error.errno]}"
    if isinstance(error, FileNotFoundError) and not _has_working_directory():
        return "the working directory was removed: change to one that exists, and start again"
    is_for_users = isinstance(error, (ValueError, FileNotFoundError))
    if is_for_users and _raised_here(error):
        return str(error)
    return process.explain_jax_error(error)


def _has_working_directory() -> bool:
    try:
        return bool(os.getcwd())
    except FileNotFoundError:
        return False


def _raised_here(error: BaseException) -> bool:
    """Whether the innermost frame is ours: libraries raise ValueError for our mistakes too."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(Path(__file__).parents[1])
