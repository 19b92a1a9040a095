"""What else a laptop could segment with, measured as `giam_lite0` is: from a photo to fifty masks.

    python benchmarks/alternatives.py [--number 20] [--only NAME ...]

For an environment with torch, torchvision, ultralytics and transformers; whichever is missing is
left out. Weights are random, so only speed and size mean something; each network is asked for fifty
objects of a photo of 480 x 640, resized to 320 x 427, on as many threads as there are cores.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

PHOTO, SHORT, LONG, NUM_CLASSES, NUM_OBJECTS = (480, 640), 320, 427, 3, 50
Run = Callable[[np.ndarray], np.ndarray]


def mask_rcnn() -> tuple[torch.nn.Module, Run]:
    """Mask R-CNN, ResNet-50 FPN: torchvision, BSD-3-Clause."""
    from torchvision.models import detection

    model = detection.maskrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=NUM_CLASSES + 1,
        min_size=SHORT,
        max_size=LONG,
        box_detections_per_img=NUM_OBJECTS,
        box_score_thresh=0.0,
        box_nms_thresh=1.0,
    ).eval()

    def run(photo: np.ndarray) -> np.ndarray:
        image = torch.from_numpy(photo).permute(2, 0, 1).float() / 255
        return (model([image])[0]["masks"][:, 0] > 0.5).numpy()

    return model, run


def yolo() -> tuple[torch.nn.Module, Run]:
    """YOLO11n-seg: ultralytics, AGPL-3.0."""
    from ultralytics import YOLO

    whole = YOLO("yolo11n-seg.yaml")
    options = dict(imgsz=LONG, conf=0.0, iou=1.0, max_det=NUM_OBJECTS, retina_masks=True)

    def run(photo: np.ndarray) -> np.ndarray:
        (found,) = whole.predict(photo, verbose=False, **options)
        return found.masks.data.numpy() > 0.5

    return whole.model, run


def mask2former() -> tuple[torch.nn.Module, Run]:
    """Mask2Former, Swin-T: transformers, Apache-2.0; its model's own licence is MIT."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    config = Mask2FormerConfig(num_queries=NUM_OBJECTS, num_labels=NUM_CLASSES)
    model = Mask2FormerForUniversalSegmentation(config).eval()

    def run(photo: np.ndarray) -> np.ndarray:
        image = torch.from_numpy(photo).permute(2, 0, 1)[None].float() / 255
        image = torch.nn.functional.interpolate(image, (SHORT, LONG), mode="bilinear")
        masks = model(image).masks_queries_logits
        return (torch.nn.functional.interpolate(masks, PHOTO, mode="bilinear")[0] > 0).numpy()

    return model, run


NETWORKS = {"mask_rcnn": mask_rcnn, "yolo": yolo, "mask2former": mask2former}


def measure(make: Callable[[], tuple[torch.nn.Module, Run]], number: int) -> dict[str, Any]:
    """Medians over so many photos, after three to warm up."""
    model, run = make()
    photo = np.random.default_rng(0).integers(0, 256, (*PHOTO, 3), np.uint8)
    clock, used = [], []
    with torch.inference_mode():
        run(photo)
        torch.set_num_threads(os.cpu_count() or 1)  # ultralytics leaves one of them free
        for _ in range(number + 3):
            start = time.perf_counter(), time.process_time()
            masks = run(photo)
            clock.append(time.perf_counter() - start[0])
            used.append(time.process_time() - start[1])
    return {
        "network": (make.__doc__ or "").rstrip("."),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "masks": len(masks),
        "clock_ms": round(1e3 * float(np.median(clock[3:])), 1),
        "cpu_ms": round(1e3 * float(np.median(used[3:])), 1),
        "MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }


def main() -> None:
    """Print one json a line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--number", type=int, default=20, help="photos")
    parser.add_argument("--only", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    given = parser.parse_args()
    torch.manual_seed(0)
    for name in given.only:
        try:
            print(json.dumps(measure(NETWORKS[name], given.number)), flush=True)
        except ImportError as error:
            print(f"{name} is left out: {error}", flush=True)


if __name__ == "__main__":
    main()
