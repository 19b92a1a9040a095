"""PyTorch's figures for gpu.py: many points in one process, one after the other.

    python benchmarks/gpu_torch.py --yardstick FILE --points network/1 training/8 --output FILE

Runs in an environment with torch and needs nothing of this package; what is measured is that of
torch_side.py. The JSON is written after every point; points that it holds already are kept, and one
that fails (no memory) is told in it and leaves the others. Memory is that of each point alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch_side

MIB = 2**20


def main() -> None:
    """Measure the points that the output lacks."""
    arguments = _arguments()
    path = Path(arguments.output)
    report: dict[str, Any] = {"results": []}
    if path.exists():
        report = json.loads(path.read_text())
    is_gpu = arguments.device != "cpu"
    report["torch"] = torch.__version__
    report["device"] = torch.cuda.get_device_name() if is_gpu else "cpu"
    there = {row["name"] for row in report["results"]}
    for point in arguments.points:
        name = f"{point}/{'compiled' if arguments.compile else 'eager'}"
        if name in there:
            continue
        try:
            row = measure(point, arguments)
        except Exception as error:  # torch raises whatever it likes
            row = {"fault": f"{type(error).__name__}: {error}".splitlines()[0]}
        report["results"].append({"name": name, **row})
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(name, row.get("fault") or f"{row['p50_ms']:.2f} ms", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--yardstick", required=True)
    add("--points", nargs="+", required=True, metavar="WORK/BATCH")
    add("--size", type=int, nargs=2, required=True, help="padded height, width")
    add("--valid-size", type=int, nargs=2, required=True)
    add("--photo-size", type=int, nargs=2, required=True)
    add("--objects", type=int, default=8)
    add("--device", default="cuda")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    add("--compile", action="store_true")
    add("--iterations", type=int, default=20)
    add("--seconds", type=float, default=8.0, help="timed runs of a point end after so many")
    add("--output", required=True)
    parser.set_defaults(groups=4, channels_last=True, threads=os.cpu_count(), weights=None)
    return parser.parse_args()


def measure(point: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one point: the median, and the device's memory."""
    work, _, batch = point.partition("/")
    is_gpu = arguments.device != "cpu"
    # Each point is compiled for its own size, and leaves nothing behind.
    torch._dynamo.reset()
    gc.collect()
    if is_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    given = {**vars(arguments), "work": work, "batch": int(batch)}
    once = torch_side.prepare(argparse.Namespace(**given))
    once()
    first = time.perf_counter() - started
    for _ in range(2):
        once()
    samples: list[float] = []
    while len(samples) < arguments.iterations and (
        len(samples) < 3 or sum(samples) < 1e3 * arguments.seconds
    ):
        samples.append(once())
    p50 = statistics.median(samples)
    return {
        "images": int(batch),
        "p50_ms": p50,
        "least_ms": min(samples),
        "most_ms": max(samples),
        "iterations": len(samples),
        "images_per_s": 1e3 * int(batch) / p50,
        "first_call_s": first,
        "peak_device_mib": torch.cuda.max_memory_allocated() / MIB if is_gpu else None,
        "reserved_device_mib": torch.cuda.max_memory_reserved() / MIB if is_gpu else None,
    }


if __name__ == "__main__":
    sys.exit(main())
