"""What `sparseinst benchmark` measures on the host alone: reading photos, packing and scoring."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter
from pycocotools import mask as coco_mask

from sparseinst_jax.cli.measuring.timing import Clock, Workload, speed_ratio
from sparseinst_jax.data.coco import CocoDataset, load_coco
from sparseinst_jax.data.loader import make_batch, train_batches
from sparseinst_jax.data.plan import StepPlan, TrainPlan
from sparseinst_jax.data.shapes import draw_shapes_dataset
from sparseinst_jax.evaluation.coco_metrics import evaluate
from sparseinst_jax.runner import run_lengths
from sparseinst_jax.runner.prediction import coco_results

NO_END = 1_000_000_000  # steps; what is not taken is never read
ROUNDS = 40  # batches, timed alternately
JPEG_QUALITY = 90
DETECTIONS = 100  # an image, COCO's most
NUM_CLASSES = 80
NUM_DRAWN = 200  # images whose masks are drawn; others have them again, classes and scores new
CELL = 16  # pixels; drawn coarse and enlarged, masks are in pieces of this size and more


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


def encoding(size: tuple[int, int]) -> Workload:
    """Pack the masks of one image."""
    drawn = np.stack([_mask(np.random.default_rng([0, n]), size) for n in range(DETECTIONS)])
    transposed = np.ascontiguousarray(drawn.transpose(0, 2, 1))
    facts = {"photo_size": size, "masks": DETECTIONS}
    return Workload(lambda: run_lengths.encode_transposed(transposed), 1, facts)


def scores(content: dict[str, Any], detections: list[dict[str, Any]]) -> Workload:
    """Match detections of `drawn_results` with its annotations, and accumulate: COCO's numbers."""
    images, number = content["images"], len(content["images"])
    facts = {
        "photo_size": (images[0]["height"], images[0]["width"]),
        "objects_per_image": len(content["annotations"]) // number,
        "detections_per_image": DETECTIONS,
    }
    return Workload(lambda: evaluate(content, detections), number, facts)


def drawn_results(
    size: tuple[int, int], num_images: int, num_objects: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Draw a COCO json and a results file, as plain values.

    Half of each image's detections are its objects, shifted by a few pixels; the others have the
    wrong class. Scores are random.
    """
    drawn = []  # objects, detections, and the object that each of these should be
    for number in range(min(NUM_DRAWN, num_images)):
        rng = np.random.default_rng([0, number])
        shapes = np.stack([_mask(rng, size) for _ in range(num_objects)])
        chosen = rng.integers(0, num_objects, DETECTIONS)
        found = run_lengths.encode_masks(np.roll(shapes[chosen], 3, axis=2))
        drawn.append((run_lengths.encode_masks(shapes), found, chosen))
    annotations, detections, ids = [], [], range(1, NUM_CLASSES + 1)
    for image_id in range(1, num_images + 1):
        objects, found, chosen = drawn[(image_id - 1) % NUM_DRAWN]
        rng = np.random.default_rng([0, image_id, 1])
        labels = rng.integers(1, NUM_CLASSES + 1, num_objects)
        is_right = rng.random(DETECTIONS) < 0.5
        given = np.where(is_right, labels[chosen], rng.integers(1, NUM_CLASSES + 1, DETECTIONS))
        annotations += [
            {"image_id": image_id, "category_id": label, "iscrowd": 0, "segmentation": rle}
            | {"area": int(coco_mask.area(rle)), "id": len(annotations) + number}
            for number, (rle, label) in enumerate(zip(objects, labels.tolist(), strict=True), 1)
        ]
        detections += coco_results(image_id, found, rng.random(DETECTIONS), given - 1, ids)
    images = [
        {"id": i, "file_name": f"{i}.jpg", "height": size[0], "width": size[1]}
        for i in range(1, num_images + 1)
    ]
    categories = [{"id": i, "name": f"class {i}"} for i in ids]
    return {"images": images, "annotations": annotations, "categories": categories}, detections


def _mask(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """An ellipse with a rough border: uint8 [h, w]."""
    height, width = size
    rows, columns = np.ogrid[:height, :width]
    y, x = rng.random(2) * size
    half = np.array(size) * (0.03 + 0.22 * rng.random(2))
    coarse = rng.random((-(-height // CELL), -(-width // CELL)))
    rough = np.kron(coarse, np.ones((CELL, CELL)))[:height, :width]
    inside = ((rows - y) / half[0]) ** 2 + ((columns - x) / half[1]) ** 2 < 0.7 + 0.6 * rough
    inside[int(y), int(x)] = True  # never empty
    return inside.astype(np.uint8)
