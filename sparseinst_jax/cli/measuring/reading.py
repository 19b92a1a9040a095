"""Workloads of reading: decoding and resizing photos, whole batches, several workers."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from sparseinst_jax.cli.measuring.timing import Clock, Workload, speed_ratio
from sparseinst_jax.data.coco import CocoDataset, load_coco
from sparseinst_jax.data.loader import make_batch, train_batches
from sparseinst_jax.data.plan import StepPlan, TrainPlan
from sparseinst_jax.data.shapes import draw_shapes_dataset

NO_END = 1_000_000_000  # steps; what is not taken is never read
ROUNDS = 40  # batches, timed alternately
JPEG_QUALITY = 90


def decode_and_resize(dataset: CocoDataset, plan: TrainPlan) -> Workload:
    """Read the photos of batches and resize each to the size that it is trained at; one core.

    The least that any pipeline does: what the others divide by.
    """
    steps, number = map(plan.batch, itertools.count()), plan.batch_size
    return Workload(lambda: _decode_and_resize(dataset, next(steps)), number, {"batch": number})


def batches(dataset: CocoDataset, plan: TrainPlan, clock: Clock = time.perf_counter) -> Workload:
    """Make whole training batches, targets and all, on one core.

    Its details time it alternately with decoding and resizing alone, of the same images.
    """
    steps, number = map(plan.batch, itertools.count()), plan.batch_size

    def in_turn() -> dict[str, Any]:
        least, whole = [], []
        for turn in range(ROUNDS):
            step = next(steps)
            todo = [(least, _decode_and_resize, dataset), (whole, make_batch, dataset.records)]
            for samples, work, source in todo[:: 1 if turn % 2 else -1]:
                start = clock()
                work(source, step)
                samples.append([1e3 * (clock() - start) / number])
        alone, batch = float(np.median(least)), float(np.median(whole))
        ratio = speed_ratio(whole, least)
        note = (
            f"{batch:.2f} ms an image, decoding and resizing the same alone {alone:.2f} ms: "
            f"{ratio.median:.2f} times as long ({ROUNDS} batches alternately, {ratio.least:.2f} to "
            f"{ratio.most:.2f})"
        )
        found = {"decode_and_resize_ms_per_image": alone, "batch_ms_per_image": batch}
        return {"against_decoding": {"rounds": ROUNDS, **found, **ratio._asdict()}, "note": note}

    run = lambda: make_batch(dataset.records, next(steps))  # noqa: E731
    return Workload(run, number, {"batch": number}, details=in_turn)


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

    def close() -> None:
        for iterator in waiting:
            iterator.close()  # type: ignore[attr-defined]

    facts = {"batch": plan.batch_size, "num_workers": num_workers}
    return Workload(run, number * plan.batch_size, facts, close=close)


def draw_photos(folder: Path, number: int, size: tuple[int, int]) -> CocoDataset:
    """Draw shapes of (height, width) pixels, a quarter of them upright, and keep them as JPEG.

    They are blurred a little: photos are smoother than drawings, and faster to decode.
    """
    draw_shapes_dataset(folder, number, 1, image_size=(min(size), max(size)))
    for path in (folder / "images" / "train").glob("*.png"):
        photo = Image.open(path).filter(ImageFilter.GaussianBlur(1.5))
        photo.save(path.with_suffix(".jpg"), quality=JPEG_QUALITY)
    json = folder / "train.json"
    json.write_text(json.read_text().replace(".png", ".jpg"))
    return load_coco(json, folder / "images" / "train")
