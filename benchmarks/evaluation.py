"""How much of an evaluation's time the device has nothing to do.

Predicts a data set with drawn weights (every query is kept then, the dearest case), once to compile
and once to be measured. The device has something to do from when a compiled function is handed to
it until its result is there:

    python benchmarks/evaluation.py --config configs/giam_r50.py --config.data.eval_size="(320,427)"

Without `--annotations` and `--images` photos are drawn.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import jax

from sparseinst_jax.cli.arguments import add_config_arguments, parse_command_line
from sparseinst_jax.cli.measuring import machine, photos
from sparseinst_jax.data.coco import CocoDataset, load_coco
from sparseinst_jax.evaluation.evaluator import predict_dataset
from sparseinst_jax.inference import masks
from sparseinst_jax.models import layers
from sparseinst_jax.runtime import process
from sparseinst_jax.runtime.files import write_json
from sparseinst_jax.setup import builders
from sparseinst_jax.setup.config import load_config
from sparseinst_jax.setup.loading import build_predictor

PHOTO_SIZE, NUM_OBJECTS = (480, 640), 8  # where photos are drawn


class DeviceWatch:
    """Notes from when to when the device had something to do."""

    def __init__(self) -> None:
        self.spans: list[tuple[float, float]] = []
        self._waiting: SimpleQueue[tuple[float, Any] | None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._wait, daemon=True) for _ in range(4)]
        for thread in self._threads:
            thread.start()

    def watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same compiled function, noted."""

        def call(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments)
            self._waiting.put((start, result))
            return result

        return call

    def _wait(self) -> None:
        while (item := self._waiting.get()) is not None:
            start, result = item
            jax.block_until_ready(result)
            self.spans.append((start, time.perf_counter()))

    def busy(self) -> float:
        """Seconds in which there was something to do; ends the watch."""
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join()
        seconds, end = 0.0, -float("inf")
        for start, stop in sorted(self.spans):
            seconds += max(0.0, stop - max(start, end))
            end = max(end, stop)
        return seconds


def main() -> None:
    """Measure, print a line, and write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_config_arguments(parser)
    parser.add_argument("--annotations", metavar="FILE", help="a COCO json")
    parser.add_argument("--images", metavar="DIR", help="its folder of images")
    parser.add_argument("--photos", type=int, default=64, help="to be drawn, default 64")
    parser.add_argument("--workers", type=int, default=2, help="threads that read, default 2")
    parser.add_argument("--output", metavar="FILE", help="the result as JSON")
    arguments = parse_command_line(parser)
    config = load_config(arguments.config, arguments.overrides)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not arguments.annotations:
            photos.draw_photos(folder, arguments.photos, PHOTO_SIZE, NUM_OBJECTS)
        dataset = load_coco(
            arguments.annotations or folder / "annotations.json",
            arguments.images or folder / "images",
        )
        found = measure(config, dataset, arguments.workers)
    found |= {"command": machine.command(), "machine": machine.describe()}
    print(
        f"{found['images']} images, {found['masks']} masks, {found['seconds']:.1f} s: "
        f"{found['images_per_s']:.2f} images/s; device idle {100 * found['idle_share']:.1f} %"
    )
    if arguments.output:
        write_json(arguments.output, found, indent=1)


def measure(config: Any, dataset: CocoDataset, num_workers: int) -> dict[str, Any]:
    """Predict the data set twice and measure the second time; plain values."""
    model = builders.build_model(config.model, len(dataset.class_names), config.seed)
    predictor = build_predictor(
        config, *layers.functional(model), dataset.class_names, dataset.category_ids
    )
    predict_dataset(predictor, dataset, num_workers=num_workers)
    watch = DeviceWatch()
    predictor._forward = watch.watched(predictor._forward)
    masks._upsample_rows = watch.watched(masks._upsample_rows)
    masks._cut_columns = watch.watched(masks._cut_columns)
    start = time.perf_counter()
    results = predict_dataset(predictor, dataset, num_workers=num_workers)
    seconds = time.perf_counter() - start
    return {
        "images": len(dataset.records),
        "masks": len(results),
        "eval_size": list(config.data.eval_size),
        "workers": num_workers,
        "seconds": seconds,
        "images_per_s": len(dataset.records) / seconds,
        "idle_share": 1.0 - watch.busy() / seconds,
    }


if __name__ == "__main__":
    process.prepare_process()
    main()
