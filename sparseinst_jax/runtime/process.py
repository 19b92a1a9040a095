"""Prepare the process before JAX starts, and run a command so that its errors read well.

Exit codes of every command: 0 done, 1 an error with one message (or a loss that is not finite), 2
wrong usage, 75 another host of the job was lost, 130 and 143 ended by SIGINT and SIGTERM (training
saves first; a second signal ends it at once). See docs/faults.md.
"""

import contextlib
import ctypes
import errno
import functools
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from sparseinst_jax.runtime import hosts
from sparseinst_jax.runtime.messages import printable
from sparseinst_jax.runtime.watch import DONE, LOST_HOST

# With as many CPU threads as cores, two cores can hang on collectives that wait for one another.
# Each thread takes memory of its own, so that a single device gets one for each core.
_THREADS_FOR_COLLECTIVES = 32
_ARENA_MAX = -8  # `M_ARENA_MAX` of glibc's malloc.h
_MMAP_THRESHOLD = -3  # `M_MMAP_THRESHOLD` of glibc's malloc.h
_TRIM_THRESHOLD = -1  # `M_TRIM_THRESHOLD` of glibc's malloc.h
_LARGE = 2**20  # bytes; most activations are larger
COMPILED = "/jax/core/compile/backend_compile_duration"  # how JAX names the event
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
    """Set what must be set before JAX starts: CPU threads, compilation cache, heaps.

    Values that the user has set in the environment stay (`PJRT_NPROC`, `NPROC`,
    `JAX_COMPILATION_CACHE_DIR`, `JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS`,
    `MALLOC_ARENA_MAX`, `GLIBC_TUNABLES`). The cache lies in
    `~/.cache/sparseinst_jax/xla`, so that the second run of a command starts in seconds. It takes
    every program, not only those that compile for a second (JAX's rule): an evaluation of many
    sizes has dozens of small ones. Calling it twice changes nothing.
    """
    os.environ.setdefault("PJRT_NPROC", str(_num_threads()))
    threads = os.environ.setdefault("NPROC", os.environ["PJRT_NPROC"])
    _share_heaps(threads)
    cache = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_default_cache()))
    shortest = os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    if "jax" in sys.modules:  # JAX read the environment when it was imported
        import jax

        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", float(shortest))


def _num_threads() -> int:
    """Choose the number of CPU threads: without a number, JAX may compute with a single one."""
    cores = max(2, os.cpu_count() or 1)
    has_devices = "JAX_NUM_CPU_DEVICES" in os.environ
    has_devices |= "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if has_devices or "--distributed" in sys.argv or hosts.may_be_one_of_several():
        return max(_THREADS_FOR_COLLECTIVES, cores)
    return cores


def _share_heaps(threads: str) -> None:
    """Have threads take memory from few heaps: glibc gives each its own, which keeps what it frees.

    With 32 threads inference held 1.2 GiB, with two heaps 0.9. More threads than cores need more
    heaps than there would be for the cores: a thread that sleeps on its turn keeps the lock.
    """
    cores = os.cpu_count() or 1
    heaps = cores if threads != str(cores) else cores // 2
    _set_malloc(_ARENA_MAX, max(1, heaps), "MALLOC_ARENA_MAX", "malloc.arena_max")


def return_freed_memory() -> None:
    """Have glibc give large blocks back to the system as soon as they are freed, for training.

    XLA:CPU takes every array from `malloc`. By itself glibc takes blocks of up to 32 MiB, once such
    were freed, from heaps that each belong to some threads. They come back full of holes, and grow
    with every step: a training step that holds 2 GiB came to occupy 7 GiB. With a fixed threshold
    every block above it is mapped and unmapped alone. Not for inference: there it saves little, and
    mapping takes a tenth of the time of an image and two thirds of that of its masks.

    Smaller blocks stay in heaps, one for each core, whose ends are kept: with a fixed threshold
    glibc would give back and fetch them again all the time. In a process that has compiled, whose
    heaps are full of holes, a small network would then take twice as long. Other C libraries stay
    as they are, and so does what the user has set (`MALLOC_MMAP_THRESHOLD_`,
    `MALLOC_TRIM_THRESHOLD_`, `MALLOC_ARENA_MAX`, `GLIBC_TUNABLES`).
    """
    _set_malloc(_MMAP_THRESHOLD, _LARGE, "MALLOC_MMAP_THRESHOLD_", "malloc.mmap_threshold")
    _set_malloc(_TRIM_THRESHOLD, 128 * _LARGE, "MALLOC_TRIM_THRESHOLD_", "malloc.trim_threshold")
    _set_malloc(_ARENA_MAX, os.cpu_count() or 1, "MALLOC_ARENA_MAX", "malloc.arena_max")


@functools.cache
def return_memory_of_compiling() -> None:
    """Have glibc give back what XLA's compiler has freed, each time that it has run.

    Otherwise it stays in the heaps: 200 MiB after the first photo of an empty compilation cache.
    Other C libraries stay as they are.
    """
    import jax

    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc
        return

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILED:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(listen)


def _set_malloc(option: int, value: int, variable: str, tunable: str) -> None:
    """Call glibc's `mallopt` unless the user has set the same option."""
    if variable in os.environ or tunable in os.environ.get("GLIBC_TUNABLES", ""):
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc: has no `mallopt`
        ctypes.CDLL(None).mallopt(option, value)


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
    return bool(frames) and Path(frames[-1].filename).is_relative_to(Path(__file__).parents[1])
