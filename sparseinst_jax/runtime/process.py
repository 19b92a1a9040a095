"""Set the process up for JAX: CPU threads, compilation cache, what glibc keeps of freed memory.

The command line does this automatically. Nothing else in this package changes the process around
it: a server or notebook calls `prepare_process`, or leaves everything as it is.
"""

import contextlib
import ctypes
import functools
import gc
import importlib.metadata
import logging
import os
import platform
import re
import sys
import traceback
from pathlib import Path

from sparseinst_jax.runtime import hosts
from sparseinst_jax.runtime.files import cache_folder
from sparseinst_jax.runtime.pages import page

# With as many CPU threads as cores, two cores can hang on collectives that wait for one another.
# Each thread takes memory of its own, so that a single device gets one for each core.
_THREADS_FOR_COLLECTIVES = 32
_ARENA_MAX = -8  # `M_ARENA_MAX` of glibc's malloc.h
_MMAP_THRESHOLD = -3  # `M_MMAP_THRESHOLD` of glibc's malloc.h
_TRIM_THRESHOLD = -1  # `M_TRIM_THRESHOLD` of glibc's malloc.h
_LARGE = 2**20  # bytes; most activations are larger
# Objects, and collections of younger ones, until the next: tracing makes millions that stay and few
# cycles, so that Python's 700 costs a tenth of a start.
_COLLECT_AFTER = (50_000, 20, 20)
COMPILED = "/jax/core/compile/backend_compile_duration"  # how JAX names the event


def version(package: str = "sparseinst_jax") -> str:
    """Return the version of an installed package, `not installed` where it runs from a clone."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """Return the name of the machine's processor."""
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        if model := re.search(r"^model name\s*: (.*)$", text, re.MULTILINE):
            return model[1]
    return platform.processor() or platform.machine()


def prepare_process(*, for_training: bool = False) -> None:
    """Set the process up as the command line does: for servers, notebooks and scripts.

    Call it before anything else imports JAX, which reads the number of its threads then. It sets
    what `set_environment` says and, on Linux, has glibc give back what XLA's compiler has freed
    (`trim_after_compiling`). Without it everything works, but perhaps with one thread, compiled
    again in each process, and with more memory. Calling it twice changes nothing.

    Args:
      for_training: also give large blocks back as soon as they are freed, see
        `unmap_freed_blocks`: less memory in training, more time in inference.
    """
    set_environment()
    trim_after_compiling()
    if for_training:
        unmap_freed_blocks()


def set_environment() -> None:
    """Set CPU threads, compilation cache, heaps and how often garbage is collected.

    Values that the user has set in the environment stay (`PJRT_NPROC`, `NPROC`,
    `JAX_COMPILATION_CACHE_DIR`, `JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS`,
    `MALLOC_ARENA_MAX`, `GLIBC_TUNABLES`). The cache lies in
    `~/.cache/sparseinst_jax/xla`, so that the second run of a command starts in seconds. It takes
    every program, not only those that compile for a second (JAX's rule): an evaluation of many
    sizes has dozens of small ones. Where there is no home to write in, nothing is kept.
    """
    gc.set_threshold(*_COLLECT_AFTER)
    os.environ.setdefault("PJRT_NPROC", str(_num_threads()))
    threads = os.environ.setdefault("NPROC", os.environ["PJRT_NPROC"])
    _share_heaps(threads)
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or cache_folder("xla")
    if cache is not None:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    shortest = os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    if "jax" in sys.modules:  # JAX read the environment when it was imported
        import jax

        jax.config.update("jax_compilation_cache_dir", cache and str(cache))
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
    """Make threads share a few heaps: glibc gives each its own, which keeps what it frees.

    With 32 threads inference held 1.2 GiB, with two heaps 0.9. More threads than cores need more
    heaps than there would be for the cores: a thread that sleeps on its turn keeps the lock.
    """
    cores = os.cpu_count() or 1
    heaps = cores if threads != str(cores) else cores // 2
    _set_malloc(_ARENA_MAX, max(1, heaps), "MALLOC_ARENA_MAX", "malloc.arena_max")


def unmap_freed_blocks() -> None:
    """Make glibc return large blocks to the system as soon as they are freed, for training.

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
def trim_after_compiling() -> None:
    """Make glibc return what XLA's compiler has freed, each time after it has run.

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


_GPU = re.compile(r"CUDA|DNN|ptxas|PTX|NCCL|HSA|ROCm")  # in what XLA says of a GPU it cannot use
_GPU_CURE = (
    "run `sparseinst doctor`, which names the cause; compare `nvidia-smi` with the table in the "
    'docs, install the parts for that driver, such as pip install -U "sparseinst_jax[cuda13]", or '
    f"set JAX_PLATFORMS=cpu to do without the GPU {page('gpu-not-seen')}"
)


def explain_jax_error(error: BaseException) -> str | None:
    """Say what kept JAX from starting or filled the memory, and the cure; None for other errors."""
    reason = (str(error).splitlines() or [""])[0].partition(" (set JAX_PLATFORMS")[0].rstrip(".")
    reason = reason or "no such device was found"
    kinds = RuntimeError | AssertionError | ImportError
    if isinstance(error, kinds) and not _has_jax_started() and _is_of_jax(error):
        asked = os.environ.get("JAX_PLATFORMS")
        if "jaxlib" in reason:
            cure = "install parts that belong together, such as pip install -U jax jaxlib"
        else:
            cure = f"unset JAX_PLATFORMS={asked}, or {_GPU_CURE}" if asked else _GPU_CURE
        return f"JAX cannot start: {reason}. Cure: {cure}"
    is_of_xla = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
    if isinstance(error, MemoryError) or (is_of_xla and "RESOURCE_EXHAUSTED" in reason):
        place = "device" if is_of_xla else "machine"
        return (
            f"the memory of the {place} is full ({reason}). Cure: in training "
            "--config.train.micro_batches=2 (or 4; the same result in parts), smaller images "
            "(--config.data.train_sizes) or --config.model.dtype=bfloat16; otherwise "
            "--config.eval.batch_size=1; and end other programs that use the memory "
            + page("memory")
        )
    if is_of_xla and _GPU.search(reason):
        return f"the GPU cannot be used: {reason}. Cure: {_GPU_CURE}"
    return None


def _is_of_jax(error: BaseException) -> bool:
    """Whether JAX raised an error; it takes its own frames out of most tracebacks, with a note."""
    frames = traceback.extract_tb(error.__traceback__)
    is_within = bool(frames) and re.search(r"[/\\]jax(lib)?[/\\]", frames[-1].filename)
    notes = [*getattr(error, "__notes__", ()), type(error.__cause__).__name__]
    return bool(is_within) or any(
        "JAX has removed" in note or note == "UnfilteredStackTrace" for note in notes
    )


def _has_jax_started() -> bool:
    bridge = sys.modules.get("jax._src.xla_bridge")
    return getattr(bridge, "backends_are_initialized", lambda: False)()


def shorten_plugin_errors() -> None:
    """Let JAX log in one line, not as a traceback, that the plugin of a GPU cannot be used."""

    def shorten(record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] is not None:
            reason = (str(record.exc_info[1]).splitlines() or [""])[0].rstrip(".")
            record.msg, record.args, record.exc_info = (
                f"JAX goes on without a plugin, which says: {reason}. Cure: {_GPU_CURE}",
                None,
                None,
            )
        return True

    logging.getLogger("jax._src.xla_bridge").addFilter(shorten)


def refuse_forked() -> None:
    """Refuse to compute in a process that was forked after JAX had started: it would hang.

    Raises:
        ValueError: it was, while this module was imported.
    """
    if _forked:
        raise ValueError(
            f"process {os.getpid()} was forked from one in which JAX had started, and would hang: "
            "JAX's threads do not survive a fork. Start processes by multiprocessing's \"spawn\" "
            '(multiprocessing.get_context("spawn"), of PyTorch\'s loaders multiprocessing_context='
            '"spawn"), or before anything is loaded, and load in each of them'
        )


_forked: list[bool] = []


def _note_fork() -> None:
    if _has_jax_started():
        _forked.append(True)


os.register_at_fork(after_in_child=_note_fork)


def _set_malloc(option: int, value: int, variable: str, tunable: str) -> None:
    """Call glibc's `mallopt` unless the user has set the same option."""
    if variable in os.environ or tunable in os.environ.get("GLIBC_TUNABLES", ""):
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc: has no `mallopt`
        ctypes.CDLL(None).mallopt(option, value)
