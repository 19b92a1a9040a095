"""Workloads of the input pipeline: decoding and resizing, whole batches, several workers."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from sparseinst_jax.cli.measuring.statistics import speed_ratio
from sparseinst_jax.cli.measuring.workloads import Clock, Workload
from sparseinst_jax.data.coco import CocoDataset
from sparseinst_jax.data.loader import make_batch, train_batches
from sparseinst_jax.data.plan import StepPlan, TrainPlan

NO_END = 1_000_000_000  # steps; what is not taken is never read
ROUNDS = 40  # batches of which both are timed in turn


def decode_and_resize(dataset: CocoDataset, plan: TrainPlan) -> Workload:
    """Read the photos of batches and resize each to the size that it is trained at; one core.

    The least that any pipeline does: what the others divide by.
    """
    steps = _steps(plan)
    return Workload(
        lambda: _decode_and_resize(dataset, next(steps)),
        plan.batch_size,
        {"batch": plan.batch_size},
    )


def batches(dataset: CocoDataset, plan: TrainPlan, clock: Clock = time.perf_counter) -> Workload:
    """Make whole training batches, targets and all, on one core.

    Its details time it in turn with decoding and resizing alone, of the same images.
    """
    steps = _steps(plan)

    def in_turn() -> dict[str, Any]:
        least, whole = [], []
        for number in range(ROUNDS):
            step = next(steps)
            todo = [(least, _decode_and_resize, dataset), (whole, make_batch, dataset.records)]
            for times, work, source in todo[:: 1 if number % 2 else -1]:
                start = clock()
                work(source, step)
                times.append([1e3 * (clock() - start) / plan.batch_size])
        ratio = speed_ratio(whole, least)
        return {
            "against_decoding": {
                "rounds": ROUNDS,
                "decode_and_resize_ms_per_image": float(np.median(least)),
                "batch_ms_per_image": float(np.median(whole)),
                "ratio": ratio.median,
                "least_ratio": ratio.least,
                "most_ratio": ratio.most,
            }
        }

    return Workload(
        lambda: make_batch(dataset.records, next(steps)),
        plan.batch_size,
        {"batch": plan.batch_size},
        details=in_turn,
    )


def _decode_and_resize(dataset: CocoDataset, step: StepPlan) -> None:
    """Pillow alone, straight to the final size: without checks, orientation, crop and flip."""
    for image in step.images:
        height, width = image.transform.size
        with Image.open(dataset.records[image.position].open()) as photo:
            resized = photo.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        np.asarray(resized)


def with_workers(dataset: CocoDataset, plan: TrainPlan, num_workers: int) -> Workload:
    """Take batches from worker processes as training does; 0 reads in threads of this process.

    One run takes one batch of each process: they arrive together.
    """
    waiting: list[Iterator[Any]] = []
    number = max(num_workers, 1)

    def run() -> None:
        if not waiting:
            waiting.append(train_batches(dataset, plan, 0, NO_END, num_workers=num_workers))
        for _ in range(number):
            next(waiting[0])

    def close() -> dict[str, Any]:
        for iterator in waiting:
            iterator.close()  # type: ignore[attr-defined]
        return {}

    facts = {"batch": plan.batch_size, "num_workers": num_workers}
    return Workload(run, number * plan.batch_size, facts, close=close)


def _steps(plan: TrainPlan) -> Iterator[StepPlan]:
    return (plan.batch(step) for step in itertools.count())
