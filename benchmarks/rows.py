"""Rows of measurements: how one is timed, kept and shown, and what follows from all of them.

A row is one line of JSON, on the disk as soon as it is measured; a line that was cut off in the
middle is no row. Rows belong to a device and to versions: those of others stay in the file and
count for nothing. Shared by gpu.py, compare_torch.py, the processes they start, and tables.py;
needs neither JAX nor PyTorch, only NumPy.
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
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

# By its folder: the package's own imports are not there where PyTorch is.
sys.path.append(str(Path(__file__).resolve().parents[1] / "sparseinst_jax" / "cli" / "measuring"))
import timing

TRIES = 2  # of a row that fails
NO_DEVICE = 3  # exit code of a process that finds no accelerator
CLOCKS = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
MIB = 2**20
COCO_IMAGES = 117_266  # of train2017 with an object
MODES = ("eager", "compiled", "graphs", "bf16")
# Named tensors of the network: the module that ends in each, and the tensor that it begins with.
STAGES = {
    "stem": ("backbone/stem", ""),
    "res2": ("backbone/res2", "stem"),
    "res3": ("backbone/res3", "res2"),
    "res4": ("backbone/res4", "res3"),
    "res5": ("backbone/res5", "res4"),
    "encoder": ("encoder", "res5"),
    "inst_convs": ("decoder/inst_branch/inst_convs", "encoder"),
    "iam": ("decoder/inst_branch/iam_conv", "inst_convs"),
    "instance_features": ("decoder/inst_branch/fc", "iam"),
    "mask_features": ("decoder/mask_branch", "encoder"),
}
_TIMES = "{}: times as fast as torch/compiled"
_SHARE = "{}: share of the product's rate"
AIMS = (  # figure, whether the limit is the least that is wanted, limit
    (_TIMES.format("training/8"), True, 1.5),
    (_TIMES.format("training/32"), True, 1.5),
    (_TIMES.format("network/1"), True, 2.0),
    (_TIMES.format("with_masks/1"), True, 2.0),
    (_TIMES.format("network/64"), True, 1.5),
    (_SHARE.format("network/64"), True, 0.3),
    (_SHARE.format("training/32"), True, 0.3),
    ("deformable_res4/grad: times its dense twin", False, 2.0),
    ("deformable_res5/grad: times its dense twin", False, 2.0),
)
COLUMNS = {  # digits after the point
    **{"p50_ms": ("p50 ms", 3), "queued_ms": ("queued ms", 3), "resident_ms": ("resident ms", 3)},
    **{"images_per_s": ("images/s", 1), "tflops": ("TFLOP/s", 1), "peak_mib": ("MiB", 0)},
    "first_s": ("first s", 1),
}

PARENT, PLACES = "MEASURING_PARENT", "MEASURING_PATH"
if parent := os.environ.pop(PARENT, ""):
    # Be killed when the parent ends (Linux), in whatever way and however early: frees the device.
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if parent != str(os.getppid()):
        raise SystemExit("the process that started this one has ended")

Row = dict[str, Any]

# The folders of PYTHONPATH come after Python's own modules: a stray profile.py in one of them would
# hide the module of that name, which torch.compile imports, there and in the processes it starts.
_START = f"""
import os, runpy, sys
added = [path for path in os.environ.pop("{PLACES}").split(os.pathsep) if path]
installed = [n for n, path in enumerate(sys.path) if path.endswith("-packages")]
first = min(installed, default=len(sys.path))
sys.path[first:first] = added
sys.argv = sys.argv[1:]
is_file = sys.argv[0].endswith(".py")
runpy.run_path(sys.argv[0], run_name="__main__") if is_file else exec(sys.argv[0])
"""


def command(python: str, script: str, *words: str) -> list[str]:
    """Return the command line of a script, a file or code, that imports this package and folder."""
    return [python, "-c", _START, script, *words]


def environment(**more: str) -> dict[str, str]:
    """Return the environment of such a process; it ends with this one."""
    here = Path(__file__).resolve().parent
    places = [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    own = {PLACES: os.pathsep.join(places), PARENT: str(os.getpid()), "PYTHONSAFEPATH": "1"}
    given = {**os.environ, **more, **own}
    given.pop("PYTHONPATH", None)
    return given


# The file of rows.


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
    return f"{row['name']:<36} {row['p50_ms']:9.3f} ms, first {row.get('first_s', 0):.1f} s"


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


# What a process that measures does.


def measure(workload: timing.Workload, clock: timing.Clock = time.perf_counter, **how: Any) -> Row:
    """Time a piece of work; `how` is of `timing.Repeats`, by itself for 8 seconds.

    Returns:
      Milliseconds of one launch, and `first_s`: the first call, which compiles.
    """
    start = clock()
    workload.run()
    first = clock() - start
    samples = timing.timed(workload, timing.Repeats(**{"seconds": 8.0, **how}), clock)
    return {**timing.summary(samples), "iterations": len(samples), "first_s": first}


def arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line of a process that measures rows, started by gpu.py."""
    add = parser.add_argument
    add("--rows", nargs="+", required=True, metavar="NAME")
    add("--output", type=Path)
    add("--stamp", type=json.loads, default={}, help="device and versions, as JSON")
    add("--seconds", type=float, default=float("inf"), help="no new row after so many")
    add("--dry-run", action="store_true")
    return parser.parse_args()


def run(given: argparse.Namespace, make: Callable[[str], Row]) -> None:
    """Measure the rows one after the other; one that fails is reported and leaves the others."""
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


# What follows from the rows; what was not measured is left out.


def figures(rows: Sequence[Row]) -> dict[str, float]:
    """Compute what no row says alone: ratios, shares of the machine's rate, stages."""
    good = {name: row for name, row in best(rows).items() if "fault" not in row}
    rate = max((r["tflops"] for n, r in good.items() if n.startswith("rates/product")), default=0)
    found: dict[str, float] = {}
    for name, row in good.items():
        for mode in MODES:
            if theirs := good.get(f"torch/{mode}/{name.removesuffix('/cached')}"):
                found |= _against(f"{{}}: times {{}} torch/{mode}", name, row, theirs)
        work, _, rest = name.partition("/")
        if rate and work in ("network", "training", "with_masks") and row.get("gflop"):
            least = min(row[key] for key in ("p50_ms", "queued_ms", "resident_ms") if key in row)
            found[_SHARE.format(name)] = row["gflop"] / least / rate
        if work == "training" and "parts" in row:
            found[f"{name}: minutes for an epoch of COCO"] = COCO_IMAGES / row["images_per_s"] / 60
            waited = row["parts"]["matching_ms"] + row["parts"]["score_to_host_ms"]
            found[f"{name}: share of the step in host matching"] = waited / row["p50_ms"]
        if work == "matching" and (none := good.get(f"matching/none/{name.rpartition('/')[2]}")):
            found[f"{name}: share beyond none"] = 1 - none["p50_ms"] / row["p50_ms"]
        if work == "stage":
            batch, stage, way = rest.split("/")
            before = good.get(f"stage/{batch}/{STAGES[stage][1]}/{way}", {"p50_ms": 0.0})
            own = row["p50_ms"] - before["p50_ms"]
            found[f"{name}: own ms"] = own
            if rate and own > 0:
                found[_SHARE.format(name)] = row["own_gflop"] / own / rate
        if "/deformable/" in name and (twin := good.get(name.replace("/deformable/", "/dense/"))):
            label = rest.replace("/deformable/", "/")
            found[f"{label}: times its dense twin"] = row["p50_ms"] / twin["p50_ms"]
    return found


def _against(form: str, name: str, row: Row, theirs: Row) -> dict[str, float]:
    """Compare a row of ours with PyTorch's; that of a cached program is for its memory."""
    is_cached = name.endswith("/cached")
    memory = "steady_peak_mib" if is_cached else "peak_mib"
    found = {}
    for key in () if is_cached else ("p50_ms", "queued_ms", "resident_ms"):
        if key in row and key in theirs:
            label = name if key == "p50_ms" else f"{name}, {key[:-3]}"
            found[form.format(label, "as fast as")] = theirs[key] / row[key]
    if row.get("peak_mib") and theirs.get(memory):
        found[form.format(name, "the memory of")] = row["peak_mib"] / theirs[memory]
    return found


def table(heading: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Lay out cells as Markdown."""
    rule = "|".join(["---"] * len(heading))
    first, *others = (f"| {' | '.join(cells)} |" for cells in (heading, *lines))
    return "\n".join([first, f"|{rule}|", *others])


def number(row: Mapping[str, Any], key: str, digits: int) -> str:
    """A cell; empty where there is no value."""
    value = row.get(key)
    return "" if value is None else f"{value:.{digits}f}"


def tables(rows: Sequence[Row]) -> str:
    """The aims and the rows, as Markdown."""
    found, aims = figures(rows), []
    for figure, is_least, limit in AIMS:
        value, verdict = found.get(figure), "not measured"
        if value is not None:
            is_met = value >= limit if is_least else value <= limit
            verdict = "met" if is_met else "**missed**"
        shown = "" if value is None else f"{value:.3g}"
        aims.append([figure, shown, f"{'≥' if is_least else '≤'} {limit:g}", verdict])
    cells = [
        [row["name"], *(number(row, key, digits) for key, (_, digits) in COLUMNS.items())]
        if "fault" not in row
        else [row["name"], "failed", *[""] * (len(COLUMNS) - 1)]
        for row in best(rows).values()
    ]
    heading = ["", *(title for title, _ in COLUMNS.values())]
    return f"{table(['aim', 'value', 'limit', ''], aims)}\n\n{table(heading, cells)}"
