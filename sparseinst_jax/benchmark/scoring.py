"""Workloads of scoring: packing masks as run lengths, and COCO's twelve numbers."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from sparseinst_jax import masks
from sparseinst_jax.benchmark.photos import NUM_CLASSES
from sparseinst_jax.benchmark.workloads import Workload
from sparseinst_jax.evaluation.coco_metrics import evaluate

DETECTIONS = 100  # an image, COCO's most
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
    wrong. Scores are random.
    """
    content, detections = _drawn(size, num_images, num_objects, seed)
    facts = {
        "photo_size": size,
        "detections_per_image": DETECTIONS,
        "objects_per_image": num_objects,
    }

    def details() -> dict[str, Any]:
        return {"AP": evaluate(content, detections)["AP"]}

    return Workload(lambda: evaluate(content, detections), num_images, facts, details=details)


@functools.lru_cache(maxsize=4)
def _drawn(
    size: tuple[int, int], num_images: int, num_objects: int, seed: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A COCO json and a results file, as plain values."""
    annotations, detections = [], []
    for image_id in range(1, num_images + 1):
        rng = np.random.default_rng([seed, image_id])
        drawn = np.stack([_mask(rng, size) for _ in range(num_objects)])
        labels = rng.integers(1, NUM_CLASSES + 1, num_objects)
        for rle, mask, label in zip(masks.encode_masks(drawn), drawn, labels, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(label),
                    "iscrowd": 0,
                    "area": int(mask.sum()),
                    "bbox": masks.boxes_of([rle])[0].tolist(),
                    "segmentation": rle,
                }
            )
        chosen = rng.integers(0, num_objects, DETECTIONS)
        found = np.roll(drawn[chosen], 3, axis=2)
        is_right = rng.random(DETECTIONS) < 0.5
        wrong = rng.integers(1, NUM_CLASSES + 1, DETECTIONS)
        for rle, right, index, other in zip(
            masks.encode_masks(found), is_right, chosen, wrong, strict=True
        ):
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
