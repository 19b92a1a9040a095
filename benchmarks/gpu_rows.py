"""What gpu.py and its processes share: the file of rows, how a row is timed, the clocks.

A row is one line of JSON, appended and flushed to the disk as soon as it is measured; a line that
was cut off in the middle is no row. Rows belong to a device and to versions: those of another
device or of other versions stay in the file and count for nothing. Needs neither JAX nor PyTorch.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib.metadata
import json
import os
import signal
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

TRIES = 2  # of a row that fails
NO_DEVICE = 3  # exit code of a process that finds no accelerator
CLOCKS = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
MIB = 2**20
COLUMNS = {
    **{"queued_ms": "queued", "resident_ms": "resident", "images_per_s": "images/s"},
    **{"tflops": "TFLOP/s", "gb_per_s": "GB/s", "first_s": "first s", "peak_mib": "MiB"},
}

PARENT = "GPU_PY_PARENT"  # in a part's environment: who started it
if PARENT in os.environ:
    # Be killed when gpu.py ends (Linux), in whatever way and however early, to free the device.
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.environ[PARENT] != str(os.getppid()):
        raise SystemExit("gpu.py has ended")

Row = dict[str, Any]


def read(path: Path, stamp: Mapping[str, Any]) -> list[Row]:
    """Return a file's rows of this device and these versions; what is no whole line is left out."""
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and all(row.get(k) == v for k, v in stamp.items()):
                found.append(row)
    return found


def append(path: Path, row: Row) -> None:
    """Add a row, on the disk when this returns; a torn line before it is ended."""
    with path.open("ab+") as file:
        is_torn = file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n"
        file.write(b"\n" * is_torn + json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def best(rows: Sequence[Row]) -> dict[str, Row]:
    """Return one row for each name: the last that is no fault, else the last."""
    found: dict[str, Row] = {}
    for row in rows:
        if "fault" not in row or "fault" in found.get(row["name"], row):
            found[row["name"]] = row
    return found


def lacking(names: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """Return the names without a good row and with faults for fewer than `TRIES`."""
    good = {row["name"] for row in rows if "fault" not in row}
    faults = [row["name"] for row in rows if "fault" in row]
    return [name for name in names if name not in good and faults.count(name) < TRIES]


def line(row: Row) -> str:
    """One row for a terminal."""
    if "fault" in row:
        return f"{row['name']:<36} FAILED {row['fault'][:150]}"
    cells = [f"{name} {row[key]:.4g}" for key, name in COLUMNS.items() if row.get(key)]
    return f"{row['name']:<36} {row['p50_ms']:9.3f} ms  {', '.join(cells)}"


def query(what: str) -> str:
    """Ask nvidia-smi about the first GPU; "" where there is no answer."""
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader", "--id=0"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()
    return ""


def versions() -> dict[str, str]:
    """Return the versions of what is measured, as far as it is installed."""
    found = {}
    for name in ("jax", "jaxlib", "flax", "torch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def measure(
    launch: Callable[[], Any],
    wait: Callable[[Any], Any],
    *,
    warmups: int,
    iterations: int,
    queue: int = 1,
    seconds: float = 8.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Row:
    """Time a piece of work.

    Args:
      launch: hands the work to the device; need not wait for it.
      wait: takes what `launch` returned, and waits for all of it.
      warmups: runs after the first that are not counted.
      iterations: samples at most.
      queue: launches of a sample, with one wait after them.
      seconds: no more samples after so many, once there are three.
      clock: gives seconds.

    Returns:
      Milliseconds of one launch, and `first_s`: the first call, which compiles.
    """
    start = clock()
    wait(launch())
    first = clock() - start
    for _ in range(warmups):
        wait(launch())
    samples: list[float] = []
    end, result = clock() + seconds, None
    while len(samples) < iterations and (len(samples) < 3 or clock() < end):
        start = clock()
        for _ in range(queue):
            result = launch()
        wait(result)
        samples.append(1e3 * (clock() - start) / queue)
    p90 = sorted(samples)[min(len(samples) - 1, int(0.9 * len(samples)))]
    found = {"p50_ms": statistics.median(samples), "least_ms": min(samples), "p90_ms": p90}
    return found | {"iterations": len(samples), "first_s": first}


def arguments() -> argparse.Namespace:
    """The command line of a process that measures rows, started by gpu.py."""
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--rows", nargs="+", required=True, metavar="NAME")
    add("--output", type=Path, required=True)
    add("--stamp", type=json.loads, required=True, help="device and versions, as JSON")
    add("--seconds", type=float, default=float("inf"), help="no new row after so many")
    add("--dry-run", action="store_true")
    add("--yardstick")
    return parser.parse_args()


def run(given: argparse.Namespace, make: Callable[[str], Row]) -> None:
    """Measure the rows one after the other; one that fails is told and leaves the others."""
    end = time.monotonic() + given.seconds
    for name in given.rows:
        if time.monotonic() > end:
            return
        try:
            row = make(name)
        except Exception as error:  # of a backend: whatever it raises
            place = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {error}".replace("\n", " ")[:600]
            row = {"fault": f"{text} ({Path(place.filename).name}:{place.lineno})"}
        row = {"name": name, **given.stamp, **row, "clocks": query(CLOCKS)}
        row["xla_flags"] = os.environ.get("XLA_FLAGS", "")
        append(given.output, row)
        print(line(row), flush=True)
        gc.collect()
