"""Every figure that is wanted of an accelerator, in one run; also a dry run on a CPU.

    python benchmarks/gpu.py --output gpu.json                              all parts
    python benchmarks/gpu.py --only latency throughput --output gpu.json     some
    python benchmarks/gpu.py --torch-python PYTHON --yardstick FILE ...      PyTorch beside it
    python benchmarks/gpu.py --dry-run --output dry.json                     a tiny network

Each part is a command of its own, so that its peak memory is its own, and a part that fails leaves
the others. The JSON holds each command, its result and what is derived from all; it is written
after every part. Parts that are there already are kept: a run that was cut off goes on.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparseinst_jax.files import replace_file

HERE = Path(__file__).parent
CLI = "import sys; from sparseinst_jax.cli import main; sys.exit(main())"
COCO_IMAGES = 117_266  # of train2017 with an object
SECONDS = 540  # a part may take


class Sizes(NamedTuple):
    """What the parts are run at."""

    config: str
    size: tuple[int, int]
    batches: tuple[int, ...]
    train_batches: tuple[int, ...]
    dtype: str
    iterations: int


REAL = Sizes(
    "configs/giam_r50.py", (640, 864), (1, 2, 4, 8, 16, 32, 64), (8, 16, 32), "bfloat16", 20
)
TINY = Sizes("configs/tiny.py", (64, 96), (1, 2), (2,), "float32", 2)


def commands(sizes: Sizes, arguments: argparse.Namespace) -> dict[str, list[str]]:
    """Name the parts and their commands; each takes `--output FILE` after it."""
    height, width = sizes.size
    both = f"{height}x{width}"
    shared = ["--config", sizes.config, f"--config.model.dtype={sizes.dtype}", "--size", both]
    shared += ["--iterations", str(sizes.iterations), "--train-size", both]
    bench = [sys.executable, "-c", CLI, "benchmark", *shared]
    small = ["--size", str(height), str(width), "--dtype", sizes.dtype, "--config", sizes.config]
    most = str(sizes.train_batches[-1])
    found = {"latency": [*bench, "--only", "latency", "post"]}
    found["throughput"] = [*bench, "--only", "throughput", "--batch", *map(str, sizes.batches)]
    for batch in sizes.train_batches:
        found[f"training/{batch}"] = [*bench, "--only", "training", "--train-batch", str(batch)]
    found["matching"] = [
        *(sys.executable, str(HERE / "matching_forms.py"), *small),
        *("--batch", str(sizes.train_batches[0])),
    ]
    found["roofline"] = [
        *(sys.executable, str(HERE / "roofline.py"), *small, "--batch", most, "--gradients"),
        *(["--product", "256", "--copy-mib", "8"] if sizes is TINY else ["--product", "8192"]),
    ]
    if sizes is not TINY:
        found["deformable"] = [sys.executable, str(HERE / "deformable.py")]
    if arguments.torch_python and arguments.yardstick:
        found |= torch_commands(sizes, arguments)
    return found


def torch_commands(sizes: Sizes, arguments: argparse.Namespace) -> dict[str, list[str]]:
    """Name the comparisons with PyTorch, channels last, under autocast."""
    where = ["--torch-python", arguments.torch_python, "--yardstick", arguments.yardstick]
    size = [*map(str, sizes.size)]
    compare = [sys.executable, str(HERE / "compare_torch.py"), *where, "--size", *size]
    compare += ["--train-size", *size, "--device", arguments.torch_device]
    compare += ["--dtype", sizes.dtype, "--channels-last"]
    first, last = sizes.batches[0], sizes.batches[-1]
    inference = ["--only", "inference", "network"]
    return {
        "torch/latency": [*compare, *inference, "--batch", str(first)],
        "torch/throughput": [*compare, *inference, "--batch", str(last)],
        "torch/training": [
            *(*compare, "--only", "training"),
            *("--train-batch", str(sizes.train_batches[0])),
        ],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts; returns 1 if one failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", metavar="FILE", required=True)
    add("--only", metavar="PART", nargs="+", help="such as latency, training or torch/training")
    add("--dry-run", action="store_true", help="a tiny network in float32, a few runs")
    add("--torch-python", metavar="PYTHON", help="interpreter that has torch")
    add("--yardstick", metavar="FILE", help="see torch_side.py")
    add("--torch-device", default="cuda")
    add("--seconds", type=int, default=SECONDS, help="that a part may take")
    arguments = parser.parse_args(argv)
    sizes = TINY if arguments.dry_run else REAL
    parts = commands(sizes, arguments)
    if arguments.only:
        parts = {
            name: command
            for name, command in parts.items()
            if any(name == word or name.startswith(f"{word}/") for word in arguments.only)
        }
    if not parts:
        parser.error("--only: there is no such part")
    path = Path(arguments.output)
    report = json.loads(path.read_text()) if path.exists() else {"parts": {}}
    for name, command in parts.items():
        if report["parts"].get(name, {}).get("result") is not None:
            print(f"{name}: is there already", flush=True)
            continue
        report["parts"][name] = run_part(name, command, arguments.seconds)
        report["derived"] = derive(report["parts"])
        replace_file(path, (json.dumps(report, indent=1) + "\n").encode())
    for line in lines(report["derived"] if "derived" in report else derive(report["parts"])):
        print(line)
    return 0 if all(report["parts"][name]["result"] is not None for name in parts) else 1


def run_part(name: str, command: Sequence[str], seconds: int) -> dict[str, Any]:
    """Run a command and read what it wrote."""
    print(f"{name}: {shown(command)}", flush=True)
    start, result, fault = time.perf_counter(), None, ""
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        output = Path(folder) / "part.json"
        try:
            process = subprocess.run([*command, "--output", str(output)], timeout=seconds)
            fault = f"exit code {process.returncode}" if process.returncode else ""
        except subprocess.TimeoutExpired:
            fault = f"more than {seconds} s"
        if output.exists():
            result = json.loads(output.read_text())
    if fault:
        print(f"{name}: {fault}", flush=True)
    took = time.perf_counter() - start
    return {"command": shown(command), "seconds": took, "fault": fault, "result": result}


def shown(command: Sequence[str]) -> str:
    """A command for a reader: programs by name, files below benchmarks/."""
    words = []
    for word in command:
        if word == CLI:
            words[-2:] = ["sparseinst"]
        elif word.startswith("/"):
            words.append(Path(word).name if word == sys.executable else f".../{Path(word).name}")
        else:
            words.append(word)
    return shlex.join(words)


def derive(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Compute what no part says alone; only from parts that are there."""
    rows = {
        f"{name}: {row['name']}": row
        for name, part in parts.items()
        if part["result"] is not None and "results" in part["result"]
        for row in part["result"]["results"]
    }
    found: dict[str, Any] = {}
    steps = {key: row for key, row in rows.items() if row["name"] == "training/step"}
    for row in steps.values():
        batch, step = row["images"], row["p50_ms"]
        key = f"training, batch {batch}"
        peak = row["peak_device_mib"]
        found[f"{key}: images/s"] = row["images_per_s"]
        found[f"{key}: minutes for an epoch of COCO"] = COCO_IMAGES / row["images_per_s"] / 60
        if peak is not None:
            found[f"{key}: MiB an image, weights included"] = peak / batch
        host = row["parts"]["matching_ms"] + row["parts"]["score_to_host_ms"]
        found[f"{key}: share of the step in matching and its transfer"] = host / step
    roof = (parts.get("roofline") or {}).get("result")
    if roof:
        found |= _utilisation(roof, rows)
    return found


def _utilisation(roof: Mapping[str, Any], rows: Mapping[str, Any]) -> dict[str, Any]:
    """Operations per second of the network over those of a matrix product."""
    forward = [s for s in roof["stages"] if "gflops" in s and "gradients" not in s["name"]]
    per_image = sum(stage["gflops"] for stage in forward) / roof["settings"]["batch"]
    rate = roof["rates"]["flops"] / 1e9
    found = {"matrix product: TFLOP/s": rate / 1e3, "network: GFLOP an image": per_image}
    for row in rows.values():
        if row["name"].startswith("throughput/network/"):
            share = per_image * row["images_per_s"] / rate
            found[f"network, batch {row['images']}: share of the matrix product's rate"] = share
    return found


def lines(derived: Mapping[str, Any]) -> list[str]:
    """The derived figures for a terminal."""
    return [f"{name}: {value:.4g}" for name, value in derived.items()]


if __name__ == "__main__":
    sys.exit(main())
