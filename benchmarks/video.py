"""How fast a video is drawn, against the network alone: frames a second, and memory.

  python benchmarks/video.py --config giam_r50 --frames 300 [--size 720x1280] [--batch 8]

A clip of moving shapes is written and drawn by a network of random weights. The threshold is such
that about ten objects are drawn, and since random masks are noise, which no object looks like, a
disc is added to each mask, which outweighs it. "Network": frames that are ready in memory go
through the network and its selection. "With masks": and what is drawn of them is brought to the
frames' size and packed. "Host": what the host does for a frame, in one thread and part by part.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from sparseinst_jax.runtime import process

process.prepare_process()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402

from sparseinst_jax.cli.arguments import parse_size  # noqa: E402
from sparseinst_jax.data.classes import COCO_CATEGORY_IDS, COCO_CLASS_NAMES  # noqa: E402
from sparseinst_jax.models.families import FAMILIES  # noqa: E402
from sparseinst_jax.models.family import Family  # noqa: E402
from sparseinst_jax.models.trees import functional  # noqa: E402
from sparseinst_jax.runner import video  # noqa: E402
from sparseinst_jax.runner.predictor import BasePredictor  # noqa: E402
from sparseinst_jax.runner.run_lengths import encode_transposed  # noqa: E402
from sparseinst_jax.setup.builders import build_model  # noqa: E402
from sparseinst_jax.setup.config import load_config  # noqa: E402
from sparseinst_jax.setup.loading import build_predictor  # noqa: E402

SHOWN = 10  # objects in a picture, about
HOST_FRAMES = 12


def frame(number: int, size: tuple[int, int]) -> np.ndarray:
    """Shapes over a gradient, a little further than in the frame before."""
    height, width = size
    ramp = np.linspace(40, 200, width, dtype=np.uint8)
    picture = Image.fromarray(np.repeat(np.tile(ramp, (height, 1))[..., None], 3, axis=2))
    draw = ImageDraw.Draw(picture)
    for index in range(SHOWN):
        x = (index * width // SHOWN + 3 * number) % width
        y = (index * 2 + 1) * height // (2 * SHOWN)
        colour = (37 * index % 256, 91 * index % 256, 53 * index % 256)
        draw.ellipse((x, y - 40, x + 110, y + 50), fill=colour)
    return np.asarray(picture)


def with_discs(family: Family) -> Family:
    """The family with a disc in each mask; all of the network is computed as before."""

    def select(outputs: Any, **options: Any) -> Any:
        logits = outputs.mask_logits  # [B, N, H/4, W/4]
        height, width = logits.shape[-2:]
        number = jnp.arange(logits.shape[1])[:, None, None]
        y = (jnp.arange(height)[:, None] - (53 * number) % height) / (height / 10)
        x = (jnp.arange(width) - (37 * number) % width) / (width / 16)
        return family.select(
            outputs._replace(mask_logits=1e-3 * logits + 20 * (1 - x**2 - y**2)), **options
        )

    return dataclasses.replace(family, select=select)


def rate(run: Callable[[], object], frames: int) -> tuple[float, float]:
    """Frames a second of a call, and seconds of this process's CPU time for each."""
    start, cpu_start = time.perf_counter(), time.process_time()
    run()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return frames / seconds, cpu_seconds / frames


def host_ms(
    predictor: BasePredictor, clip: Path, drawn: Path, threshold: float
) -> dict[str, float]:
    """Milliseconds of CPU time for a frame of each thing that the host does."""
    frames: list[video.Frame] = []
    pictures: list[np.ndarray] = []

    def read() -> None:
        with video.VideoSource(clip) as source:
            frames[:] = itertools.islice(source, HOST_FRAMES)

    def draw() -> None:
        pictures[:] = [np.asarray(found.plot(threshold)) for found in predicted]

    def write() -> None:
        with video.VideoWriter(drawn, *video._CODECS[".mp4"], Fraction(30)) as writer:
            for each, picture in zip(frames, pictures, strict=True):
                writer.write(picture, each.time)

    read()
    predicted = [predictor(each.image, threshold) for each in frames]
    masks = np.ascontiguousarray(predicted[0].masks.transpose(0, 2, 1), np.uint8)
    parts: dict[str, Callable[[], object]] = {
        "read": read,
        "resize": lambda: [predictor.prepare(each.image) for each in frames],
        "pack": lambda: [encode_transposed(masks) for _ in frames],
        "draw": draw,
        "write": write,
    }
    return {
        name: round(1000 * min(rate(part, len(frames))[1] for _ in range(3)), 2)
        for name, part in parts.items()
    }


def main() -> None:
    """Measure, print a line and write json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="giam_r50")
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--size", type=parse_size, default=(720, 1280))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--processes", type=int, default=None)
    parser.add_argument("--output", default=None)
    arguments = parser.parse_args()
    config = load_config(arguments.config, {"eval.batch_size": arguments.batch})
    FAMILIES[config.model.family] = with_discs(FAMILIES[config.model.family])
    parts = functional(build_model(config.model, len(COCO_CLASS_NAMES), seed=0))
    predictor = build_predictor(config, *parts, COCO_CLASS_NAMES, COCO_CATEGORY_IDS)
    image = frame(0, arguments.size)
    best = np.sort(predictor(image).scores)[::-1]
    threshold = float(best[min(SHOWN, len(best)) - 1])
    config = load_config(config, {"eval.score_threshold": max(threshold, 0.005)})
    predictor = build_predictor(config, *parts, COCO_CLASS_NAMES, COCO_CATEGORY_IDS)
    is_cpu = jax.default_backend() == "cpu"
    processes = arguments.processes
    processes = (0 if is_cpu else os.cpu_count() or 1) if processes is None else processes
    number = arguments.frames
    with tempfile.TemporaryDirectory() as folder:
        clip, drawn = Path(folder) / "clip.mp4", Path(folder) / "drawn.mp4"
        with video.VideoWriter(clip, *video._CODECS[".mp4"], Fraction(30)) as writer:
            for index in range(number):
                writer.write(frame(index, arguments.size), Fraction(index, 30))
        ready = [predictor.prepare(frame(i, arguments.size)) for i in range(predictor.num_together)]

        def network() -> None:
            pending = []
            for _ in range(0, number, len(ready)):
                pending.append(predictor.start(ready))
                if len(pending) > 1:
                    jax.block_until_ready(pending.pop(0)[0].selection)
            jax.block_until_ready([each.selection for each in pending[0]])

        def with_masks() -> None:
            before = predictor.start(ready)
            for _ in range(len(ready), number, len(ready)):
                now = predictor.start(ready)
                for found in predictor.finish(before):
                    found.encode()
                before = now
            for found in predictor.finish(before):
                found.encode()

        for found in predictor.run(ready):
            found.encode()
        found_rates = {"network": rate(network, number), "with_masks": rate(with_masks, number)}
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

        def whole() -> None:
            done = video.predict_video(
                predictor, clip, drawn, threshold, num_processes=processes, stream=None
            )
            assert done.frames == number, done

        found_rates["video"] = rate(whole, number)  # everything is compiled by now
        found_rates["network_again"] = rate(network, number)
        host = host_ms(predictor, clip, drawn, threshold)
    row = {
        "config": arguments.config,
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "size": arguments.size,
        "frames": number,
        "batch": arguments.batch,
        "processes": processes,
        "shown": SHOWN,
        "frames_per_s": {name: round(value[0], 2) for name, value in found_rates.items()},
        "cpu_s_per_frame": {name: round(value[1], 4) for name, value in found_rates.items()},
        "host_ms_per_frame": host,
        "peak_mib_before": round(before),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    print(json.dumps(row))
    if arguments.output:
        Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
        with Path(arguments.output).open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
