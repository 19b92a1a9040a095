"""Our speed and memory beside PyTorch's: same machine, same sizes, alternately.

    python benchmarks/compare_torch.py --torch-python PYTHON --yardstick FILE --output FILE.json

Runs `sparseinst benchmark --serve` and torch_side.py with the yardstick (a PyTorch version of
the same network), each in its own environment and process. Both are warmed up, then measured
alternately, A B A B, so that what else the machine does falls on both. Weights are random on each
side (then all masks are kept), or both load --weights. A ratio is how many times as fast we are:
the median of the rounds' ratios, with the extremes. Exit code with --check: 1 if a target of what
was asked for is missed or has no value. tables.py makes the table of docs/performance.md from the
output.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import rows as shared  # noqa: E402

from sparseinst_jax.cli.measuring import machine, workloads  # noqa: E402
from sparseinst_jax.cli.measuring.timing import speed_ratio  # noqa: E402
from sparseinst_jax.runtime.files import write_json  # noqa: E402

TORCH_SIDE = str(HERE / "torch_side.py")
CLI = "import sys; from sparseinst_jax.cli import main; sys.exit(main(sys.argv[1:]))"
AGAINST = ("eager", "compiled")
# What both sides do: that of `sparseinst benchmark`, and of torch_side.py.
WORKS = {
    "inference": ("latency/with_masks", "with_masks"),
    "network": ("latency/network", "network"),
    "post-processing": ("post/masks", "post"),
    "training": ("training/step", "training"),
}


# What is aimed at, in eager mode and compiled: at least this speed, at most this memory (ours over
# theirs).
LIMITS = {
    ("inference", "speed"): (1.5, 1.1),
    ("network", "speed"): (1.25, 0.95),
    ("post-processing", "speed"): (5.0, 3.0),
    ("training", "speed"): (1.0, 0.9),
    ("inference", "memory"): (1.0, 1.0),
    ("training", "memory"): (1.3, 1.3),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns 1 with --check if a target is missed or was not measured."""
    arguments = _parse(argv)
    rows = []
    for name in arguments.only:
        for against in arguments.against:
            print(f"{name}, {against}: starting", file=sys.stderr, flush=True)
            try:
                rows.append(compare(name, against, arguments))
            except ValueError as error:  # the others can still be measured
                print(f"error: {error}", file=sys.stderr, flush=True)
                continue
            print(line(rows[-1]), file=sys.stderr, flush=True)
            report = make_report(rows, arguments)
            if arguments.output:  # after each row: the measurements take long
                write_json(arguments.output, report, indent=1)
    report = make_report(rows, arguments)
    print("\n".join(map(line, report["rows"])))
    missed = [target for target in report["targets"] if target["is_met"] is not True]
    for target in missed:
        got = "not measured" if target["value"] is None else f"{target['value']:.2f}"
        sign = ">=" if target["measure"] == "speed" else "<="
        name = f"{target['work']}, {target['measure']} against {target['against']}"
        print(f"MISSED: {name}: {got}, expected {sign} {target['limit']:g}")
    return 1 if missed and arguments.check else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--torch-python", metavar="PYTHON", required=True, help="interpreter that has torch")
    add("--yardstick", metavar="FILE", required=True, help="see torch_side.py")
    add("--config", metavar="NAME", default="giam_r50", help="ours; the yardstick's net")
    add("--weights", metavar="FILE", help="for both: a .pth of the original's names; else random")
    add("--only", choices=tuple(WORKS), nargs="+", default=list(WORKS))
    add("--against", choices=AGAINST, nargs="+", default=list(AGAINST))
    add("--size", type=int, nargs=2, default=(640, 864), help="of inference, padded")
    add("--train-size", type=int, nargs=2, default=(512, 512))
    add("--batch", type=int, default=1, help="of inference")
    add("--train-batch", type=int, default=2)
    add("--objects", type=int, default=8, help="on each image in training")
    add("--device", default="cpu", help="of torch: cpu or cuda")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--channels-last", action="store_true", help="torch's layout")
    add("--threads", type=int, default=os.cpu_count(), help="of torch; ours are the machine's")
    add("--warmup", type=int, default=2)
    add("--rounds", type=int, default=5, help="of the alternation")
    add("--iterations", type=int, default=2, help="runs of one side in a round")
    add("--output", metavar="FILE", help="JSON, written after each comparison")
    add("--check", action="store_true", help="exit code 1 if a target is missed")
    return parser.parse_args(argv)


def compare(name: str, against: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one work of both sides alternately; plain values."""
    load, sides = list(os.getloadavg()), {}
    samples: dict[str, list[list[float]]] = {"ours": [], "theirs": []}
    try:
        # One after the other: what one compiles must not slow the other's warm-up.
        for side, command in {"ours": our_command, "theirs": their_command}.items():
            sides[side] = Side(f"{name}, {side} ({against})", command(name, against, arguments))
            sides[side].read("ready")
        for _ in range(arguments.rounds):
            for side in ("theirs", "ours"):
                samples[side].append(sides[side].ask(arguments.iterations))
        results = {side: process.end() for side, process in sides.items()}
    finally:
        for process in sides.values():
            process.kill()
    return {
        "work": name,
        "against": against,
        "speed": speed_ratio(samples["theirs"], samples["ours"])._asdict(),
        "memory": memory_ratio(results["ours"], results["theirs"]),
        "load_before": load,
        "load_after": list(os.getloadavg()),
        **results,
        "samples_ms": samples,
    }


def our_command(name: str, _: str, arguments: argparse.Namespace) -> list[str]:
    """`sparseinst benchmark` for one work, by this interpreter."""
    only = WORKS[name][0]
    if only.startswith("latency/") and arguments.batch > 1:
        only = f"throughput/{only.partition('/')[2]}/{arguments.batch}"
    size, train_size = ("x".join(map(str, s)) for s in (arguments.size, arguments.train_size))
    return [
        *shared.command(sys.executable, CLI, "benchmark", "--config", arguments.config),
        *("--serve", "--only", only, "--warmup", str(arguments.warmup)),
        *("--batch", str(arguments.batch), "--size", size, "--train-size", train_size),
        *("--train-batch", str(arguments.train_batch), "--objects", str(arguments.objects)),
        f"--config.model.dtype={arguments.dtype}",
        *(["--weights", arguments.weights] if arguments.weights else []),
    ]


def their_command(name: str, against: str, arguments: argparse.Namespace) -> list[str]:
    """torch_side.py for one work, by the other interpreter."""
    trains = name == "training"
    size = tuple(arguments.train_size if trains else arguments.size)
    photo = workloads.usual_photo(size)
    batch = arguments.train_batch if trains else arguments.batch
    return [
        *shared.command(arguments.torch_python, TORCH_SIDE, "--yardstick", arguments.yardstick),
        *("--serve", "--rows", f"torch/{against}/{WORKS[name][1]}/{batch}"),
        *("--size", *map(str, size), "--valid-size", *map(str, workloads.valid_size(photo, size))),
        *("--photo-size", *map(str, photo), "--objects", str(arguments.objects)),
        *("--device", arguments.device, "--dtype", arguments.dtype),
        *("--threads", str(arguments.threads), "--warmup", str(arguments.warmup)),
        *("--row", Path(arguments.config).stem),
        *(["--weights", arguments.weights] if arguments.weights else []),
        *(["--contiguous"] * (not arguments.channels_last)),
    ]


class Side:
    """A process that measures when it is asked to, see `timing.serve`; its name is for messages."""

    def __init__(self, name: str, command: Sequence[str]):
        self._name, pipe = name, subprocess.PIPE
        # Two processes share a GPU: neither may take all of its memory beforehand.
        env = shared.environment(XLA_PYTHON_CLIENT_PREALLOCATE="false")
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env)

    def read(self, key: str) -> Any:
        """Read on until an answer with a key.

        Raises:
          ValueError: the process ended before; says how.
        """
        answers: Any = self._process.stdout
        for text in answers:
            if text.startswith("{") and key in (answer := json.loads(text)):
                return answer
        raise ValueError(
            f"{self._name}: ended with code {self._process.wait()} before it answered; its own "
            "message is above"
        )

    def ask(self, runs: int) -> list[float]:
        """Make it run this many times; returns milliseconds."""
        print(runs, file=self._process.stdin, flush=True)
        return self.read("ms")["ms"]

    def end(self) -> dict[str, Any]:
        """Ask it to finish; returns its result."""
        orders: Any = self._process.stdin
        orders.close()
        result = self.read("p50_ms")
        self._process.wait()
        return result

    def kill(self) -> None:
        """End the process if it still runs."""
        self._process.kill()
        self._process.wait()


def memory_ratio(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, float] | None:
    """Return our peak memory over theirs; None where one is unknown.

    On a GPU of the device; on a CPU of the whole process from its start, compilation included.
    """
    sides, steady = (ours, theirs), (ours["peak_process_mib"], theirs["peak_process_mib"])
    pair = tuple(side["peak_device_mib"] for side in sides)
    is_process = None in pair
    if is_process:
        keys = "peak_process_mib", "peak_with_compilation_mib"
        pair = tuple(max(side[key] or 0 for key in keys) for side in sides)
    if not all(pair):
        return None
    found = {"ratio": pair[0] / pair[1], "ours_mib": pair[0], "theirs_mib": pair[1]}
    after = {"ratio_after_warmup": steady[0] / steady[1]} if is_process and all(steady) else {}
    return found | after


def judge(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Say of each target what was reached; None where it was not measured."""
    found, verdicts = {(row["work"], row["against"]): row for row in rows}, []
    for (work, measure), limits in LIMITS.items():
        for against, limit in zip(AGAINST, limits, strict=True):
            row, value, is_met = found.get((work, against)), None, None
            if row is not None and row[measure] is not None:
                value = row[measure]["median" if measure == "speed" else "ratio"]
                is_met = value >= limit if measure == "speed" else value <= limit
            target = {"work": work, "against": against, "measure": measure, "limit": limit}
            verdicts.append({**target, "value": value, "is_met": is_met})
    return verdicts


def make_report(rows: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Collect the rows, the settings and the verdicts on the targets."""
    hidden = ("torch_python", "yardstick", "weights", "output", "check", "config")
    asked = arguments.only, arguments.against
    random = "random on each side; all masks kept"
    return {
        "command": machine.command(),
        "config": Path(arguments.config).name,
        "weights": Path(arguments.weights).name if arguments.weights else random,
        "settings": {key: value for key, value in vars(arguments).items() if key not in hidden},
        "rows": list(rows),
        "targets": [t for t in judge(rows) if t["work"] in asked[0] and t["against"] in asked[1]],
    }


def line(row: Mapping[str, Any]) -> str:
    """One comparison in words."""
    speed, memory = row["speed"], row["memory"]
    text = (
        f"{row['work']}, {row['against']}: {row['theirs']['p50_ms']:.1f} ms against our "
        f"{row['ours']['p50_ms']:.1f} ms, {speed['median']:.2f} times as fast "
        f"({speed['least']:.2f} to {speed['most']:.2f})"
    )
    return text + (f", {memory['ratio']:.2f} times the memory" if memory else "")


if __name__ == "__main__":
    sys.exit(main())
