"""What gpu.py and its processes share: the file of rows, how a row is timed, the clocks.

A row is one line of JSON, appended and flushed to the disk as soon as it is measured; a line that
was cut off in the middle is no row. Rows belong to a device and to versions: those of another
device or of other versions stay in the file and count for nothing. Needs neither JAX nor PyTorch.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

TRIES = 2  # of a row that fails, each in a call of its own
NO_DEVICE = 3  # exit code of a process that finds no accelerator
PACKAGES = ("jax", "jaxlib", "flax", "torch")
CLOCKS = "clocks.sm,clocks.mem,power.draw,temperature.gpu"

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """Return the rows of a file, [] where there is none; what is no whole line is left out."""
    found = []
    if path.exists():
        for line in path.read_bytes().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and "name" in row:
                found.append(row)
    return found


def append(path: Path, row: Row) -> None:
    """Add a row, on the disk when this returns; ends a torn line before it."""
    with path.open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            start = b"" if file.read() == b"\n" else b"\n"
        else:
            start = b""
        file.write(start + json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def own(rows: Sequence[Row], stamp: Mapping[str, Any]) -> list[Row]:
    """Return the rows of this device and these versions."""
    return [row for row in rows if all(row.get(key) == value for key, value in stamp.items())]


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


def query(what: str) -> str:
    """Ask nvidia-smi about the first GPU; "" where there is no answer."""
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def versions() -> dict[str, str]:
    """Return the versions of what is measured, of what is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
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
    ranked = sorted(samples)
    return {
        "p50_ms": statistics.median(samples),
        "least_ms": ranked[0],
        "p90_ms": ranked[min(len(ranked) - 1, int(0.9 * len(ranked)))],
        "iterations": len(samples),
        "first_s": first,
    }


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options of a process that measures rows."""
    made = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    add = made.add_argument
    add("--rows", nargs="+", required=True, metavar="NAME")
    add("--output", type=Path, required=True)
    add("--stamp", type=json.loads, required=True, help="device and versions, as JSON")
    add("--seconds", type=float, default=float("inf"), help="no new row after so many")
    add("--dry-run", action="store_true")
    add("--yardstick")
    return made


def run(arguments: argparse.Namespace, make: Callable[[str], Row]) -> None:
    """Measure the rows one after the other; one that fails is told and leaves the others."""
    end = time.monotonic() + arguments.seconds
    for name in arguments.rows:
        if time.monotonic() > end:
            break
        try:
            row = make(name)
        except Exception as error:  # of a backend: whatever it raises
            row = {"fault": f"{type(error).__name__}: {error}".replace("\n", " ")[:600]}
        row = {"name": name, **arguments.stamp, "clocks": query(CLOCKS), **row}
        row["xla_flags"] = os.environ.get("XLA_FLAGS", "")
        append(arguments.output, row)
        print(name, row.get("fault") or f"{row.get('p50_ms', 0):.3f} ms", flush=True)
        gc.collect()
    sys.stdout.flush()
