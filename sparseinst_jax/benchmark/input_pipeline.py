"""Workloads of the input pipeline: decoding and resizing, whole batches, several workers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from sparseinst_jax.benchmark.workloads import Workload
from sparseinst_jax.data.coco import CocoDataset, read_record
from sparseinst_jax.data.loader import make_batch, train_batches
from sparseinst_jax.data.plan import StepPlan, TrainPlan
from sparseinst_jax.data.transforms import resize_image

NO_END = 1_000_000_000  # steps; what is not taken is never read


def decode_and_resize(dataset: CocoDataset, plan: TrainPlan) -> Workload:
    """Read the photos of batches and resize each to the size that it is trained at; one core.

    The least that any pipeline does: what the others divide by.
    """
    steps = _steps(plan)

    def run() -> None:
        for image in next(steps).images:
            resize_image(read_record(dataset.records[image.position]), image.transform.size)

    return Workload(run, plan.batch_size, {"batch": plan.batch_size})


def batches(dataset: CocoDataset, plan: TrainPlan) -> Workload:
    """Make whole training batches, targets and all, on one core."""
    steps = _steps(plan)
    return Workload(
        lambda: make_batch(dataset.records, next(steps)),
        plan.batch_size,
        {"batch": plan.batch_size},
    )


def with_workers(dataset: CocoDataset, plan: TrainPlan, num_workers: int) -> Workload:
    """Take batches from worker processes as training does; 0 reads in threads of this process."""
    waiting: list[Iterator[Any]] = []

    def run() -> None:
        if not waiting:
            waiting.append(train_batches(dataset, plan, 0, NO_END, num_workers=num_workers))
        next(waiting[0])

    def close() -> dict[str, Any]:
        for iterator in waiting:
            iterator.close()  # type: ignore[attr-defined]
        return {}

    facts = {"batch": plan.batch_size, "num_workers": num_workers}
    return Workload(run, plan.batch_size, facts, close=close)


def _steps(plan: TrainPlan) -> Iterator[StepPlan]:
    return (plan.batch(step) for step in itertools.count())
