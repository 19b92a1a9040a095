"""Workloads of scoring: packing masks as run lengths, and COCO's twelve numbers."""

from __future__ import annotations

import contextlib
import functools
import io
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sparseinst_jax.cli.measuring.photos import NUM_CLASSES
from sparseinst_jax.cli.measuring.statistics import speed_ratio
from sparseinst_jax.cli.measuring.workloads import Workload
from sparseinst_jax.evaluation.coco_metrics import METRIC_NAMES, evaluate
from sparseinst_jax.inference import masks

DETECTIONS = 100  # an image, COCO's most
NUM_DRAWN = (
    200  # images whose masks are drawn; further ones have them again, classes and scores new
)
ROUNDS = 3  # in turn with pycocotools
CELL = 16  # pixels; drawn coarse and enlarged, masks are in pieces of this size and more


def encoding(size: tuple[int, int], seed: int = 0) -> Workload:
    """Pack the masks of one image."""
    drawn = np.stack([_mask(np.random.default_rng([seed, n]), size) for n in range(DETECTIONS)])
    transposed = np.ascontiguousarray(drawn.transpose(0, 2, 1))
    facts = {"photo_size": size, "masks": DETECTIONS}
    return Workload(lambda: masks.encode_transposed(transposed), 1, facts)


def scores(size: tuple[int, int], num_images: int, num_objects: int, seed: int = 0) -> Workload:
    """Match detections with annotations, and accumulate: all that `evaluate` does.

    Half of each image's annotations are found, shifted by a few pixels; the other detections are
    wrong. Scores are random. After the timing, rounds in turn with pycocotools.
    """
    content, detections = _drawn(size, num_images, num_objects, seed)
    facts = {
        "photo_size": size,
        "detections_per_image": DETECTIONS,
        "objects_per_image": num_objects,
    }

    return Workload(
        lambda: evaluate(content, detections),
        num_images,
        facts,
        details=lambda: compare(content, detections),
    )


def compare(content: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Score with pycocotools and with `evaluate` in turn; plain values, times in milliseconds."""
    theirs, ours, numbers, metrics = [], [], np.zeros(0), None
    for _ in range(ROUNDS):
        copies = [dict(entry) for entry in results]  # `loadRes` writes into them
        start = time.perf_counter()
        numbers = with_pycocotools(content, copies).stats
        between = time.perf_counter()
        metrics = evaluate(content, results)
        ours.append([1e3 * (time.perf_counter() - between)])
        theirs.append([1e3 * (between - start)])
    assert metrics is not None, "there is a round"
    own = np.array([metrics[name] for name in METRIC_NAMES])
    return {
        "AP": metrics["AP"],
        "pycocotools_ms": float(np.median(theirs)),
        "in_turn_ms": float(np.median(ours)),
        "ratio": speed_ratio(theirs, ours)._asdict(),
        "largest_difference": float(np.abs(own - numbers).max()),
    }


def with_pycocotools(content: Mapping[str, Any], results: list[dict[str, Any]]) -> Any:
    """Score as pycocotools' own examples do, without a print; returns its `COCOeval`.

    Args:
        content: of an annotation file; `id` from 1 on, `area` and `iscrowd` given.
        results: detections without boxes; pycocotools writes into them.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        truth: Any = COCO()
        entries = [dict(entry) for entry in content["annotations"]]
        truth.dataset = {**content, "annotations": entries}
        truth.createIndex()
        found: Any = truth.loadRes(results) if results else COCO()
        evaluation = COCOeval(truth, found, iouType="segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@functools.lru_cache(maxsize=NUM_DRAWN)
def _drawn_image(
    size: tuple[int, int], num_objects: int, seed: int, number: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], np.ndarray]:
    """Objects of an image, detections, and the object that each of these should be."""
    rng = np.random.default_rng([seed, number])
    drawn = np.stack([_mask(rng, size) for _ in range(num_objects)])
    chosen = rng.integers(0, num_objects, DETECTIONS)
    found = np.roll(drawn[chosen], 3, axis=2)
    return masks.encode_masks(drawn), masks.encode_masks(found), chosen


@functools.lru_cache(maxsize=4)
def _drawn(
    size: tuple[int, int], num_images: int, num_objects: int, seed: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A COCO json and a results file, as plain values."""
    annotations, detections = [], []
    for image_id in range(1, num_images + 1):
        objects, found, chosen = _drawn_image(size, num_objects, seed, image_id % NUM_DRAWN)
        rng = np.random.default_rng([seed, image_id, 1])
        labels = rng.integers(1, NUM_CLASSES + 1, num_objects)
        for rle, area, label in zip(objects, coco_mask.area(objects), labels, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(label),
                    "iscrowd": 0,
                    "area": int(area),
                    "segmentation": rle,
                }
            )
        is_right = rng.random(DETECTIONS) < 0.5
        wrong = rng.integers(1, NUM_CLASSES + 1, DETECTIONS)
        for rle, right, index, other in zip(found, is_right, chosen, wrong, strict=True):
            detections.append(
                {
                    "image_id": image_id,
                    "category_id": int(labels[index] if right else other),
                    "segmentation": rle,
                    "score": float(rng.random()),
                }
            )
    images = [
        {"id": i, "file_name": f"{i}.jpg", "height": size[0], "width": size[1]}
        for i in range(1, num_images + 1)
    ]
    categories = [{"id": i + 1, "name": f"class {i + 1}"} for i in range(NUM_CLASSES)]
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
