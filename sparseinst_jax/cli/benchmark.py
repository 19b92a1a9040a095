"""The command `benchmark`: speed and memory of inference, training, input and scoring."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparseinst_jax.cli.arguments import add_model_arguments, check_arguments, parse_command_line
from sparseinst_jax.cli.benchmark_parts import PARTS, Bench, chosen
from sparseinst_jax.cli.measuring import inference, machine, statistics, workloads
from sparseinst_jax.runtime.files import check_writable, write_json

DESCRIPTION = """\
Measure speed and memory. Without --weights, --checkpoint or --workdir the weights are drawn: what
is measured does not depend on them, save for how many masks are kept (all of them then).

  sparseinst benchmark --config configs/giam_r50.py --only latency training --output here.json
  sparseinst benchmark --config configs/giam_r50.py --protocol original     as published frame rates
  sparseinst benchmark --config configs/tiny.py --size 64x96 --train-size 64x64      to try it out

latency     batch 1: network; with_masks: and the kept masks at the photo's size, on the host;
            end_to_end: from the file to run lengths
throughput  the same two for each --batch
training    whole steps with real matching; and what each half and the matching take
input       decode_and_resize; batches: with targets, on one core, and against the former in turn;
            workers/N
post        the network's outputs to masks at the photo's size, every one kept
scoring     encode: run lengths of 100 masks; evaluate: COCO's numbers, in turn with pycocotools

Every part is compiled twice, with an empty compilation cache and with a full one, then warmed up.
The JSON is written after each part, so that what was measured before a failure is not lost.
"""
PROTOCOL_WARMUP, PROTOCOL_ITERATIONS = 100, 400
PROTOCOL_NOTE = (
    "The original's tools/test_net.py: batch 1, one photo at a time, network and post-processing, "
    "the first {warmup} left out, frames per second = 1 / mean. Differs: normalising and fetching "
    "the masks to the host are inside the time here, outside there; one photo is used all the time."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = parse_command_line(_parser(), argv)
    check_arguments(arguments)
    _check(arguments)
    if arguments.output:
        check_writable(Path(arguments.output).parent, "--output")
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        bench = Bench(arguments, Path(folder))
        if arguments.serve:
            return _serve(bench)
        report = measure(bench)
    print(f"\n{text(report)}")
    if arguments.output:
        print(f"\n{arguments.output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sparseinst benchmark",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    add = parser.add_argument
    add("--only", metavar="PART", nargs="+", default=[], help="parts, or names such as post/masks")
    add("--size", metavar="HxW", type=parse_size, help="padded image of inference, default 640x864")
    add(
        "--shortest-side",
        metavar="N",
        type=int,
        help="instead of --size: the short side that a photo is resized to, as papers say it",
    )
    add("--photo-size", metavar="HxW", type=parse_size, help="original photo, default 480x640")
    add("--batch", metavar="N", type=int, nargs="+", default=[1, 4], help="sizes for throughput")
    add("--train-size", metavar="HxW", type=parse_size, default=(512, 512), help="default 512x512")
    add("--train-batch", metavar="N", type=int, default=2, help="images of a step, default 2")
    add("--micro-batches", metavar="N", type=int, default=1, help="parts of a step, default 1")
    add("--objects", metavar="N", type=int, default=8, help="on each image, default 8")
    add("--workers", metavar="N", type=int, nargs="*", default=[1, 2], help="default 1 2")
    add("--scoring-images", metavar="N", type=int, default=200, help="default 200")
    add("--own-data", action="store_true", help="input from config.data.train, not drawn photos")
    add("--protocol", choices=("original",), help="latency as the original's release measures it")
    add(
        "--skip-compile-times",
        action="store_true",
        help="compile once, with the usual compilation cache, where compiling takes long",
    )
    add("--warmup", metavar="N", type=int, help="untimed runs, default 2")
    add("--iterations", metavar="N", type=int, help="timed runs, default 10")
    add("--output", metavar="FILE", help="all results as JSON")
    add(
        "--serve",
        action="store_true",
        help="for comparisons: each line N on standard input makes N runs, answered as JSON",
    )
    return parser


def parse_size(text: str) -> tuple[int, int]:
    """Read HEIGHTxWIDTH, for argparse."""
    height, _, width = text.lower().partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH such as 640x864, got {text!r}")
    return int(height), int(width)


def size_fault(name: str, size: tuple[int, int] | None) -> str:
    """Say what is wrong with the size of a padded image; "" if nothing is."""
    if size is None or (min(size) > 0 and not size[0] % 32 and not size[1] % 32):
        return ""
    return f"--{name.replace('_', '-')} must be multiples of 32, got {size[0]}x{size[1]}"


def _check(arguments: argparse.Namespace) -> None:
    """Refuse numbers and sizes that cannot be.

    Raises:
      ValueError: all faults in one message.
    """
    positive = ("train_batch", "micro_batches", "objects", "scoring_images", "iterations")
    positive += ("shortest_side",)
    values = [(name, getattr(arguments, name)) for name in positive]
    values += [("batch", number) for number in arguments.batch]
    faults = [
        f"--{name.replace('_', '-')} must be at least 1, got {value}"
        for name, value in values
        if value is not None and value < 1
    ]
    at_least_0 = [("warmup", arguments.warmup or 0), *(("workers", n) for n in arguments.workers)]
    faults += [f"--{name} must be at least 0, got {n}" for name, n in at_least_0 if n < 0]
    faults += filter(None, (size_fault(n, getattr(arguments, n)) for n in ("size", "train_size")))
    if arguments.train_batch % max(arguments.micro_batches, 1):
        faults.append("--train-batch must be a multiple of --micro-batches")
    if arguments.size and arguments.shortest_side:
        faults.append("give --size or --shortest-side, not both")
    if arguments.protocol and (arguments.only or arguments.serve):
        faults.append("--protocol original measures one thing: leave --only and --serve out")
    if faults:
        raise ValueError("\n".join(faults))


def _repeats(arguments: argparse.Namespace) -> workloads.Repeats:
    default = (PROTOCOL_WARMUP, PROTOCOL_ITERATIONS) if arguments.protocol else (2, 10)
    given = arguments.warmup, arguments.iterations
    return workloads.Repeats(*(d if g is None else g for d, g in zip(default, given, strict=True)))


def measure(bench: Bench) -> dict[str, Any]:
    """Measure what the command line asks for; returns plain values."""
    arguments, repeats = bench.arguments, _repeats(bench.arguments)
    if arguments.protocol:
        wanted = [("protocol/original", lambda: inference.with_masks(bench.subject, 1))]
    else:
        wanted = chosen(bench, arguments.only)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    report: dict[str, Any] = {
        "command": machine.command(),
        "config": arguments.config,
        "weights": "named" if bench.has_weights else "drawn",
        "dtype": bench.config.model.dtype,
        "machine": machine.describe(),
        "results": [],
    }
    for name, make in wanted:
        start = time.perf_counter()
        with_compile_times = not arguments.skip_compile_times
        row = workloads.measure(name, make(), repeats, say, with_compile_times=with_compile_times)
        if arguments.protocol:
            row["fps"] = 1e3 / row["mean_ms"]
            row["protocol"] = PROTOCOL_NOTE.format(warmup=repeats.warmup)
        say(f"{name}: {row['p50_ms']:.1f} ms; {time.perf_counter() - start:.0f} s in all")
        report["results"].append(row)
        if arguments.output:
            write_json(arguments.output, report, indent=1)
    return report


def _serve(bench: Bench) -> int:
    wanted = chosen(bench, bench.arguments.only)
    if len(wanted) != 1:
        raise ValueError(
            f"--serve measures one thing: give --only with one of "
            f"{', '.join(name for name, _ in wanted)}, or see --help for {', '.join(PARTS)}"
        )
    ((name, make),) = wanted
    workloads.serve(name, make(), _repeats(bench.arguments), sys.stdin, sys.stdout)
    return 0


def text(report: Mapping[str, Any]) -> str:
    """The report for a terminal."""
    heading = ("", "p50 ms", "p90 ms", "images/s", "compile s", "cached s", "peak MiB", "temp MiB")
    facts = report["machine"]
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("jax", "jaxlib", "numpy"))
    load = facts["load_1_5_15"]
    lines = [
        statistics.table([heading, *map(_cells, report["results"])]),
        "",
        f"{facts['device']} ({facts['platform']}), {report['dtype']}, {report['weights']} weights, "
        f"{versions}",
        f"{facts['processor']}, {facts['usable_cores'] or facts['num_cores']} cores, threads "
        f"{facts['threads']['NPROC']}, load at the start "
        + (f"{load[0]:.2f}" if load else "unknown"),
        "Peak: of the device where it says so, else of the process during the timed runs. Compile",
        "and cached: XLA alone. Temp: what XLA plans besides arguments and results.",
    ]
    for row in report["results"]:
        lines += _notes(row)
    return "\n".join(lines)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    def number(value: float | None, digits: int = 0) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    peak = row["peak_device_mib"] if row["peak_device_mib"] is not None else row["peak_process_mib"]
    temporary = [memory["temporary_mib"] for memory in row["xla"].values() if memory]
    is_compiled = row.get("num_programs", 0) > 0
    return (
        row["name"],
        number(row["p50_ms"], 1),
        number(row["p90_ms"], 1),
        number(row["images_per_s"], 2),
        number(row["compile_cold_s"] if is_compiled else None, 1),
        number(row["compile_cached_s"] if is_compiled else None, 1),
        number(peak),
        number(max(temporary, default=None)),
    )


def _notes(row: Mapping[str, Any]) -> list[str]:
    """Lines on what a row says beside its times."""
    lines = []
    if "parts" in row:
        parts = ", ".join(
            f"{name.removesuffix('_ms').replace('_', ' ')} {ms:.1f}"
            for name, ms in row["parts"].items()
        )
        lines.append(f"{row['name']}, each part by itself, ms: {parts}")
    if "against_decoding" in row:
        found = row["against_decoding"]
        lines.append(
            f"{row['name']}: {found['batch_ms_per_image']:.2f} ms an image, decoding and resizing "
            f"the same alone {found['decode_and_resize_ms_per_image']:.2f} ms: "
            f"{found['ratio']:.2f} times as long ({found['rounds']} batches in turn, "
            f"{found['least_ratio']:.2f} to {found['most_ratio']:.2f})"
        )
    if "kept_masks_per_image" in row:
        lines.append(f"{row['name']}: {row['kept_masks_per_image']:g} masks kept an image")
    if "pycocotools_ms" in row:
        lines.append(
            f"{row['name']}: {row['ratio']['median']:.2f} times as fast as pycocotools "
            f"({row['ratio']['least']:.2f} to {row['ratio']['most']:.2f}; {row['in_turn_ms']:.0f} "
            f"and {row['pycocotools_ms']:.0f} ms), numbers equal to {row['largest_difference']:.0e}"
        )
    if "fps" in row:
        lines += [f"{row['fps']:.2f} frames per second (mean {row['mean_ms']:.1f} ms)"]
        lines += [row["protocol"]]
    return lines
