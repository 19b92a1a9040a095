"""Every figure that is wanted of a GPU, beside PyTorch's, the most valuable first.

    python benchmarks/gpu.py --smoke --output runs/gpu.jsonl
    python benchmarks/gpu.py --for 560 --yardstick FILE --output runs/gpu.jsonl
    python benchmarks/gpu.py --for 560 --only fastinst --fastinst-yardstick FILE --output ...
    python benchmarks/gpu.py --dry-run --yardstick FILE --output runs/dry.jsonl      on a CPU

bfloat16, 640x864. Each part is a process of its own, one after the other: its peak memory is its
own, JAX's arena is not in PyTorch's way, and a part that fails leaves the others. Every row is in
the file as soon as it is measured, so that the same command goes on where a run was cut off; what
failed is tried once more by the next. `--for` is kept strictly: a part is killed at its end.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import rows  # noqa: E402

# XLA does not compare the results of the convolutions that it tries: it compiles sooner.
FLAGS = "--xla_gpu_autotune_level=2"
LENIENT = "--xla_gpu_strict_conv_algorithm_picker=false"
GRAPHS = "--xla_gpu_enable_command_buffer=+CONVOLUTION"  # by themselves CUDA graphs hold none
PICKER = re.compile(r"algorithm|picker|autotun|cudnn", re.IGNORECASE)
OLD_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
SMOKE_SECONDS = 165
PATIENCE = 10  # times the limits and seconds of parts on a CPU


class Part(NamedTuple):
    """Rows that one process measures.

    Attributes:
      rows: their names, the most wanted first.
      least: the part is not begun when fewer seconds are left.
      seconds: after so many no new row is begun; a later part that names it takes what is left.
      limit: after so many the process is killed, and the row that it was at has failed.
      flags: of XLA.
    """

    rows: tuple[str, ...]
    least: int = 15
    seconds: int = 600
    limit: int = 220
    flags: str = ""


def _both(kinds: str, start: str = "op/") -> tuple[str, ...]:
    """Each of some words forward and with its gradient."""
    return tuple(f"{start}{kind}/{way}" for kind in kinds.split() for way in ("forward", "grad"))


def _torch(*names: str) -> tuple[str, ...]:
    return tuple(f"torch/{name}" for name in names)


_PRODUCTS = "rates/product/8192", "rates/product/4096"
_TO_DEVICE = "rates/to_device/2", "rates/to_device/13", "rates/to_device/53"
RATES = Part(
    (*_PRODUCTS, "rates/copy/1024", *_TO_DEVICE, "rates/to_host/4", "rates/to_host/37"),
    seconds=25,
)
OPERATIONS = _both(
    "first/plain first/padded first/split maps/grouped maps/split_104 maps/dense "
    "stem/plain stem/padded_8 stem/blocks_16 3x3/plain 1x1_res2/conv 1x1_res2/product "
    "deformable_8/dense deformable_8/deformable 1x1_res4/conv 1x1_res4/product"
)
SMOKE = (
    RATES,
    Part(OPERATIONS, seconds=70, limit=100),
    Part(("network/1",)),
    Part(OPERATIONS, least=5),
)
PARTS = (
    RATES,
    Part(("training/8",), 40),
    Part(_torch("compiled/training/8", "compiled/network/1"), 30),
    Part(_torch("graphs/network/1", "bf16/network/1"), 30),
    Part(("network/1",)),
    Part(("with_masks/1", "with_masks/1/20")),
    Part(("training/32",), 40),
    Part(_torch("compiled/training/32"), 30),
    Part(_both("deformable_res4/dense deformable_res4/deformable")),
    Part(("network/64",)),
    Part(_torch("compiled/network/64"), 25),
    Part(_torch("compiled/with_masks/1", "compiled/with_masks/1/20")),
    Part(("matching/none/8", "matching/host/8"), 30),
    Part(_both("deformable_res5/dense deformable_res5/deformable")),
    Part(_torch("eager/network/1", "eager/training/8", "eager/training/32")),
    Part(("network/1/command_buffer",), flags=GRAPHS),
    Part(("training/8/command_buffer",), 40, flags=GRAPHS),
    Part(("matching/callback/8",), 40),  # in some versions of JAX it can wait for ever
    Part(("matching/device/8",), 40),
    Part(("matching/overlapped/8", "matching/parts/8"), 40),
    # Of programs in the cache: a step's memory without XLA's search, and how soon it starts.
    Part(("training/8/cached",)),
    Part(("training/32/cached",)),
    Part(_both(" ".join(rows.STAGES), "stage/32/"), 30, seconds=300, limit=400),
    Part(_torch("graphs/training/8", "eager/network/64"), 40),
    Part(OPERATIONS),
    # Long to compile, so each side has a process and all the time that it may need; ours first.
    Part(("fastinst/8",), 60, limit=300),
    Part(_torch("compiled/fastinst/8"), 60, limit=300),
)


class Run:
    """A walk over parts until a deadline, in seconds of `time.monotonic`."""

    def __init__(self, arguments: argparse.Namespace, stamp: dict[str, Any], end: float):
        self.arguments, self.stamp, self.end = arguments, stamp, end
        self.failed: set[str] = set()  # in this call
        self.without: set[str] = set()  # scripts that find no device
        self.child: subprocess.Popen[bytes] | None = None
        self.caches = arguments.cache.resolve()
        self.caches.mkdir(parents=True, exist_ok=True)
        self.scratch = tempfile.TemporaryDirectory(
            prefix="torch-", dir=self.caches, ignore_cleanup_errors=True
        )

    def found(self) -> list[rows.Row]:
        """The rows of this device that are there."""
        return rows.read(self.arguments.output, self.stamp)

    def yardstick(self, name: str) -> str | None:
        """The file that a row of PyTorch's is of."""
        given = self.arguments
        return given.fastinst_yardstick if "/fastinst/" in name else given.yardstick

    def wanted(self, part: Part) -> list[str]:
        """The rows of a part, PyTorch's only where there is a yardstick."""
        return [n for n in part.rows if not n.startswith("torch/") or self.yardstick(n)]

    def measure(self, part: Part) -> None:
        """Run processes until the part's rows are there, or have failed, or its time is up."""
        patience, flags, fruitless = PATIENCE if self.arguments.dry_run else 1, part.flags, 0
        end = min(self.end, time.monotonic() + patience * part.seconds)
        while fruitless < 2:
            before = self.found()
            names = [name for name in self.wanted(part) if name not in self.failed]
            todo = rows.lacking(names, before)
            left = end - time.monotonic()
            script = "torch_side.py" if todo and todo[0].startswith("torch/") else "gpu_jax.py"
            if not todo or script in self.without or left < part.least:
                return
            fault = self.run(script, todo, patience * part.limit, left, flags)
            new = self.found()[len(before) :]
            if fault and len(new) < len(todo):
                fruitless = 0 if new else fruitless + 1
                new.append({"name": todo[len(new)], **self.stamp, "fault": fault})
                rows.append(self.arguments.output, new[-1])
                print(rows.line(new[-1]), flush=True)
            bad = {row["name"]: row["fault"] for row in new if "fault" in row}
            is_picker = script == "gpu_jax.py" and any(map(PICKER.search, bad.values()))
            if is_picker and LENIENT not in flags:
                flags = f"{flags} {LENIENT}"  # once more, at once
                continue
            self.failed |= bad.keys()
            if not fault:
                return

    def run(
        self, script: str, todo: Sequence[str], limit: float, left: float, flags: str
    ) -> str | None:
        """Run one process; returns what went wrong, None where it ended well or at the deadline."""
        given, is_torch = self.arguments, script == "torch_side.py"
        words = ["--output", str(given.output), "--stamp", json.dumps(self.stamp)]
        words += ["--seconds", f"{left:.0f}", *["--dry-run"] * given.dry_run]
        words += ["--yardstick", str(self.yardstick(todo[0]))] if is_torch else []
        # A process that is killed can leave a library in PyTorch's that is not whole.
        own = tempfile.mkdtemp(dir=self.scratch.name)
        environment = {
            "JAX_COMPILATION_CACHE_DIR": str(self.caches / "jax"),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(given.dry_run)),
            **dict.fromkeys(("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"), own),
            # One process has the device at a time. Under both of its names JAX refuses it.
            **({} if OLD_FRACTION in os.environ else {"XLA_CLIENT_MEM_FRACTION": "0.9"}),
            **os.environ,
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {FLAGS} {flags}".strip(),
        }
        seconds = self.end - time.monotonic()
        python = given.torch_python if is_torch else sys.executable
        command = rows.command(python, str(HERE / script), *words, "--rows", *todo)
        options: dict[str, Any] = {"env": rows.environment(**environment)}
        self.child = subprocess.Popen(command, start_new_session=True, **options)
        try:
            code = self.child.wait(timeout=max(0, min(limit, seconds)))
        except subprocess.TimeoutExpired:
            return None if seconds < limit else f"more than {limit} s"
        finally:
            self.kill()
        if code == rows.NO_DEVICE:
            self.without.add(script)
            return None
        return f"exit code {code}" if code else None

    def kill(self) -> None:
        """End the process of a part, and its own."""
        if self.child is not None and self.child.poll() is None:
            os.killpg(self.child.pid, signal.SIGKILL)
            self.child.wait()
        self.child = None


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is lacking; returns 1 if something still is."""
    start = time.monotonic()
    arguments = _parse(argv)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    stamp = {"device": device(arguments.dry_run), "versions": versions(arguments.torch_python)}
    only = arguments.only
    parts = [
        part
        for part in (SMOKE if arguments.smoke else PARTS)
        if not only or any(f"/{word}" in f"/{name}" for name in part.rows for word in only)
    ]
    # What is taken off is for the table and the copy.
    run = Run(arguments, stamp, start + arguments.seconds - 1.5)
    names = {name for part in parts for name in run.wanted(part)}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        print(json.dumps(stamp), rows.query(f"driver_version,{rows.CLOCKS}"), flush=True)
        for part in parts:
            run.measure(part)
    finally:
        run.kill()
        run.scratch.cleanup()
        found = run.found()
        for name, value in rows.figures(found).items():
            print(f"{name}: {value:.4g}")
        print(rows.tables(found), flush=True)
        if arguments.copy_to:
            arguments.copy_to.mkdir(parents=True, exist_ok=True)
            shutil.copy(arguments.output, arguments.copy_to)
    good = {row["name"] for row in found if "fault" not in row}
    print(f"{len(names & good)} of {len(names)} rows; the same command goes on from here")
    return 0 if names <= good else 1


def device(is_dry: bool) -> str:
    """Name the first GPU as the driver does; a dry run is on the CPU."""
    name = "cpu" if is_dry else rows.query("name")
    if not name:  # no nvidia-smi
        code = "import jax; d = jax.devices()[0]; print(d.device_kind * (d.platform != 'cpu'))"
        command = rows.command(sys.executable, code)
        done = subprocess.run(command, env=rows.environment(), capture_output=True, text=True)
        name = done.stdout.strip()
    if not name:
        raise SystemExit("there is no GPU here; --dry-run tries everything on a CPU")
    return name


def versions(torch_python: str) -> dict[str, str]:
    """Return the versions of what is measured, PyTorch's by the interpreter that measures it."""
    found = rows.versions()
    if torch_python != sys.executable:
        code = "import json, rows; print(json.dumps(rows.versions()))"
        command = rows.command(torch_python, code)
        theirs = json.loads(subprocess.check_output(command, env=rows.environment()))
        found["torch"] = theirs.get("torch", "none")
    return found


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", metavar="FILE", type=Path, required=True, help="rows, one JSON a line")
    add("--smoke", action="store_true", help=f"rates and single operations, {SMOKE_SECONDS} s")
    add("--for", dest="seconds", type=float, metavar="SECONDS", help="end after so many")
    add("--yardstick", metavar="FILE", help="a PyTorch SparseInst, see torch_side.py")
    add("--fastinst-yardstick", metavar="FILE", help="a PyTorch FastInst, see there")
    add("--torch-python", metavar="PYTHON", default=sys.executable, help="that has torch")
    add("--only", metavar="ROW", nargs="+", help="parts with such rows: training, torch/eager")
    add("--copy-to", metavar="FOLDER", type=Path, help="copy the rows there at the end")
    add("--cache", metavar="FOLDER", type=Path, default=Path("runs/cache"), help="of programs")
    add("--dry-run", action="store_true", help="a tiny network on the CPU, hardly optimised")
    arguments = parser.parse_args(argv)
    if not shutil.which(arguments.torch_python):
        parser.error(f"--torch-python: expected a Python to run, got {arguments.torch_python}")
    if not arguments.seconds:
        arguments.seconds = SMOKE_SECONDS if arguments.smoke else float("inf")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
