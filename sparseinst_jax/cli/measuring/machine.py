"""What a measurement ran on: device, versions, threads, load; and the memory that it took."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import jax

MIB = 2**20
VERSIONS = ("jax", "jaxlib", "flax", "numpy", "scipy", "pillow", "pycocotools")
_THREADS = ("NPROC", "PJRT_NPROC", "XLA_FLAGS")


def describe() -> dict[str, Any]:
    """Say what measurements are taken on, as plain values; starts JAX.

    `load_1_5_15` are the processes that want a core, averaged over so many minutes: much above
    zero at the start, other work disturbs what is measured.
    """
    device = jax.local_devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "num_devices": jax.local_device_count(),
        "processor": _processor(),
        "num_cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": {name: os.environ.get(name) for name in _THREADS},
        "load_1_5_15": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in VERSIONS},
    }


def command() -> str:
    """Return this process's command line for a reader: of every path outside only the name."""
    program, *words = sys.argv
    path = Path(program)
    if path.suffix == ".py":
        shown = f"python {path.parent.name}/{path.name}".replace(" /", " ")
    else:
        shown = "sparseinst"  # the installed program, or `python -c`
    return shlex.join([*shown.split(), *(re.sub(r"(^|=)/\S*/", r"\1", word) for word in words)])


def _version(name: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def forget_peak() -> bool:
    """Start the process's peak memory anew; False where the system cannot, as outside Linux."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def peak_process_mib() -> float | None:
    """Return the most memory that this process has held in RAM, in MiB; None if unknown."""
    with contextlib.suppress(OSError, StopIteration, IndexError, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        line = next(line for line in lines if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    with contextlib.suppress(ImportError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (MIB if platform.system() == "Darwin" else 1024)
    return None


def peak_device_mib() -> float | None:
    """Return the most memory that the first device has held, in MiB; None on a CPU.

    Never falls within a process, so that only the first part's peak is its own.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
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


def compiled_gflops(executable: Any) -> float | None:
    """Return XLA's count of floating point operations in billions; None where it has none."""
    cost = executable.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    flops = (cost or {}).get("flops")
    return None if flops is None else flops / 1e9
