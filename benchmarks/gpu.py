"""Every figure that is wanted of a GPU, beside PyTorch's, the most valuable first; see gpu.md.

    python benchmarks/gpu.py --smoke --output runs/gpu.jsonl
    python benchmarks/gpu.py --for 560 --yardstick FILE --output runs/gpu.jsonl
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
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import gpu_figures  # noqa: E402
import gpu_rows  # noqa: E402

# XLA does not compare the results of the convolutions that it tries: it compiles sooner.
FLAGS = "--xla_gpu_autotune_level=2"
LENIENT = "--xla_gpu_strict_conv_algorithm_picker=false"
PICKER = re.compile(r"algorithm|picker|autotun|cudnn", re.IGNORECASE)
SMOKE_SECONDS = 165


class Part(NamedTuple):
    """Rows that one process measures.

    Attributes:
      rows: their names, the most wanted first.
      seconds: after so many no new row is begun; the next part that names them takes the rest.
      limit: after so many the process is killed, and the row that it was at has failed.
      least: it is not begun when fewer seconds are left.
      flags: of XLA.
    """

    rows: tuple[str, ...]
    seconds: int = 120
    limit: int = 200
    least: int = 15
    flags: str = ""


def _operations(*kinds: str) -> tuple[str, ...]:
    return tuple(f"op/{kind}/{way}" for kind in kinds for way in ("forward", "gradient"))


def _torch(*names: str) -> tuple[str, ...]:
    return tuple(f"torch/{name}" for name in names)


RATES = Part(
    (
        *("rates/product/8192", "rates/copy/1024"),
        *(f"rates/to_device/{mib}" for mib in (2, 13, 53)),
        *(f"rates/to_host/{mib}" for mib in (4, 37)),
        "rates/product/4096",
    ),
    seconds=25,
    limit=60,
)
CONVOLUTIONS = (
    *_operations("first/plain", "first/padded", "first/split"),
    *_operations("maps/grouped", "maps/grouped_104", "maps/split", "maps/split_104", "maps/dense"),
    *_operations("stem/plain", "stem/padded_4", "stem/padded_8", "stem/blocks", "3x3/plain"),
    *_operations("1x1_res2/conv", "1x1_res2/product", "1x1_res2/einsum"),
    *("op/upsampling/package/gradient", "op/upsampling/float32_default/gradient"),
    "op/upsampling/bfloat16/gradient",
    *_operations("deformable_8/dense", "deformable_8/deformable"),
    *_operations("1x1_res4/conv", "1x1_res4/product", "1x1_res4/einsum"),
)
STAGES = ("stem", "res2", "res3", "res4", "res5", "encoder", "inst_branch", "mask_branch", "masks")
SMOKE = (
    RATES,
    Part(CONVOLUTIONS, seconds=70, limit=100),
    Part(("network/1",), limit=120, least=10),
    Part(CONVOLUTIONS, seconds=100, limit=160, least=5),
    Part(("network/1/folded", "network/1/bf16_weights"), least=10),
)
PARTS = (
    RATES,
    Part(("training/8",), limit=220, least=40),
    Part(_torch("compiled/training/8", "compiled/network/1"), limit=220, least=30),
    Part(_torch("graphs/network/1", "bf16/network/1"), limit=150, least=30),
    Part(("network/1",)),
    Part(("with_masks/1", "with_masks/1/20")),
    Part(("training/32",), limit=220, least=40),
    Part(_torch("compiled/training/32"), limit=150, least=30),
    Part(("network/64",)),
    Part(_torch("compiled/network/64"), limit=150, least=25),
    Part(("matching/none/8", "matching/host/8"), limit=220, least=30),
    Part(_operations(*(f"deformable_{s}/{f}" for s in ("res4", "res5") for f in ("dense",
                     "deformable")))),
    Part(_torch("eager/network/1", "eager/training/8", "eager/training/32"), limit=120),
    Part(_torch("compiled/with_masks/1", "compiled/with_masks/1/20"), limit=120),
    Part(("network/1/command_buffer",), flags="--xla_gpu_enable_command_buffer=+CONVOLUTION"),
    Part(("network/1/folded", "network/1/bf16_weights")),
    Part(("matching/overlapped/8", "matching/parts/8"), limit=220, least=40),
    Part(("matching/callback/8",), limit=150, least=40),
    Part(("matching/device/8",), limit=200, least=40),
    Part(CONVOLUTIONS),
    Part(
        tuple(
            f"stage/32/{stage}/{way}" for stage in STAGES for way in ("forward", "gradient")
        )
        + ("stage/32/match_score/forward", "stage/32/losses/gradient")
        + ("stage/32/optimizer/forward",)
    ),
    Part(_torch("graphs/training/8", "eager/network/64"), limit=200, least=40),
    # From the cache: the memory of a step without XLA's search, and how soon it starts.
    Part(("training/8/cached",)),
    Part(("training/32/cached",)),
)  # fmt: skip


class Run:
    """A walk over parts until a deadline."""

    def __init__(self, arguments: argparse.Namespace, stamp: dict[str, Any], end: float):
        self.arguments, self.stamp, self.end = arguments, stamp, end
        self.failed: set[str] = set()  # in this call
        self.without: set[str] = set()  # scripts that find no device
        self.child: subprocess.Popen[bytes] | None = None

    def rows(self) -> list[gpu_rows.Row]:
        """The rows of this device that are there."""
        return gpu_rows.own(gpu_rows.read(self.arguments.output), self.stamp)

    def lacking(self, part: Part) -> list[str]:
        """The rows of a part that are to be measured now."""
        names = [name for name in part.rows if name not in self.failed]
        if not self.arguments.yardstick:
            names = [name for name in names if not name.startswith("torch/")]
        return gpu_rows.lacking(names, self.rows())

    def measure(self, part: Part) -> None:
        """Run processes until the part's rows are there, or have failed, or its time is up."""
        flags, end = part.flags, min(self.end, time.monotonic() + part.seconds)
        while todo := self.lacking(part):
            left = end - time.monotonic()
            script = "gpu_torch.py" if todo[0].startswith("torch/") else "gpu_jax.py"
            if script in self.without or left < min(part.least, part.seconds):
                return
            before = len(self.rows())
            fault = self.run(script, todo, part, left, flags)
            found = self.rows()[before:]
            bad = {row["name"]: row["fault"] for row in found if "fault" in row}
            for row in found:
                print(gpu_figures.line(row), flush=True)
            if fault is None or len(found) == len(todo):
                pass
            elif fault:
                name = todo[len(found)]
                bad[name] = fault
                gpu_rows.append(self.arguments.output, {"name": name, **self.stamp, "fault": fault})
                print(f"{name}: {fault}", flush=True)
            else:
                return  # its time was up
            is_picker = script == "gpu_jax.py" and any(map(PICKER.search, bad.values()))
            if is_picker and LENIENT not in flags:
                flags = f"{flags} {LENIENT}"  # and once more, at once
                continue
            self.failed |= bad.keys()
            if fault is None:
                return

    def run(
        self, script: str, todo: Sequence[str], part: Part, left: float, flags: str
    ) -> str | None:
        """Run one process; returns why it ended too soon, "" if it was its time, None if not."""
        arguments = self.arguments
        python = arguments.torch_python if script == "gpu_torch.py" else sys.executable
        command = [python, str(HERE / script), "--output", str(arguments.output)]
        command += ["--stamp", json.dumps(self.stamp), "--seconds", f"{left:.0f}", "--rows", *todo]
        command += ["--dry-run"] if arguments.dry_run else []
        command += ["--yardstick", arguments.yardstick] if arguments.yardstick else []
        caches = arguments.cache.resolve()
        environment = {
            "JAX_COMPILATION_CACHE_DIR": str(caches / "jax"),
            "TORCHINDUCTOR_CACHE_DIR": str(caches / "torch"),
            "TRITON_CACHE_DIR": str(caches / "triton"),
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9",
            **os.environ,
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {FLAGS} {flags}".strip(),
        }
        seconds = min(part.limit, self.end - time.monotonic())
        is_at_end = seconds < part.limit
        self.child = subprocess.Popen(command, env=environment, start_new_session=True)
        try:
            code = self.child.wait(timeout=max(seconds, 0))
        except subprocess.TimeoutExpired:
            return "" if is_at_end else f"more than {part.limit} s"
        finally:
            self.kill()
        if code == gpu_rows.NO_DEVICE:
            self.without.add(script)
            return ""
        if code:
            return f"exit code {code}"
        return None

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
    stamp = {"device": device(arguments.dry_run), "versions": gpu_rows.versions()}
    parts = [part for part in (SMOKE if arguments.smoke else PARTS) if _is_meant(part, arguments)]
    # A second is left for the table.
    end = start + (arguments.seconds or float("inf")) - 1.5
    run = Run(arguments, stamp, end)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        print(json.dumps(stamp), gpu_rows.query(f"driver_version,{gpu_rows.CLOCKS}"), flush=True)
        for part in parts:
            if end - time.monotonic() >= part.least:
                run.measure(part)
    finally:
        run.kill()
        shown = {name for part in parts for name in part.rows}
        print(gpu_figures.text(run.rows(), shown), flush=True)
        if arguments.copy_to:
            arguments.copy_to.mkdir(parents=True, exist_ok=True)
            shutil.copy(arguments.output, arguments.copy_to)
    good = gpu_rows.best(run.rows())
    names = {name for part in parts for name in part.rows}
    if not arguments.yardstick:
        names = {name for name in names if not name.startswith("torch/")}
    missing = [name for name in names if "fault" in good.get(name, {"fault": ""})]
    print(f"{len(names) - len(missing)} of {len(names)} rows; the same command goes on from here")
    return 1 if missing else 0


def device(is_dry: bool) -> str:
    """Name the first GPU as the driver does; a dry run is on the CPU."""
    if is_dry:
        return "cpu"
    name = gpu_rows.query("name")
    if not name:
        code = "import jax; print(jax.devices()[0].device_kind)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        name = (done.stdout.split("\n") + [""])[0].strip()
    if not name or name.lower() == "cpu":
        raise SystemExit("there is no GPU; --dry-run tries everything on a CPU")
    return name


def _is_meant(part: Part, arguments: argparse.Namespace) -> bool:
    only = arguments.only
    return not only or any(name.startswith(word) for name in part.rows for word in only)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", metavar="FILE", type=Path, required=True, help="rows, one JSON a line")
    add("--smoke", action="store_true", help=f"rates and single operations, {SMOKE_SECONDS} s")
    add("--for", dest="seconds", type=float, metavar="SECONDS", help="end after so many")
    add("--yardstick", metavar="FILE", help="a PyTorch SparseInst, see gpu_torch.py")
    add("--torch-python", metavar="PYTHON", default=sys.executable, help="that has torch")
    add("--only", metavar="ROW", nargs="+", help="parts with a row whose name begins so")
    add("--copy-to", metavar="FOLDER", type=Path, help="copy the rows there at the end")
    add("--cache", metavar="FOLDER", type=Path, default=Path("runs/cache"), help="of programs")
    add("--dry-run", action="store_true", help="a tiny network, a few runs, on the CPU")
    arguments = parser.parse_args(argv)
    if arguments.smoke and not arguments.seconds:
        arguments.seconds = SMOKE_SECONDS
    return arguments


if __name__ == "__main__":
    sys.exit(main())
