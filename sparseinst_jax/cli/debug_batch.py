"""`sparseinst debug-batch`: rebuild any training batch, draw it and describe it."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from sparseinst_jax.cli import command_parser
from sparseinst_jax.cli.arguments import (
    add_config_arguments,
    parse_command_line,
    words_of_overrides,
)
from sparseinst_jax.data import loader
from sparseinst_jax.data.coco import Annotation, CocoDataset, ImageRecord
from sparseinst_jax.data.failures import Skip
from sparseinst_jax.data.plan import ImagePlan, StepPlan
from sparseinst_jax.data.train_image import TrainImage
from sparseinst_jax.data.transforms import Transform
from sparseinst_jax.drawing import batches, pictures
from sparseinst_jax.runtime.messages import columns, listed, next_commands
from sparseinst_jax.setup import config as configs
from sparseinst_jax.setup import config_history, datasets
from sparseinst_jax.setup.run import make_plan

_DESCRIPTION = """Make the batch of a training step again, from the configuration and the data
alone, and draw it as the network got it. Step 0 is the first; metrics.csv counts finished steps, so
its row 1 is step 0."""
_IDS_SHOWN = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Parse `--config NAME | --workdir RUN, --step N [--output DIR] [--config.KEY=VALUE ...]`.

    Returns:
      The exit code.
    """
    parser = command_parser("debug-batch", _DESCRIPTION)
    add_config_arguments(parser)
    parser.add_argument("--step", type=int, required=True, metavar="N", help="from 0")
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder of the picture step_N.png; default: batches in the run folder",
    )
    arguments = parse_command_line(parser, argv)
    if (arguments.config is None) == (arguments.workdir is None):
        parser.error("give either --config FILE or --workdir RUN, whose configuration is stored")
    if arguments.step < 0:
        parser.error(f"--step must be 0 or more, got {arguments.step}")
    if arguments.config is None:
        workdir = Path(arguments.workdir)
        stored = _stored_config(workdir)
        config = configs.load_config(stored, arguments.overrides)
        _, lines = config_history.complete(json.loads(stored.read_text()))
        print("".join(f"{line}\n" for line in lines), end="")
    else:
        workdir = configs.default_workdir(arguments.config)
        config = configs.load_config(arguments.config, arguments.overrides)
    folder = Path(arguments.output) if arguments.output else workdir / "batches"
    debug_batch(config, arguments.step, folder)
    run = f"--config={arguments.config}" if arguments.config else f"--workdir={arguments.workdir}"
    words = ["sparseinst", "debug-batch", run, *words_of_overrides(arguments)]
    print(next_commands([*words, f"--step={arguments.step + 1}"]))
    return 0


def _stored_config(workdir: Path) -> Path:
    path = workdir / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"--workdir must name the folder of a run, got {workdir}, which has no config.json."
            " Give the folder that training wrote into, or --config FILE."
        )
    return path


def debug_batch(config: ConfigDict, step: int, folder: Path) -> None:
    """Draw the global batch of a step and print a table of its images.

    Args:
      config: resolved configuration.
      step: from 0.
      folder: where `step_N.png` goes, made if missing.
    """
    datasets.draw_missing_data(config)
    dataset = datasets.load_train(config)
    plan = make_plan(config, dataset).batch(step)
    skips: list[Skip] | None = [] if config.data.on_error == "skip" else None
    loaded = list(loader.load_images(dataset.records, plan, skips))
    for skip in skips or ():
        print(f"WARNING: left out, as in training: {skip.reason}")
    batch = loader.pad_batch(plan, loader.image_ids(dataset.records, plan), loaded)
    print("\n".join(describe_batch(plan, loaded, dataset)))
    picture = batches.draw_batch(
        batch, plan, dataset.records, dataset.class_names, len(plan.images)
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = batches.picture_path(folder, step)
    pictures.save_png(picture, path)
    print(f"picture: {path}")


def describe_batch(plan: StepPlan, loaded: Sequence[TrainImage], dataset: CocoDataset) -> list[str]:
    """Describe a batch: a line for each image, and the objects that its transforms lost."""
    height, width = plan.padded_size
    lines = [
        f"step {plan.step}, epoch {plan.epoch}: {len(plan.images)} images, padded to"
        f" {height}x{width} (height x width), room for {plan.num_targets} objects each"
    ]
    header = ("image id", "original", "transform", "size", "objects", "lost", "file")
    rows: list[tuple[str, ...]] = [header]
    for image, result in zip(plan.images, loaded, strict=True):
        record = dataset.records[image.position]
        rows.append(
            (
                str(record.image_id),
                f"{record.height}x{record.width}",
                describe_transform(image.transform, record),
                "x".join(map(str, result.image.shape[:2])),
                str(len(result.labels)),
                str(len(result.outside) + len(result.covered)),
                _files(image, dataset.records),
            )
        )
    lines += columns(rows, len(header))
    for image, result in zip(plan.images, loaded, strict=True):
        lines += _losses(dataset.records[image.position], result, dataset.class_names)
    return lines


def describe_transform(transform: Transform, record: ImageRecord) -> str:
    """Describe a transform: flip, scale factor, crop."""
    parts = ["flip"] if transform.flip else []
    size = record.height, record.width
    if transform.first_size is not None and transform.crop is not None:
        parts.append(_factor(size, transform.first_size))
        y, x, *cut = transform.crop
        size = cut[0], cut[1]
        if size != transform.first_size:
            parts.append(f"crop {size[0]}x{size[1]} at y {y} x {x}")
    if size != transform.size or not transform.first_size:
        parts.append(_factor(size, transform.size))
    return ", ".join(parts)


def _factor(before: tuple[int, int], after: tuple[int, int]) -> str:
    return f"x{math.sqrt(after[0] * after[1] / (before[0] * before[1])):.2f}"


def _files(image: ImagePlan, records: Sequence[ImageRecord]) -> str:
    files = records[image.position].file_name
    if image.paste is not None:
        other = records[image.paste.position]
        moved = describe_transform(image.paste.transform, other)
        files += f" + {len(image.paste.targets)} objects of {other.file_name} ({moved})"
    return files


def _losses(record: ImageRecord, result: TrainImage, class_names: Sequence[str]) -> list[str]:
    """One line for each way in which an image lost objects."""
    ways = {
        "no pixel left in the transformed image": result.outside,
        "under pasted objects": result.covered,
    }
    return [
        f"image {record.image_id}: {len(lost)} lost, {way}: {_named(lost, class_names)}"
        for way, lost in ways.items()
        if lost
    ]


def _named(annotations: Sequence[Annotation], class_names: Sequence[str]) -> str:
    return listed((f"{class_names[a.label]} (annotation {a.id})" for a in annotations), _IDS_SHOWN)
