"""One thing to be measured, and how: compiled once cold and once cached, warmed up, repeated."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TextIO

from sparseinst_jax.cli.measuring import compilation, machine
from sparseinst_jax.cli.measuring.statistics import times

Clock = Callable[[], float]


def _nothing() -> dict[str, Any]:
    return {}


class Workload(NamedTuple):
    """What is measured.

    Attributes:
      run: does it once, to the end: nothing is left on its way through the device.
      images: how many images one run handles.
      facts: sizes and the like, plain values for the result.
      compiled: makes the compiled functions by name, for their planned memory.
      details: called after the timing; more results.
      close: called at the end.
    """

    run: Callable[[], Any]
    images: int
    facts: Mapping[str, Any]
    compiled: Callable[[], Mapping[str, Any]] = _nothing
    details: Callable[[], Mapping[str, Any]] = _nothing
    close: Callable[[], Any] = _nothing


class Repeats(NamedTuple):
    """How often a workload runs before it is timed, and how often it is timed."""

    warmup: int
    iterations: int


def measure(
    name: str,
    workload: Workload,
    repeats: Repeats,
    say: Callable[[str], None],
    clock: Clock = time.perf_counter,
    with_compile_times: bool = True,
) -> dict[str, Any]:
    """Measure a workload; returns plain values, times in milliseconds."""
    try:
        say(f"{name}: compiling")
        found = compilation.first_calls(workload.run, clock) if with_compile_times else {}
        say(f"{name}: {repeats.warmup} runs to warm up, {repeats.iterations} to be timed")
        has_own_peak = machine.forget_peak()
        samples = timed(workload.run, repeats, clock)
        return {
            **_row(name, workload, samples),
            **found,
            "peak_is_of_this_part": has_own_peak,
            "warmup": repeats.warmup,
            **workload.details(),
        }
    finally:
        workload.close()


def timed(run: Callable[[], Any], repeats: Repeats, clock: Clock) -> list[float]:
    """Run and time: milliseconds of each of the timed runs."""
    for _ in range(repeats.warmup):
        run()
    samples = []
    for _ in range(repeats.iterations):
        start = clock()
        run()
        samples.append(1e3 * (clock() - start))
    return samples


def _row(name: str, workload: Workload, samples: list[float]) -> dict[str, Any]:
    summary = times(samples)
    # Before `compiled` compiles again, which takes memory of its own.
    peaks = {
        "peak_process_mib": machine.peak_process_mib(),
        "peak_device_mib": machine.peak_device_mib(),
    }
    return {
        "name": name,
        "p50_ms": summary.p50,
        "p90_ms": summary.p90,
        "mean_ms": summary.mean,
        "least_ms": summary.least,
        "iterations": summary.number,
        "images": workload.images,
        "images_per_s": 1e3 * workload.images / summary.p50,
        **peaks,
        "xla": {
            key: machine.compiled_memory(executable)
            for key, executable in workload.compiled().items()
        },
        **workload.facts,
    }


def serve(
    name: str,
    workload: Workload,
    repeats: Repeats,
    orders: Iterable[str],
    answers: TextIO,
    clock: Clock = time.perf_counter,
) -> None:
    """Measure when told to, so that two programs can be measured in turn.

    Warms up and answers `{"ready": true}`; then each line of `orders` is a number of runs, answered
    by `{"ms": [...]}`; after the last line the whole result is answered. Answers are lines of JSON.
    """

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    try:
        timed(workload.run, Repeats(max(repeats.warmup, 1), 0), clock)
        with_compilation = machine.peak_process_mib()
        has_own_peak = machine.forget_peak()
        answer({"ready": True})
        samples = []
        for line in orders:
            block = timed(workload.run, Repeats(0, int(line)), clock)
            samples += block
            answer({"ms": block})
        row = _row(name, workload, samples)
        answer(
            {
                **row,
                "peak_is_of_this_part": has_own_peak,
                "peak_with_compilation_mib": with_compilation,
                "machine": machine.describe(),
            }
        )
    finally:
        workload.close()
