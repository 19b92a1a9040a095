"""Small networks on a CPU: their speed, and trials of recipes at equal minutes.

  python -m benchmarks.small_networks speed
  python -m benchmarks.small_networks trials --data DIR --seconds 1800 --seeds 0 1 2

`speed`: one photo of 480 x 640, padded to 320 x 448, random weights, every mask kept; and training
steps of 4 photos. Milliseconds a photo by the clock, and of processor time: where other programs
run, too, only the second means something.

`trials`: DIR holds train.json, val.json, images/train and images/val. Each recipe is stopped after
as much processor time; its learning rate has fallen by then, because its steps are counted from a
first run of twenty. AP is given for photos with one and with several objects, too. Hours.
With `--torch PYTHON`, an interpreter that has PyTorch, a trial of `finetune_lite` runs there, too
(torch_small.py): the same first weights, batches and rates, and the same scorer.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import subprocess
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sparseinst_jax.cli.measuring.workloads import random_batch
from sparseinst_jax.data.loader import train_batches
from sparseinst_jax.models.families import FAMILIES
from sparseinst_jax.models.ops import normalize_images
from sparseinst_jax.models.trees import functional
from sparseinst_jax.runtime import process
from sparseinst_jax.setup import builders
from sparseinst_jax.setup.config import load_config
from sparseinst_jax.setup.load import load
from sparseinst_jax.setup.loading import build_predictor
from sparseinst_jax.setup.run import first_state, make_run, make_step, resolve_schedule
from sparseinst_jax.setup.train import train
from sparseinst_jax.training.step import TrainState
from sparseinst_jax.weights.convert import ours_to_original
from sparseinst_jax.weights.network_files import write_arrays

PHOTO, PADDED, NUM_CLASSES, BATCH = (480, 640), (320, 448), 3, 4
LITE = "finetune_lite"
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "giam_lite0": ("giam_lite0", {}),
    "48 channels": ("giam_lite0", dict.fromkeys(("encoder_channels", "decoder_channels"), 48)),
    "96 channels": ("giam_lite0", dict.fromkeys(("encoder_channels", "decoder_channels"), 96)),
    "1 convolution": ("giam_lite0", {"decoder_convs": 1}),
    "4 convolutions": ("giam_lite0", {"decoder_convs": 4}),
    "1 group": ("giam_lite0", {"num_groups": 1}),
    "100 masks": ("giam_lite0", {"num_masks": 100}),
    "kernels of 16": ("giam_lite0", {"kernel_dim": 16}),
    "giam_lite0_large": ("giam_lite0_large", {}),
    "fastinst_lite0": ("fastinst_lite0", {}),
    "finetune_small": ("finetune_small", {}),
}
RECIPES: dict[str, tuple[str, dict[str, str]]] = {
    "from scratch": ("finetune_small", {}),
    "lite": (LITE, {}),
    "without things": (LITE, {"train.init_from": "lite0"}),
    "class rate 1": (LITE, {"train.class_rate": "1"}),
    "class rate 5": (LITE, {"train.class_rate": "5"}),
    "class rate 60": (LITE, {"train.class_rate": "60"}),
    "class weight 4": (LITE, {"objective.class_weight": "4"}),
    "rate 2e-3": (LITE, {"train.learning_rate": "2e-3"}),
    "rate 5e-4": (LITE, {"train.learning_rate": "5e-4"}),
    "backbone frozen": (LITE, {"train.frozen_stages": "5"}),
    "nothing frozen": (LITE, {"train.frozen_stages": "0"}),
    "one rate": (LITE, {"train.backbone_rate": "1.0"}),
    "average": (LITE, {"train.ema_decay": "0.99"}),
    "jitter": (LITE, {"data.augmentation": "lsj", "data.lsj_range": "(0.5, 1.5)"}),
    "nothing pasted": (LITE, {"data.copy_paste": "0.0"}),
    "1 group": (LITE, {"model.num_groups": "1"}),
    "20 masks": (LITE, {"model.num_masks": "20"}),
    "416 pixels": (
        LITE,
        {
            "data.train_sizes": "(416,)",
            "data.train_max_size": "555",
            "data.eval_size": "(416, 555)",
        },
    ),
    "fastinst": ("fastinst_lite0", {"train.lr_scaling": "none", "train.init_from": "lite0"}),
    **{
        f"{name}, lite0 alone": (
            LITE,
            {"train.init_from": "lite0"} | {f"model.{key}": str(x) for key, x in options.items()},
        )
        for name, (base, options) in VARIANTS.items()
        if base == "giam_lite0"
    },
}


def measure(run: Callable[[], Any], number: int, photos: int = 1) -> dict[str, float]:
    """Median milliseconds a photo by the clock, and the mean of the processor's."""
    run(), run()
    clock, start = [], time.process_time()
    for _ in range(number):
        began = time.perf_counter()
        run()
        clock.append(time.perf_counter() - began)
    used = time.process_time() - start
    return {
        "clock_ms": round(1e3 * float(np.median(clock)) / photos, 1),
        "cpu_ms": round(1e3 * used / number / photos, 1),
    }


def speed(name: str, number: int) -> dict[str, Any]:
    """Inference in three lengths, and a training step."""
    base, options = VARIANTS[name]
    sizes = {"data.eval_size": f"({PADDED[0]}, {PADDED[1]})", "eval.score_threshold": "0.0"}
    config = load_config(base, sizes)
    config.model.update(options)
    model = builders.build_model(config.model, NUM_CLASSES, 0, config.train.frozen_stages)
    apply, params, statistics = functional(model)
    names, ids = ["a", "b", "c"], [1, 2, 3]
    predictor = build_predictor(config, apply, params, statistics, names, ids)
    photo = np.random.default_rng(0).integers(0, 256, (*PHOTO, 3), np.uint8)
    images = np.zeros((1, *PADDED, 3), np.uint8)
    forward = jax.jit(
        lambda p, s, x: apply(p, s, normalize_images(x, np.array([PADDED])), train=False)[0]
    )
    placed = jax.device_put((params, statistics))
    found: dict[str, Any] = {
        "parameters": sum(np.size(x) for x in jax.tree.leaves(params)),
        "network": measure(lambda: jax.block_until_ready(forward(*placed, images)), number),
        "masks": measure(lambda: predictor(photo).masks, number),
        "run_lengths": measure(lambda: predictor(photo).to_coco(1), number),
        "num_masks": len(predictor(photo).scores),
        "inference_MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }
    step, _ = make_step(config, model, apply, params, jax.local_devices()[:1])
    states = [step.place(first_state(config, step, params, statistics))]
    form = FAMILIES[config.model.family].targets
    batch = random_batch(BATCH, PADDED, 5, NUM_CLASSES, form)

    def one_step() -> None:
        states[0], metrics = step(states[0], batch)
        jax.block_until_ready(metrics)

    found["training"] = measure(one_step, max(number // 4, 3), BATCH)
    found["frozen_stages"] = config.train.frozen_stages
    found["training_MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    return found


def trial(name: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Train a recipe for so many steps, or as many as its processor time allows, and score it."""
    data: Path = given.data
    base, changes = RECIPES[name]
    keys = {f"data.{part}.annotations": str(data / f"{part}.json") for part in ("train", "val")}
    keys |= {f"data.{part}.images": str(data / "images" / part) for part in ("train", "val")}
    keys |= {"seed": str(seed), "train.eval_every": "0", "train.checkpoint_every": "0"}
    keys |= {"train.batch_size": str(BATCH), "train.init_from": given.weights * (base == LITE)}
    keys |= changes
    if keys["train.init_from"] == "lite0":
        keys["train.init_from"] = given.weights.partition("+")[0]

    def with_schedule(steps: int) -> dict[str, str]:
        return keys | {
            "train.num_steps": f"{steps}",
            "train.warmup_steps": f"{min(100, steps // 10)}",
            "train.milestones": f"({steps * 7 // 10}, {steps * 9 // 10})",
        }

    def run(folder: Path, steps: int) -> float:
        start = time.process_time()
        train(base, folder, with_schedule(steps))
        return time.process_time() - start

    folder = given.output / f"{name} {seed}".replace(" ", "_")
    if (steps := given.steps) is None:  # twice, so that the second has no compilation
        first, second = (run(folder / f"timing_{steps}", steps) for steps in (5, 25))
        steps = max(round(given.seconds / max((second - first) / 20, 1e-3)), 50)
    used = run(folder / "run", steps)
    found = {"recipe": name, "seed": seed, "steps": steps, "cpu_seconds": round(used)}
    found |= score(load(folder / "run"), data)
    if given.torch:
        found["torch"] = torch_trial(given.torch, folder, base, with_schedule(steps), data)
    return found


def torch_trial(
    python: str, folder: Path, base: str, keys: dict[str, str], data: Path
) -> dict[str, Any]:
    """Train by torch_small.py what a configuration begins with, and score it."""
    start, learned = folder / "start.npz", folder / "learned.npz"
    write_start(start, load_config(base, keys), keys)
    script = Path(__file__).with_name("torch_small.py")
    command = [python, str(script), str(start), str(learned)]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    return json.loads(answer) | score(load(learned, config=base, overrides=keys), data)


def write_start(
    path: Path, config: Any, literal_keys: Collection[str] = (), own_steps: int = 5
) -> None:
    """Write what a run begins with and sees, and what its first steps give, as an npz.

    It has `weights/<name of the original>`, `rates` [steps] and `batches/<step>/<field>`; of the
    package's own steps `ours/<step>/<metric>`, and `ours/<step>/weights/<name>` after the first and
    the last of them.
    """
    config, _ = resolve_schedule(config, literal_keys)
    run, steps = make_run(config, lambda _: None), config.train.num_steps
    names = FAMILIES[config.model.family].weights

    def named(prefix: str, state: TrainState) -> dict[str, np.ndarray]:
        arrays = ours_to_original(state.params, state.statistics, names)
        return {f"{prefix}/{name}": array for name, array in arrays.items()}

    arrays = named("weights", run.first_state)
    arrays["rates"] = np.array([run.learning_rate(step) for step in range(steps)], np.float32)
    state = run.step.place(run.first_state)
    for step, batch in enumerate(train_batches(run.dataset, run.plan, 0, steps)):
        fields = batch._asdict().items()
        arrays |= {f"batches/{step}/{name}": x for name, x in fields if x is not None}
        if step < own_steps:
            state, metrics = run.step(state, batch)
            arrays |= {f"ours/{step}/{name}": np.asarray(x) for name, x in metrics.items()}
            if step in (0, own_steps - 1):
                arrays |= named(f"ours/{step}/weights", run.step.fetch(state))
    write_arrays(path, arrays)


def score(predictor: Any, data: Path) -> dict[str, list[float]]:
    """AP and AP50, on photos with one and with several objects, too, and with classes put aside."""
    truth = COCO(data / "val.json")
    found: list[Any] = []
    for image in truth.loadImgs(truth.getImgIds()):
        prediction = predictor(data / "images" / "val" / image["file_name"])
        found += prediction.to_coco(image["id"])
    numbers = {image: len(truth.getAnnIds(image)) for image in truth.getImgIds()}
    rows = {}
    for part, is_wanted in (
        ("all", lambda n: True),
        ("one", lambda n: n == 1),
        ("several", lambda n: n > 1),
        ("classes aside", lambda n: True),
    ):
        images = [image for image, number in numbers.items() if is_wanted(number)]
        scorer = COCOeval(truth, truth.loadRes(copy.deepcopy(found)), "segm")
        scorer.params.imgIds, scorer.params.useCats = images, int(part != "classes aside")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
        rows |= {part: [round(100 * float(x), 1) for x in scorer.stats[:2]]} if images else {}
    return rows


def main() -> None:
    """Print one json a line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("which", choices=("speed", "trials"))
    parser.add_argument("--only", nargs="+", help="names of variants or recipes")
    parser.add_argument("--number", type=int, default=20, help="measurements")
    parser.add_argument("--data", type=Path, help="of trials")
    parser.add_argument("--seconds", type=float, default=1800, help="processor time of a trial")
    parser.add_argument("--steps", type=int, help="of a trial, in place of seconds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--weights", default="lite0+things", help="of trials, as --init-from")
    parser.add_argument("--torch", help="interpreter for the same trials of lite in PyTorch")
    parser.add_argument("--output", type=Path, default=Path("runs/small_networks"))
    given = parser.parse_args()
    if given.which == "speed":
        for name in given.only or VARIANTS:
            print(json.dumps({"variant": name} | speed(name, given.number)), flush=True)
        return
    for name in given.only or RECIPES:
        for seed in given.seeds:
            print(json.dumps(trial(name, seed, given)), flush=True)


if __name__ == "__main__":
    process.set_environment()
    main()
