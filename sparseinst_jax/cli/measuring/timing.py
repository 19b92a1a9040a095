"""Measure one thing: compiled once cold and once cached, warmed up, repeated, summarised."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TextIO

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from sparseinst_jax.cli.measuring import machine
from sparseinst_jax.runtime.process import COMPILED

Clock = Callable[[], float]
_CACHE_EVERYTHING = {
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


class Times(NamedTuple):
    """Repeated timings of one thing in milliseconds: median, ninth decile, mean and shortest."""

    p50: float
    p90: float
    mean: float
    least: float


def times(samples: Sequence[float]) -> Times:
    """Summarise timings in milliseconds; there must be at least one."""
    p50, p90 = np.percentile(samples, [50, 90])
    return Times(float(p50), float(p90), float(np.mean(samples)), float(np.min(samples)))


class Ratio(NamedTuple):
    """How many times as fast one is as another, measured in alternating rounds.

    Attributes:
      median: of the rounds' ratios, each of them of the two medians of one round.
      least, most: the extreme rounds.
      of_medians: ratio of the two medians over all rounds.
    """

    median: float
    least: float
    most: float
    of_medians: float


def speed_ratio(theirs: Sequence[Sequence[float]], ours: Sequence[Sequence[float]]) -> Ratio:
    """Compare timings [rounds][samples] that were taken alternately; above 1 ours is faster.

    Raises:
      ValueError: the numbers of rounds differ, or there is none.
    """
    if len(theirs) != len(ours) or not ours:
        raise ValueError(f"expected as many rounds of both, got {len(theirs)} and {len(ours)}")
    rounds = [float(np.median(a) / np.median(b)) for a, b in zip(theirs, ours, strict=True)]
    overall = float(np.median(np.concatenate(theirs)) / np.median(np.concatenate(ours)))
    return Ratio(float(np.median(rounds)), min(rounds), max(rounds), overall)


def table(lines: Sequence[Sequence[str]], texts: int = 1) -> str:
    """Lay out cells in columns under a heading; all but the first `texts` stand to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < texts else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


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
    compiled: Callable[[], Mapping[str, Any]] = dict
    details: Callable[[], Mapping[str, Any]] = dict
    close: Callable[[], Any] = dict


class Repeats(NamedTuple):
    """How often a workload runs before it is timed, and how often it is timed."""

    warmup: int
    iterations: int


def measure(
    name: str,
    workload: Workload,
    repeats: Repeats,
    report: Callable[[str], None],
    clock: Clock = time.perf_counter,
    with_compile_times: bool = True,
) -> dict[str, Any]:
    """Measure a workload; returns plain values, times in milliseconds."""
    try:
        report(f"{name}: compiling")
        found = first_calls(workload.run, clock) if with_compile_times else {}
        report(f"{name}: {repeats.warmup} runs to warm up, {repeats.iterations} to be timed")
        found["peak_is_of_this_part"] = machine.forget_peak()
        samples = timed(workload.run, repeats, clock)
        row = _row(name, workload, samples)
        return {**row, **found, "warmup": repeats.warmup, **workload.details()}
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
    return {
        "name": name,
        **{f"{key}_ms": value for key, value in summary._asdict().items()},
        "iterations": len(samples),
        "images": workload.images,
        "images_per_s": 1e3 * workload.images / summary.p50,
        # Before `compiled` compiles again, which takes memory of its own.
        "peak_process_mib": machine.peak_process_mib(),
        "peak_device_mib": machine.peak_device_mib(),
        "xla": {key: machine.compiled_memory(one) for key, one in workload.compiled().items()},
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
    """Measure when asked, so that two programs can be measured alternately.

    Warms up and answers `{"ready": true}`; then each line of `orders` is a number of runs, answered
    by `{"ms": [...]}`; after the last line the whole result is answered. Answers are lines of JSON.
    """

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    try:
        timed(workload.run, Repeats(max(repeats.warmup, 1), 0), clock)
        with_compilation, samples = machine.peak_process_mib(), []
        own = {"peak_is_of_this_part": machine.forget_peak()}
        answer({"ready": True})
        for line in orders:
            block = timed(workload.run, Repeats(0, int(line)), clock)
            samples += block
            answer({"ms": block})
        own |= {"peak_with_compilation_mib": with_compilation, "machine": machine.describe()}
        answer({**_row(name, workload, samples), **own})
    finally:
        workload.close()


class Compilations:
    """Numbers that grow while `watched` is open.

    Attributes:
      number: programs that were compiled or taken from the persistent cache.
      seconds: what that took, without tracing and lowering.
    """

    def __init__(self):
        self.number, self.seconds = 0, 0.0

    def __call__(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        """Take a report of JAX."""
        if event == COMPILED:
            self.number += 1
            self.seconds += duration_secs


@contextmanager
def watched() -> Iterator[Compilations]:
    """Count the compilations of this process while open, by what JAX itself reports."""
    compilations = Compilations()
    jax.monitoring.register_event_duration_secs_listener(compilations)
    try:
        yield compilations
    finally:
        jax.monitoring.unregister_event_duration_listener(compilations)


def first_calls(run: Callable[[], Any], clock: Clock) -> dict[str, Any]:
    """Call a function twice as if for the first time: nothing compiled, then all in the cache.

    Args:
      run: works to the end; what it has compiled before is forgotten.
      clock: seconds.

    Returns:
      Seconds of both calls (tracing, compiling and running), seconds of compilation alone in
      both, and the number of programs.
    """
    found: dict[str, Any] = {}
    names = (*_CACHE_EVERYTHING, "jax_compilation_cache_dir")
    before = {name: getattr(jax.config, name) for name in names}
    with tempfile.TemporaryDirectory(prefix="compilation-cache-") as folder:
        try:
            _configure({**_CACHE_EVERYTHING, "jax_compilation_cache_dir": folder})
            for name in ("cold", "cached"):
                jax.clear_caches()
                with watched() as compilations:
                    start = clock()
                    run()
                    found[f"first_call_{name}_s"] = clock() - start
                found[f"compile_{name}_s"] = compilations.seconds
                found["num_programs"] = compilations.number
        finally:
            _configure(before)
    return found


def _configure(settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # opened at the first compilation, it would keep its folder
