"""Workloads of scoring: packing masks as run lengths, and COCO's twelve numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from sparseinst_jax.cli.measuring.timing import Workload
from sparseinst_jax.evaluation.coco_metrics import evaluate
from sparseinst_jax.inference import masks

DETECTIONS = 100  # an image, COCO's most
NUM_CLASSES = 80
NUM_DRAWN = 200  # images whose masks are drawn; others have them again, classes and scores new
CELL = 16  # pixels; drawn coarse and enlarged, masks are in pieces of this size and more


def encoding(size: tuple[int, int]) -> Workload:
    """Pack the masks of one image."""
    drawn = np.stack([_mask(np.random.default_rng([0, n]), size) for n in range(DETECTIONS)])
    transposed = np.ascontiguousarray(drawn.transpose(0, 2, 1))
    facts = {"photo_size": size, "masks": DETECTIONS}
    return Workload(lambda: masks.encode_transposed(transposed), 1, facts)


def scores(size: tuple[int, int], num_images: int, num_objects: int) -> Workload:
    """Match detections with annotations, and accumulate: all that `evaluate` does."""
    content, detections = drawn_results(size, num_images, num_objects)
    facts = {"photo_size": size, "objects_per_image": num_objects}
    facts |= {"detections_per_image": DETECTIONS}
    return Workload(lambda: evaluate(content, detections), num_images, facts)


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
        found = masks.encode_masks(np.roll(shapes[chosen], 3, axis=2))
        drawn.append((masks.encode_masks(shapes), found, chosen))
    annotations, detections = [], []
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
        values = zip(found, given.tolist(), rng.random(DETECTIONS).tolist(), strict=True)
        detections += [
            {"image_id": image_id, "category_id": label, "segmentation": rle, "score": score}
            for rle, label, score in values
        ]
    ids, (height, width) = range(1, num_images + 1), size
    images = [{"id": i, "file_name": f"{i}.jpg", "height": height, "width": width} for i in ids]
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
