"""The command `benchmark`: speed and memory of inference, training, input and scoring."""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparseinst_jax.cli import command_parser
from sparseinst_jax.cli.arguments import (
    add_model_arguments,
    check_arguments,
    is_exported,
    parse_command_line,
    parse_size,
    size_fault,
    words_of_overrides,
)
from sparseinst_jax.cli.measuring import host_work, machine, runtimes, timing
from sparseinst_jax.cli.measuring.workloads import USUAL_PHOTO, Bench
from sparseinst_jax.runtime.files import check_writable, write_json
from sparseinst_jax.runtime.messages import columns, next_commands

DESCRIPTION = """\
Measure speed and memory. Without --weights, --checkpoint or --workdir the weights are random: what
is measured does not depend on them, except for how many masks are kept (all of them then).

  sparseinst benchmark --config giam_r50 --only latency training --output here.json
  sparseinst benchmark --config giam_r50 --protocol original     as published frame rates
  sparseinst benchmark --config tiny --size 64x96 --train-size 64x64      to try it out

latency     batch 1: network; with_masks: and the kept masks at the photo's size, on the host;
            end_to_end: from the file to run lengths
throughput  the same two for each --batch
training    whole steps with real matching; and what each half and the matching take
input       decode_and_resize; batches: with targets, on one core, and alternately with the former;
            workers/N
post        the network's outputs to masks at the photo's size, every one kept
scoring     predict: a data set's files to its results, as an evaluation does; encode: run lengths
            of 100 masks; evaluate: COCO's numbers

With --runtime R [R ...] the model is exported, and each runtime is measured beside the package, in
alternating rounds; an exported file itself by --checkpoint model.onnx:

  sparseinst benchmark --config giam_r50 --runtime onnxruntime openvino openvino_bf16

Every part is compiled twice, with an empty compilation cache and with a full one, then warmed up.
The JSON is written after each part, so that what was measured before a failure is not lost.
"""
PROTOCOL_REPEATS, USUAL_REPEATS = timing.Repeats(100, 400), timing.Repeats(2, 10)
PROTOCOL_NOTE = (
    "The original's tools/test_net.py: batch 1, one photo at a time, network and post-processing, "
    "the first {warmup} left out, frames per second = 1 / mean. Differs: normalising and fetching "
    "the masks to the host are inside the time here, outside there; one photo is used all the time."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = parse_command_line(parser(), argv)
    check_arguments(arguments)
    _check(arguments)
    if arguments.output:
        check_writable(Path(arguments.output).parent, "--output")
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        bench = Bench(arguments, Path(folder))
        if arguments.runtime or arguments.exported or is_exported(arguments):
            return _measure_runtimes(bench, Path(folder))
        if arguments.serve:
            return _serve(bench)
        report = measure(bench)
    print(f"\n{text(report)}")
    if arguments.output:
        print(f"\n{arguments.output}")
    if arguments.config:
        words = [f"--config={arguments.config}", *words_of_overrides(arguments)]
        print("", next_commands(["sparseinst", "summary", *words]), sep="\n")
    return 0


def _measure_runtimes(bench: Bench, folder: Path) -> int:
    """Measure exported files, beside the package unless the model is one; alternately."""
    arguments = bench.arguments
    if arguments.only or arguments.protocol or arguments.serve:
        raise ValueError(
            "exported files are measured in one way, network and with_masks: leave --only,"
            " --protocol and --serve out, or --runtime and --exported"
        )
    note = functools.partial(print, file=sys.stderr, flush=True)
    report = {"command": machine.command(), "machine": machine.describe()}
    rows = runtimes.measure(bench, folder, _repeats(arguments), note)
    print("", *runtimes.text(rows), sep="\n")
    if arguments.output:
        write_json(arguments.output, {**report, "results": rows}, indent=1)
        print(f"\n{arguments.output}")
    return 0


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    made = command_parser("benchmark", DESCRIPTION)
    add_model_arguments(made, nargs="+", default=[])
    made.add_argument(
        "--exported",
        nargs="+",
        metavar="FILE",
        default=[],
        help="more files of `sparseinst export` to measure beside, such as an int8 one",
    )

    def add(name: str, metavar: str, more: str, **options: Any) -> None:
        made.add_argument(name, metavar=metavar, help=more, **options)

    add("--only", "PART", "parts, or names such as post/masks", nargs="+", default=[])
    add("--size", "HxW", "padded image of inference, default 640x864", type=parse_size)
    add("--photo-size", "HxW", "original photo, default 480x640", type=parse_size)
    add("--batch", "N", "sizes for throughput", type=int, nargs="+", default=[1, 4])
    add("--train-size", "HxW", "default 512x512", type=parse_size, default=(512, 512))
    add("--train-batch", "N", "images of a step, default 2", type=int, default=2)
    add("--objects", "N", "on each image, default 8", type=int, default=8)
    add("--workers", "N", "default 1 2", type=int, nargs="*", default=[1, 2])
    add("--scoring-images", "N", "default 200", type=int, default=200)
    add("--warmup", "N", "untimed runs, default 2", type=int)
    add("--iterations", "N", "timed runs, default 10", type=int)
    add("--output", "FILE", "all results as JSON")
    for name, more in {
        "--own-data": "input from config.data.train, not drawn photos",
        "--skip-compile-times": "compile once, with the usual compilation cache",
        "--serve": "for comparisons: each line N on standard input makes N runs, answered as JSON",
    }.items():
        made.add_argument(name, action="store_true", help=more)
    protocol = "latency as the original's release measures it"
    made.add_argument("--protocol", choices=("original",), help=protocol)
    return made


def _check(arguments: argparse.Namespace) -> None:
    """Refuse numbers and sizes that cannot be.

    Raises:
      ValueError: all faults in one message.
    """
    faults = [
        size_fault("--size", arguments.size),
        size_fault("--train-size", arguments.train_size),
    ]
    for names, least in (
        (("train_batch", "objects", "scoring_images", "iterations", "batch"), 1),
        (("warmup", "workers"), 0),
    ):
        for name in names:
            given = getattr(arguments, name)
            faults += [
                f"--{name.replace('_', '-')} must be at least {least}, got {number}"
                for number in (given if isinstance(given, list) else [given])
                if number is not None and number < least
            ]
    if arguments.protocol and (arguments.only or arguments.serve):
        faults.append("--protocol original measures one thing: leave --only and --serve out")
    if any(faults):
        raise ValueError("\n".join(filter(None, faults)))


def workloads(bench: Bench) -> dict[str, Callable[[], timing.Workload]]:
    """What can be measured: the name of each workload and what makes it."""
    given = bench.arguments
    photo = given.photo_size or USUAL_PHOTO
    found: dict[str, Callable[[], timing.Workload]] = {
        "latency/network": lambda: bench.network(1),
        "latency/with_masks": lambda: bench.with_masks(1),
        "latency/end_to_end": bench.end_to_end,
    }
    for n in given.batch:
        found[f"throughput/network/{n}"] = lambda n=n: bench.network(n)
        found[f"throughput/with_masks/{n}"] = lambda n=n: bench.with_masks(n)
    found |= {
        "training/step": bench.train_step,
        "input/decode_and_resize": lambda: host_work.decode_and_resize(*bench.train_input),
        "input/batches": lambda: host_work.batches(*bench.train_input),
    }
    for n in given.workers:
        found[f"input/workers/{n}"] = lambda n=n: host_work.with_workers(*bench.train_input, n)
    return found | {
        "post/masks": bench.post_processing,
        "scoring/predict": bench.whole_dataset,
        "scoring/encode": lambda: host_work.encoding(photo),
        "scoring/evaluate": lambda: host_work.scores(
            *host_work.drawn_results(photo, given.scoring_images, given.objects)
        ),
    }


def chosen(bench: Bench) -> dict[str, Callable[[], timing.Workload]]:
    """Find the workloads of --only: parts ("latency"), groups ("input/workers") and names.

    Raises:
      ValueError: there is no such part; lists what there is.
    """
    known, only = workloads(bench), bench.arguments.only
    wrong = [part for part in only if not any(f"{n}/".startswith(f"{part}/") for n in known)]
    if wrong:
        parts = dict.fromkeys(name.partition("/")[0] for name in known)
        raise ValueError(
            f"--only: there is nothing named {', '.join(wrong)}; expected some of "
            f"{', '.join(parts)}, or one of {', '.join(known)}"
        )
    meant = tuple(f"{part}/" for part in only) or ("",)
    return {name: make for name, make in known.items() if f"{name}/".startswith(meant)}


def _repeats(arguments: argparse.Namespace) -> timing.Repeats:
    usual = PROTOCOL_REPEATS if arguments.protocol else USUAL_REPEATS
    given = {"warmup": arguments.warmup, "iterations": arguments.iterations}
    return usual._replace(**{name: n for name, n in given.items() if n is not None})


def measure(bench: Bench) -> dict[str, Any]:
    """Measure what the command line asks for; returns plain values."""
    arguments, repeats = bench.arguments, _repeats(bench.arguments)
    wanted = {"protocol/original": lambda: bench.with_masks(1)}
    wanted = wanted if arguments.protocol else chosen(bench)
    report: dict[str, Any] = {
        "command": machine.command(),
        "config": arguments.config,
        "weights": "named" if bench.has_weights else "random",
        "dtype": bench.config.model.dtype,
        "machine": machine.describe(),
        "results": [],
    }
    note = functools.partial(print, file=sys.stderr, flush=True)
    for name, make in wanted.items():
        row = machine.measure(
            name, make(), repeats, note, with_compile_times=not arguments.skip_compile_times
        )
        if arguments.protocol:
            row["fps"] = 1e3 / row["mean_ms"]
            row["protocol"] = PROTOCOL_NOTE.format(warmup=repeats.warmup)
        note(f"{name}: {row['p50_ms']:.1f} ms")
        report["results"].append(row)
        if arguments.output:
            write_json(arguments.output, report, indent=1)
    return report


def _serve(bench: Bench) -> int:
    wanted = chosen(bench)
    if len(wanted) != 1:
        raise ValueError(f"--serve measures one thing: give --only with one of {', '.join(wanted)}")
    ((name, make),) = wanted.items()
    workload, warmup = make(), _repeats(bench.arguments).warmup

    def result(samples: list[float]) -> dict[str, Any]:
        return {**machine.result(name, workload, samples), "machine": machine.describe()}

    timing.serve(workload, warmup, sys.stdin, sys.stdout, result)
    return 0


def text(report: Mapping[str, Any]) -> str:
    """The report for a terminal."""
    heading = ("", "p50 ms", "p90 ms", "images/s", "compile s", "cached s", "peak MiB", "temp MiB")
    facts, load = report["machine"], report["machine"]["load_1_5_15"]
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("jax", "jaxlib", "numpy"))
    return "\n".join(
        [
            *columns([heading, *map(_cells, report["results"])]),
            "",
            f"{facts['device']} ({facts['platform']}), {report['dtype']}, {report['weights']} "
            f"weights, {versions}",
            f"{facts['processor']}, {facts['usable_cores'] or facts['num_cores']} cores, threads "
            f"{facts['threads']['NPROC']}, load at the start "
            + (f"{load[0]:.2f}" if load else "unknown"),
            "Peak: of the device where it reports one, else of the process during the timed runs.",
            "Compile and cached: XLA alone. Temp: what XLA plans besides arguments and results.",
            *(f"{row['name']}: {row['note']}" for row in report["results"] if "note" in row),
            *(
                f"{row['fps']:.2f} frames per second (mean {row['mean_ms']:.1f} ms)\n"
                f"{row['protocol']}"
                for row in report["results"]
                if "fps" in row
            ),
        ]
    )


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
