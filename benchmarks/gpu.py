"""Every figure that is wanted of an accelerator, beside PyTorch's; also a dry run on a CPU.

    python benchmarks/gpu.py --yardstick FILE --output gpu.json                    all of it
    python benchmarks/gpu.py --yardstick FILE --output gpu.json --for 570          ten minutes of it
    python benchmarks/gpu.py --yardstick FILE --output gpu.json --only training torch/training
    python benchmarks/gpu.py --yardstick FILE --output dry.json --dry-run          a tiny network

bfloat16, 640x864; PyTorch channels last under autocast, eager and compiled. Each part is a process
of its own, one after the other: its peak memory is its own, JAX's arena is not in PyTorch's way,
and a part that fails leaves the others. The JSON holds each command, its result, what follows from
all (`gpu_figures.py`) and whether each aim is met; it is written after every part. Parts that it
holds are kept, so that the same command goes on where a run was cut off; a failed part is tried
twice. The most wanted parts come first. torch_side.py says what a yardstick is; without one,
PyTorch's parts are left out.

There is no kernel of our own for the deformable convolution: whether XLA's gather is enough has yet
to be measured on an accelerator, and that part is what measures it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparseinst_jax.cli.measuring import inference, machine
from sparseinst_jax.runtime.files import replace_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import gpu_figures  # noqa: E402

CLI = "import sys; from sparseinst_jax.cli import main; sys.exit(main())"
LEAST_SECONDS = 45  # nothing can be measured in less
TRIES = 2


class Sizes(NamedTuple):
    """What the parts are run at."""

    config: str
    size: tuple[int, int]
    batches: tuple[int, ...]
    train_batches: tuple[int, ...]
    matching_batch: int
    dtype: str
    iterations: int


class Part(NamedTuple):
    """A process: its command, to which `--output FILE` is added, and the seconds it may take."""

    command: list[str]
    seconds: int


REAL = Sizes("configs/giam_r50.py", (640, 864), (1, 4, 16, 32, 64), (8, 16, 32), 16, "bfloat16", 20)
TINY = Sizes("configs/tiny.py", (64, 96), (1, 2, 4), (2, 4), 2, "bfloat16", 2)


def plan(sizes: Sizes, arguments: argparse.Namespace) -> dict[str, Part]:
    """Name the parts, the most wanted first."""
    found = {"latency": Part([*_benchmark(sizes, "latency", "post"), "--skip-compile-times"], 240)}
    for batch in reversed(sizes.train_batches):
        command = _benchmark(sizes, "training", "--train-batch", str(batch))
        found[f"training/{batch}"] = Part([*command, "--skip-compile-times"], 270)
    for batch in reversed(sizes.batches[1:]):
        command = _benchmark(sizes, "throughput", "--batch", str(batch))
        found[f"throughput/{batch}"] = Part([*command, "--skip-compile-times"], 180)
    found |= _own_scripts(sizes)
    command = _benchmark(sizes, "latency/with_masks", "training", "--train-batch")
    found["start-up"] = Part([*command, str(sizes.train_batches[0])], 400)
    if not arguments.yardstick:
        return found
    torch = _torch(sizes, arguments)
    order = ["latency", "torch/eager", "torch/compiled/latency"]
    first, last = sizes.train_batches[0], sizes.train_batches[-1]
    order += [f"training/{last}", f"training/{first}", "torch/compiled/training"]
    order += [f"throughput/{batch}" for batch in reversed(sizes.batches[1:])]
    order += ["torch/compiled/throughput", "roofline", "matching", "deformable"]
    found |= torch
    return {name: found[name] for name in dict.fromkeys([*order, *found])}


def _benchmark(sizes: Sizes, *only: str) -> list[str]:
    both = f"{sizes.size[0]}x{sizes.size[1]}"
    command = [sys.executable, "-c", CLI, "benchmark", "--config", sizes.config]
    command += [f"--config.model.dtype={sizes.dtype}", "--size", both, "--train-size", both]
    return [*command, "--iterations", str(sizes.iterations), "--only", *only]


def _own_scripts(sizes: Sizes) -> dict[str, Part]:
    is_small = sizes is TINY
    size = ["--size", *map(str, sizes.size), "--dtype", sizes.dtype, "--config", sizes.config]
    most = str(sizes.train_batches[-1])
    matching = [sys.executable, str(HERE / "matching_forms.py"), *size]
    matching += ["--batch", str(sizes.matching_batch), "--forms"]
    roofline = [sys.executable, str(HERE / "roofline.py"), *size, "--batch", most, "--gradients"]
    roofline += ["--product", "256" if is_small else "8192"]
    roofline += ["--copy-mib", "8" if is_small else "1024"]
    deformable = [sys.executable, str(HERE / "deformable.py"), "--dtype", sizes.dtype]
    deformable += ["--calls", "2" if is_small else "20"]
    deformable += ["--batch-sizes", "1", *([] if is_small else [most])]
    deformable += ["--repeats", "1", "--no-network"] if is_small else []
    return {
        "roofline": Part(roofline, 300),
        "matching": Part([*matching, "none", "host", "overlapped", "device"], 400),
        "deformable": Part(deformable, 240),
        # By itself: in some versions of JAX a callback can wait for ever.
        "matching/callback": Part([*matching, "none", "callback"], 240),
    }


def _torch(sizes: Sizes, arguments: argparse.Namespace) -> dict[str, Part]:
    photo = inference.usual_photo(sizes.size)
    valid = inference.valid_size(photo, sizes.size)
    command = [arguments.torch_python, str(HERE / "gpu_torch.py")]
    command += ["--yardstick", arguments.yardstick, "--size", *map(str, sizes.size)]
    command += ["--valid-size", *map(str, valid), "--photo-size", *map(str, photo)]
    command += ["--device", arguments.torch_device, "--dtype", sizes.dtype]
    command += ["--iterations", str(sizes.iterations)]
    latency = ["network/1", "inference/1", "post-processing/1"]
    throughput = [f"{work}/{b}" for b in sizes.batches[1:] for work in ("network", "inference")]
    training = [f"training/{batch}" for batch in sizes.train_batches]
    # Compiling takes PyTorch about a minute each.
    few = [point for point in throughput if int(point.rpartition("/")[2]) in sizes.batches[-2:]]
    compiled = [*command, "--compile", "--points"]
    return {
        "torch/eager": Part([*command, "--points", *latency, *throughput, *training], 300),
        "torch/compiled/latency": Part([*compiled, *latency], 270),
        "torch/compiled/training": Part([*compiled, training[0], training[-1]], 450),
        "torch/compiled/throughput": Part([*compiled, *few], 400),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts; returns 1 if one has no whole result."""
    arguments = _parse(argv)
    sizes = TINY if arguments.dry_run else REAL
    parts = plan(sizes, arguments)
    if arguments.only:
        parts = {
            name: part
            for name, part in parts.items()
            if any(name == word or name.startswith(f"{word}/") for word in arguments.only)
        }
    if not parts:
        raise SystemExit(f"--only: expected some of {', '.join(plan(sizes, arguments))}")
    path = Path(arguments.output)
    report: dict[str, Any] = {"parts": {}}
    if path.exists():
        report = json.loads(path.read_text())
    report["command"], report["settings"] = machine.command(), sizes._asdict()
    end = time.monotonic() + arguments.seconds if arguments.seconds else float("inf")
    for name, part in parts.items():
        before = report["parts"].get(name)
        if before and (not before["fault"] or before["tries"] >= TRIES):
            print(f"{name}: is there already{before['fault'] and ', failed'}", flush=True)
            continue
        left = end - time.monotonic()
        if left < LEAST_SECONDS:
            print("the time is up: the same command goes on from here", flush=True)
            break
        report["parts"][name] = run_part(name, part, left, before)
        report |= gpu_figures.conclude(report["parts"], sizes._asdict())
        replace_file(path, (json.dumps(report, indent=1) + "\n").encode())
    report |= gpu_figures.conclude(report["parts"], sizes._asdict())
    print(gpu_figures.text(report))
    if arguments.dry_run:
        print("dry run: a tiny network beside PyTorch's whole one; the ratios mean nothing")
    found = {name: report["parts"][name] for name in parts if name in report["parts"]}
    return 0 if len(found) == len(parts) and not gpu_figures.failures(found) else 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", metavar="FILE", required=True)
    add("--yardstick", metavar="FILE", help="a PyTorch SparseInst, see torch_side.py")
    add("--torch-python", metavar="PYTHON", default=sys.executable, help="that has torch")
    add("--only", metavar="PART", nargs="+", help="such as latency, training or torch/training")
    add("--for", dest="seconds", type=int, metavar="SECONDS", help="end after so many")
    add("--dry-run", action="store_true", help="a tiny network, a few runs, PyTorch on the CPU")
    add("--torch-device", help="default: cuda, or cpu in a dry run")
    arguments = parser.parse_args(argv)
    arguments.torch_device = arguments.torch_device or ("cpu" if arguments.dry_run else "cuda")
    return arguments


def run_part(
    name: str, part: Part, left: float, before: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Run a command and read what it wrote, which may be incomplete where it failed."""
    print(f"{name}: {shown(part.command)}", flush=True)
    seconds = min(part.seconds, left)
    start, result = time.monotonic(), None
    # One process has the device at a time.
    environment = {**os.environ, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        output = Path(folder) / "part.json"
        if before and before["result"]:
            output.write_text(json.dumps(before["result"]))
        command = [*part.command, "--output", str(output)]
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        try:
            code = process.wait(timeout=seconds)
            fault = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            fault = f"more than {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its own children, too
                process.wait()
        if output.exists():
            result = json.loads(output.read_text())
    if result is None and not fault:
        fault = "wrote nothing"
    if fault:
        print(f"{name}: {fault}", flush=True)
    was_cut_off = seconds < part.seconds and fault.startswith("more than")
    return {
        "command": shown(part.command),
        "seconds": time.monotonic() - start,
        "fault": fault,
        "tries": (before["tries"] if before else 0) + (not was_cut_off),
        "result": result,
    }


def shown(command: Sequence[str]) -> str:
    """A command for a reader: programs by name, files below benchmarks/."""
    words = []
    for word in command:
        if word == CLI:
            words[-2:] = ["sparseinst"]
        elif word.startswith(str(HERE)):
            words.append(f"benchmarks/{Path(word).name}")
        elif Path(word).is_absolute():
            words.append("python" if Path(word).name.startswith("python") else Path(word).name)
        else:
            words.append(word)
    return shlex.join(words)


if __name__ == "__main__":
    sys.exit(main())
