"""The command `benchmark`: speed and memory of inference, training, input and scoring."""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from sparseinst_jax.cli.arguments import (
    add_model_arguments,
    check_arguments,
    open_model,
    parse_command_line,
    parse_size,
    size_fault,
    stored_config,
)
from sparseinst_jax.cli.measuring import inference, machine, reading, scoring, timing, training
from sparseinst_jax.data.coco import CocoDataset
from sparseinst_jax.inference.predictor import Predictor
from sparseinst_jax.models.trees import Tree, functional
from sparseinst_jax.runtime import process
from sparseinst_jax.runtime.files import check_writable, write_json
from sparseinst_jax.setup import builders, datasets
from sparseinst_jax.setup.config import load_config
from sparseinst_jax.setup.loading import build_predictor
from sparseinst_jax.setup.run import make_plan
from sparseinst_jax.training import optimizer

Size = tuple[int, int]
Makers = dict[str, Callable[[], timing.Workload]]
NUM_PHOTOS = 32  # drawn for the input pipeline and for whole predictions
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
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("sparseinst benchmark", None, DESCRIPTION, formatter_class=raw)
    add_model_arguments(parser)

    def add(name: str, metavar: str, more: str, **options: Any) -> None:
        parser.add_argument(name, metavar=metavar, help=more, **options)

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
        parser.add_argument(name, action="store_true", help=more)
    protocol = "latency as the original's release measures it"
    parser.add_argument("--protocol", choices=("original",), help=protocol)
    return parser


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


class Bench:
    """The model and the data of a command line, each made when it is first needed.

    Args:
      arguments: of `sparseinst benchmark`.
      folder: for photos that are drawn.
    """

    def __init__(self, arguments: argparse.Namespace, folder: Path):
        self.arguments, self._folder = arguments, folder
        self._photos: dict[Size, CocoDataset] = {}

    @functools.cached_property
    def config(self) -> Any:
        """The configuration; images are resized to fill the padded image that was asked for."""
        config, size = stored_config(self.arguments), self.arguments.size
        return config if size is None else _changed(config, {"data.eval_size": sorted(size)})

    @property
    def has_weights(self) -> bool:
        """Whether weights are named; otherwise they are random."""
        arguments = self.arguments
        return bool(arguments.weights or arguments.checkpoint or arguments.workdir)

    def _network(self) -> tuple[Callable[..., Any], Tree, Tree, int, Any]:
        """Build the pure function, parameters, statistics; the number of classes; the module.

        Built each time: training has its own parameters, and these would be kept beside them.
        """
        number, seed, weights = scoring.NUM_CLASSES, self.config.seed, None
        if self.has_weights:
            predictor = open_model(self.arguments).predictor
            number, seed, weights = len(predictor.class_names), None, predictor.weights
        frozen = self.config.train.frozen_stages
        model = builders.build_model(self.config.model, number, seed, frozen)
        apply, *random = functional(model)
        # One copy for all of inference; on a CPU "the device" is the same memory.
        params, statistics = jax.device_put(weights or tuple(random))
        return apply, params, statistics, number, model

    @functools.cached_property
    def subject(self) -> inference.Subject:
        """What inference is measured on."""
        apply, params, statistics, number, _ = self._network()
        size = self.arguments.size or inference.USUAL_SIZE
        photo_size = self.arguments.photo_size or inference.usual_photo(size)
        inference.valid_size(photo_size, size)

        def make_predictor(batch: int) -> Predictor:
            given = {"data.eval_size": sorted(size), "eval.batch_size": batch}
            names = [f"class {i + 1}" for i in range(number)]
            ids, weights = list(range(1, number + 1)), (params, statistics)
            return build_predictor(_changed(self.config, given), apply, *weights, names, ids)

        counts = builders.num_masks(self.config.model), number
        return inference.Subject(
            apply, params, statistics, make_predictor, *counts, size, photo_size
        )

    def photos(self, size: Size) -> CocoDataset:
        """Photos of a size, drawn once."""
        if size not in self._photos:
            folder = self._folder / f"{size[0]}x{size[1]}"
            self._photos[size] = reading.draw_photos(folder, NUM_PHOTOS, size)
        return self._photos[size]

    @functools.cached_property
    def train_input(self) -> tuple[CocoDataset, Any]:
        """`config.data.train` with --own-data, else drawn photos; and the plan of their batches."""
        if self.arguments.own_data:
            datasets.draw_missing_data(self.config)
            dataset = datasets.load_train(self.config)
        else:
            dataset = self.photos(self.arguments.photo_size or inference.USUAL_PHOTO)
        size = {"train.batch_size": self.arguments.train_batch}
        return dataset, make_plan(_changed(self.config, size), dataset)

    def train_step(self) -> timing.Workload:
        """Build the workload of training."""
        process.unmap_freed_blocks()  # as `train` does
        given, settings = self.arguments, self.config.train
        apply, params, statistics, number, model = self._network()
        adamw = optimizer.make_optimizer(
            params,
            settings.learning_rate,
            settings.weight_decay,
            settings.gradient_clip_norm,
            optimizer.rules_of(model),
        )
        batch = training.random_batch(given.train_batch, given.train_size, given.objects, number)
        objective = builders.build_objective(self.config, apply)
        return training.step(objective, adamw, params, statistics, batch)

    def makers(self) -> Makers:
        """What can be measured: the name of each workload and what makes it."""
        given, subject = self.arguments, lambda: self.subject
        photo = given.photo_size or inference.USUAL_PHOTO
        drawn = photo, given.scoring_images, given.objects
        photos = lambda: self.photos(self.subject.photo_size)  # noqa: E731
        found: Makers = {
            "latency/network": lambda: inference.network(subject(), 1),
            "latency/with_masks": lambda: inference.with_masks(subject(), 1),
            "latency/end_to_end": lambda: inference.end_to_end(subject(), photos()),
        }
        for n in given.batch:
            found[f"throughput/network/{n}"] = lambda n=n: inference.network(subject(), n)
            found[f"throughput/with_masks/{n}"] = lambda n=n: inference.with_masks(subject(), n)
        found |= {
            "training/step": self.train_step,
            "input/decode_and_resize": lambda: reading.decode_and_resize(*self.train_input),
            "input/batches": lambda: reading.batches(*self.train_input),
        }
        for n in given.workers:
            found[f"input/workers/{n}"] = lambda n=n: reading.with_workers(*self.train_input, n)
        return found | {
            "post/masks": lambda: inference.post_processing(subject()),
            "scoring/predict": lambda: inference.whole_dataset(subject(), photos()),
            "scoring/encode": lambda: scoring.encoding(photo),
            "scoring/evaluate": lambda: scoring.scores(*drawn),
        }

    def chosen(self) -> Makers:
        """Find the workloads of --only: parts ("latency"), groups ("input/workers") and names.

        Raises:
          ValueError: there is no such part; lists what there is.
        """
        known, only = self.makers(), self.arguments.only
        wrong = [part for part in only if not any(f"{n}/".startswith(f"{part}/") for n in known)]
        if wrong:
            parts = dict.fromkeys(name.partition("/")[0] for name in known)
            raise ValueError(
                f"--only: there is nothing named {', '.join(wrong)}; expected some of "
                f"{', '.join(parts)}, or one of {', '.join(known)}"
            )
        meant = tuple(f"{part}/" for part in only) or ("",)
        return {name: make for name, make in known.items() if f"{name}/".startswith(meant)}


def _changed(config: Any, values: Mapping[str, Any]) -> Any:
    """A copy of a configuration with other values, checked as those of a command line are."""
    texts = {k: str(tuple(v) if isinstance(v, list) else v) for k, v in values.items()}
    return load_config(config.to_dict(), texts)


def _repeats(arguments: argparse.Namespace) -> timing.Repeats:
    usual = PROTOCOL_REPEATS if arguments.protocol else USUAL_REPEATS
    given = arguments.warmup, arguments.iterations
    return timing.Repeats(*(u if g is None else g for u, g in zip(usual, given, strict=True)))


def measure(bench: Bench) -> dict[str, Any]:
    """Measure what the command line asks for; returns plain values."""
    arguments, repeats = bench.arguments, _repeats(bench.arguments)
    wanted = {"protocol/original": lambda: inference.with_masks(bench.subject, 1)}
    wanted = wanted if arguments.protocol else bench.chosen()
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
        row = timing.measure(
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
    wanted = bench.chosen()
    if len(wanted) != 1:
        raise ValueError(f"--serve measures one thing: give --only with one of {', '.join(wanted)}")
    ((name, make),) = wanted.items()
    timing.serve(name, make(), _repeats(bench.arguments), sys.stdin, sys.stdout)
    return 0


def text(report: Mapping[str, Any]) -> str:
    """The report for a terminal."""
    heading = ("", "p50 ms", "p90 ms", "images/s", "compile s", "cached s", "peak MiB", "temp MiB")
    facts, load = report["machine"], report["machine"]["load_1_5_15"]
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("jax", "jaxlib", "numpy"))
    return "\n".join(
        [
            timing.table([heading, *map(_cells, report["results"])]),
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
