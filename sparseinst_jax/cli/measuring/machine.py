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
_VERSIONS = ("jax", "jaxlib", "flax", "numpy", "scipy", "pillow", "pycocotools")
_THREADS = ("NPROC", "PJRT_NPROC", "XLA_FLAGS")


def describe() -> dict[str, Any]:
    """Say what measurements are taken on, as plain values; starts JAX.

    `load_1_5_15` are the processes that want a core, averaged over 1, 5 and 15 minutes: much above
    zero at the start, other work disturbs what is measured.
    """
    device = jax.local_devices()[0]
    versions: dict[str, str | None] = dict.fromkeys(_VERSIONS)
    for name in _VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    model = re.search(r"^model name\s*: (.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "num_devices": jax.local_device_count(),
        "processor": model[1] if model else platform.processor() or platform.machine(),
        "num_cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": {name: os.environ.get(name) for name in _THREADS},
        "load_1_5_15": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": versions,
    }


def command() -> str:
    """Return this process's command line for a reader: of every path outside only the name."""
    path, *words = Path(sys.argv[0]), *sys.argv[1:]
    shown = ["sparseinst"]  # the installed program, or `python -c`
    if path.suffix == ".py":
        shown = ["python", f"{path.parent.name}/{path.name}".lstrip("/")]
    return shlex.join([*shown, *(re.sub(r"(^|=)/\S*/", r"\1", word) for word in words)])


def forget_peak() -> bool:
    """Reset the process's peak memory; False where the system cannot, as outside Linux."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def peak_process_mib() -> float | None:
    """Return the most memory that this process has held in RAM, in MiB; None if unknown."""
    if peak := re.search(r"^VmHWM:\s*(\d+)", _read("/proc/self/status"), re.MULTILINE):
        return int(peak[1]) / 1024
    with contextlib.suppress(ImportError):
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most / (MIB if platform.system() == "Darwin" else 1024)
    return None


def _read(path: str) -> str:
    """The text of a file of the system; "" where it has none."""
    with contextlib.suppress(OSError):
        return Path(path).read_text()
    return ""


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


def compiled_gflops(executable: Any) -> float | None:
    """Return XLA's count of floating point operations in billions; None where it has none."""
    cost = executable.cost_analysis()
    flops = ((cost[0] if isinstance(cost, list) else cost) or {}).get("flops")
    return None if flops is None else flops / 1e9
