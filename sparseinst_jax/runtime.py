"""Prepare the process before JAX starts, and run a command so that its errors read well.

Exit codes of every command: 0 done, 1 an error with one message (or a loss that is not finite), 2
wrong usage, 75 another host of the job was lost, 130 and 143 ended by SIGINT and SIGTERM (training
saves first; a second signal ends it at once). See docs/faults.md.
"""

import contextlib
import ctypes
import errno
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from sparseinst_jax import hosts
from sparseinst_jax.texts import printable
from sparseinst_jax.watch import DONE, LOST_HOST

# With as many CPU threads as cores, two cores can hang on collectives that wait for one another,
# and some JAX versions compute with a single thread. More threads cost nothing measurable.
_MIN_CPU_THREADS = 32
_MMAP_THRESHOLD = -3  # `M_MMAP_THRESHOLD` of glibc's malloc.h
_LARGE = 2**20  # bytes; most activations are larger
# What the machine refuses, wherever it is met: permissions, a file in place of a folder, a full or
# read-only disk.
_REFUSALS = {
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ENOSPC, errno.EDQUOT),
}
_INTERRUPTED = 130
_XLA_STATUS = re.compile(r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): ")


def prepare() -> None:
    """Set what must be set before JAX starts: CPU threads, compilation cache, freed memory.

    Values that the user has set in the environment stay (`PJRT_NPROC`, `NPROC`,
    `JAX_COMPILATION_CACHE_DIR`, `JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS`,
    `MALLOC_MMAP_THRESHOLD_`, `GLIBC_TUNABLES`). The cache lies in
    `~/.cache/sparseinst_jax/xla`, so that the second run of a command starts in seconds. It takes
    every program, not only those that compile for a second (JAX's rule): an evaluation of many
    sizes has dozens of small ones. Calling it twice changes nothing.
    """
    _return_freed_memory()
    threads = str(max(_MIN_CPU_THREADS, os.cpu_count() or 1))
    os.environ.setdefault("PJRT_NPROC", threads)
    os.environ.setdefault("NPROC", threads)
    cache = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_default_cache()))
    shortest = os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    if "jax" in sys.modules:  # JAX read the environment when it was imported
        import jax

        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", float(shortest))


def _return_freed_memory() -> None:
    """Have glibc give large blocks back to the system as soon as they are freed.

    XLA:CPU takes every array from `malloc`. By itself glibc takes blocks of up to 32 MiB, once such
    were freed, from heaps that each belong to some threads. They come back full of holes, and grow
    with every step: a training step that holds 2 GiB came to occupy 7 GiB. With a fixed threshold
    every block above it is mapped and unmapped alone. Other C libraries stay as they are.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or "malloc.mmap_threshold" in tunables:
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc: has no `mallopt`
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE)


def call(main: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    """Run a command's main and return the exit code.

    A ValueError or FileNotFoundError raised by this package is a message to the user and is
    printed without a traceback (set `SPARSEINST_TRACEBACK=1` to see it), and so is what the machine
    refuses, such as to write on a full disk. Every other error is a fault of the program and passes
    with its traceback. One of several hosts tells the others and ends at once (see `hosts.leave`).

    Args:
      main: takes the arguments, returns the exit code or None for 0.
      argv: arguments without the program's name.

    Returns:
      The exit code; 1 after a message to the user, 130 after an interruption (Ctrl-C), 75 after
      the loss of another host.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s")  # for warnings, as in our own lines
    wants_traceback = os.environ.get("SPARSEINST_TRACEBACK", "") not in ("", "0")
    try:
        code = main(argv) or 0
        hosts.report(DONE)
        return code
    except (ValueError, OSError) as error:
        message = _message(error)
        if wants_traceback or message is None:
            _leave_others(error)
            raise
        print(f"error: {printable(message)}", file=sys.stderr)
        hosts.leave(message, 1)
        return 1
    except KeyboardInterrupt:
        if wants_traceback:
            raise
        print("interrupted", file=sys.stderr)
        hosts.leave("interrupted", _INTERRUPTED)
        return _INTERRUPTED
    except BaseException as error:
        _leave_others(error)
        raise


def _leave_others(error: BaseException) -> None:
    """On several hosts print the traceback and end; alone do nothing."""
    if isinstance(error, SystemExit) or not hosts.are_joined():
        return
    traceback.print_exception(error)
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


def _default_cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "sparseinst_jax" / "xla"


def _message(error: Exception) -> str | None:
    """What to tell the user; None where the error is a fault of the program."""
    if isinstance(error, OSError) and error.errno in _REFUSALS:
        return _refusal(error)
    is_for_users = isinstance(error, (ValueError, FileNotFoundError))
    return str(error) if is_for_users and _raised_here(error) else None


def _refusal(error: OSError) -> str:
    """Say what the machine refuses, in words and with the path."""
    place = f" at {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.strerror}{place}: free some space, or write to another disk"
    return f"{error.strerror}{place}: give another path, or change what is there"


def _raised_here(error: BaseException) -> bool:
    """Whether the innermost frame is ours: libraries raise ValueError for our mistakes too."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(Path(__file__).parent)
