"""Run a piece of work again and again, and summarise how long it takes.

Needs NumPy alone: benchmarks/ times PyTorch with it, where there is neither JAX nor this package.
"""

from __future__ import annotations

import contextlib
import json
import platform
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

Clock = Callable[[], float]
MIB = 2**20


class Workload(NamedTuple):
    """What is measured.

    Attributes:
      launch: does it once; may leave work on its way through the device.
      images: how many images one run handles.
      facts: sizes and the like, plain values for the result.
      wait: takes what `launch` returned, and waits for all of it.
      compiled: makes the compiled functions by name, for their planned memory.
      details: called after the timing; more results.
      close: called at the end.
    """

    launch: Callable[[], Any]
    images: int
    facts: Mapping[str, Any]
    wait: Callable[[Any], Any] = lambda result: result
    compiled: Callable[[], Mapping[str, Any]] = dict
    details: Callable[[], Mapping[str, Any]] = dict
    close: Callable[[], Any] = dict

    def run(self) -> Any:
        """Do it once, to the end."""
        return self.wait(self.launch())


class Repeats(NamedTuple):
    """How often a workload runs before it is timed, and how often it is timed.

    Attributes:
      warmup: runs that are not timed.
      iterations: samples.
      queue: launches of a sample, with one wait after them.
      seconds: no more samples after so many, once there are three.
    """

    warmup: int
    iterations: int
    queue: int = 1
    seconds: float = float("inf")


def timed(workload: Workload, repeats: Repeats, clock: Clock = time.perf_counter) -> list[float]:
    """Run and time: milliseconds of one launch in each sample."""
    for _ in range(repeats.warmup):
        workload.run()
    samples, spent, result = [], 0.0, None
    while len(samples) < repeats.iterations and (len(samples) < 3 or spent < repeats.seconds):
        start = clock()
        for _ in range(repeats.queue):
            result = workload.launch()
        workload.wait(result)
        seconds = clock() - start
        spent += seconds
        samples.append(1e3 * seconds / repeats.queue)
    return samples


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Summarise timings in milliseconds: median, ninth decile, mean and shortest."""
    p50, p90 = map(float, np.percentile(samples, [50, 90]))
    mean, least = float(np.mean(samples)), float(np.min(samples))
    return {"p50_ms": p50, "p90_ms": p90, "mean_ms": mean, "least_ms": least}


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


def serve(
    workload: Workload,
    warmup: int,
    orders: Iterable[str],
    answers: TextIO,
    result: Callable[[list[float]], Mapping[str, Any]],
    clock: Clock = time.perf_counter,
) -> None:
    """Measure when asked, so that two programs can be measured alternately.

    Warms up and answers `{"ready": true}`; then each line of `orders` is a number of runs, answered
    by `{"ms": [...]}`; after the last line what `result` makes of all samples is answered, and the
    process's peak memory. Answers are lines of JSON.
    """

    def answer(**value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    try:
        timed(workload, Repeats(max(warmup, 1), 0), clock)
        with_compilation, samples = peak_process_mib(), []
        own = {"peak_is_of_this_part": forget_peak()}
        answer(ready=True)
        for line in orders:
            block = timed(workload, Repeats(0, int(line)), clock)
            samples += block
            answer(ms=block)
        own |= {"peak_process_mib": peak_process_mib()}
        answer(**result(samples), **own, peak_with_compilation_mib=with_compilation)
    finally:
        workload.close()


def forget_peak() -> bool:
    """Reset the process's peak memory; False where the system cannot, as outside Linux."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def peak_process_mib() -> float | None:
    """Return the most memory that this process has held in RAM, in MiB; None if unknown."""
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text()
        if peak := re.search(r"^VmHWM:\s*(\d+)", status, re.MULTILINE):
            return int(peak[1]) / 1024
    with contextlib.suppress(ImportError):
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most / (MIB if platform.system() == "Darwin" else 1024)
    return None
