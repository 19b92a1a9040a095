"""What a measurement ran on and took: device, versions, load, memory, what was compiled."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from sparseinst_jax.cli.measuring import timing
from sparseinst_jax.cli.measuring.timing import MIB, Clock, Repeats, Workload
from sparseinst_jax.runtime import process

_VERSIONS = ("jax", "jaxlib", "flax", "numpy", "scipy", "pillow", "pycocotools")
_THREADS = ("NPROC", "PJRT_NPROC", "XLA_FLAGS")
_CACHE_EVERYTHING = {
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


def describe() -> dict[str, Any]:
    """Say what measurements are taken on, as plain values; starts JAX.

    `load_1_5_15` are the processes that want a core, averaged over 1, 5 and 15 minutes: much above
    zero at the start, other work disturbs what is measured.
    """
    device = jax.local_devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "num_devices": jax.local_device_count(),
        "processor": process.processor(),
        "num_cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": {name: os.environ.get(name) for name in _THREADS},
        "load_1_5_15": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": {name: process.version(name) for name in _VERSIONS},
    }


def command() -> str:
    """Return this process's command line for a reader: of every path outside only the name."""
    path, *words = Path(sys.argv[0]), *sys.argv[1:]
    shown = ["sparseinst"]  # the installed program, or `python -c`
    if path.suffix == ".py":
        shown = ["python", f"{path.parent.name}/{path.name}".lstrip("/")]
    return shlex.join([*shown, *(re.sub(r"(^|=)/\S*/", r"\1", word) for word in words)])


def measure(
    name: str,
    workload: Workload,
    repeats: Repeats,
    report: Callable[[str], None],
    clock: Clock = time.perf_counter,
    with_compile_times: bool = True,
) -> dict[str, Any]:
    """Measure a workload; returns plain values, times in milliseconds."""
    try:
        report(f"{name}: compiling")
        found = first_calls(workload.run, clock) if with_compile_times else {}
        report(f"{name}: {repeats.warmup} runs to warm up, {repeats.iterations} to be timed")
        found["peak_is_of_this_part"] = timing.forget_peak()
        samples = timing.timed(workload, repeats, clock)
        # Before `compiled` compiles again, which takes memory of its own.
        found["peak_process_mib"] = timing.peak_process_mib()
        row = result(name, workload, samples)
        return {**row, **found, "warmup": repeats.warmup, **workload.details()}
    finally:
        workload.close()


def result(name: str, workload: Workload, samples: list[float]) -> dict[str, Any]:
    """Return what timings of a workload say, and the memory of the device, as plain values."""
    found = timing.summary(samples)
    return {
        "name": name,
        **found,
        "iterations": len(samples),
        "images": workload.images,
        "images_per_s": 1e3 * workload.images / found["p50_ms"],
        "peak_device_mib": peak_device_mib(),
        "xla": {key: compiled_memory(one) for key, one in workload.compiled().items()},
        **workload.facts,
    }


def peak_device_mib() -> float | None:
    """Return the most memory that the first device has held, in MiB; None on a CPU.

    Never falls within a process, so that only the first part's peak is its own.
    """
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return None if peak is None else peak / MIB


def compiled_memory(executable: Any) -> dict[str, float]:
    """Return what XLA plans for a compiled function, in MiB: arguments, results, temporaries."""
    analysis = executable.memory_analysis()
    if analysis is None:  # a backend without this analysis
        return {}
    return {
        "arguments_mib": analysis.argument_size_in_bytes / MIB,
        "results_mib": analysis.output_size_in_bytes / MIB,
        "temporary_mib": analysis.temp_size_in_bytes / MIB,
    }


@contextlib.contextmanager
def watched() -> Iterator[list[float]]:
    """Collect, while open, the seconds of each compilation of this process.

    A program from the persistent cache counts too; tracing and lowering are not in the time.
    """
    found: list[float] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == process.COMPILED:
            found.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def first_calls(run: Callable[[], Any], clock: Clock) -> dict[str, Any]:
    """Call a function twice as if for the first time: nothing compiled, then all in the cache.

    Args:
      run: works to the end; what it has compiled before is forgotten.
      clock: seconds.

    Returns:
      Seconds of both calls (tracing, compiling and running), seconds of compilation alone in
      both, and the number of programs.
    """
    found: dict[str, Any] = {}
    names = (*_CACHE_EVERYTHING, "jax_compilation_cache_dir")
    before = {name: getattr(jax.config, name) for name in names}
    with tempfile.TemporaryDirectory(prefix="compilation-cache-") as folder:
        try:
            _configure({**_CACHE_EVERYTHING, "jax_compilation_cache_dir": folder})
            for name in ("cold", "cached"):
                jax.clear_caches()
                with watched() as compilations:
                    start = clock()
                    run()
                    found[f"first_call_{name}_s"] = clock() - start
                found[f"compile_{name}_s"] = sum(compilations)
                found["num_programs"] = len(compilations)
        finally:
            _configure(before)
    return found


def _configure(settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # opened at the first compilation, it would keep its folder
