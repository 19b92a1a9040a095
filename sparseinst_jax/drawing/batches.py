"""Draw training batches as the network gets them: augmented, padded, with their targets."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sparseinst_jax.data.batch import Batch
from sparseinst_jax.data.coco import CocoDataset, ImageRecord
from sparseinst_jax.data.plan import ImagePlan, StepPlan, TrainPlan
from sparseinst_jax.data.target_masks import TargetForm
from sparseinst_jax.drawing import pictures

NUM_STEPS = 3  # batches drawn at the start of a run
NUM_IMAGES = 16  # of a batch, at the start of a run
# Long side of one image in pixels: larger ones are shrunk, by 2 or 4, those below it enlarged.
MAX_SIDE = 480
READABLE_SIDE = 320
_PADDING = ((112, 112, 112), (144, 144, 144))
_IGNORED = (255, 255, 255)


def save_first_batches(
    batches: Iterator[Batch],
    plan: TrainPlan,
    dataset: CocoDataset,
    folder: Path,
    host_index: int = 0,
    host_count: int = 1,
) -> Iterator[Batch]:
    """Pass batches on from step 0, writing pictures of the first ones, `step_000000.png` and so on.

    Args:
        batches: of this host.
        plan: that they follow.
        dataset: that they are from.
        folder: of the pictures, made if missing.
        host_index: this host.
        host_count: number of hosts.

    Yields:
        the same batches.
    """
    for step, batch in enumerate(batches):
        if step < NUM_STEPS:
            step_plan = plan.batch(step, host_index, host_count)
            picture = draw_batch(batch, step_plan, dataset.records, dataset.class_names, NUM_IMAGES)
            folder.mkdir(parents=True, exist_ok=True)
            pictures.save_png(picture, picture_path(folder, step))
        yield batch


def picture_path(folder: Path, step: int) -> Path:
    """Where the picture of a step goes."""
    return folder / f"step_{step:06d}.png"


def draw_batch(
    batch: Batch,
    plan: StepPlan,
    records: Sequence[ImageRecord],
    class_names: Sequence[str],
    num_images: int,
) -> Image.Image:
    """Draw the images of a batch in a grid, each under the names of its files.

    Padding is striped. Masks are drawn as the batch has them: at a quarter of the size, where at
    least half of the pixel belongs to them, or at full size. Ignored regions are white, under the
    objects.

    Args:
        batch: of NumPy arrays.
        plan: of the batch.
        records: of the data set; the plan's positions index it.
        class_names: of the labels.
        num_images: how many are drawn at most, from the first on.
    """
    number = min(num_images, len(plan.images))
    cells = [_draw_image(batch, index, plan.targets, class_names) for index in range(number)]
    titles = [_title(image, records) for image in plan.images[:number]]
    columns = math.ceil(math.sqrt(number))
    rows = [
        pictures.beside(cells[first : first + columns], titles[first : first + columns])
        for first in range(0, number, columns)
    ]
    left_out = len(plan.images) - number
    note = f", {left_out} more not drawn" if left_out else ""
    key = pictures.colour_key(
        [], (cells[0].height, rows[0].width), f"step {plan.step}, epoch {plan.epoch}{note}"
    )
    return pictures.below([key, *rows])


def _draw_image(
    batch: Batch, index: int, form: TargetForm, class_names: Sequence[str]
) -> Image.Image:
    """One padded image with its targets, smaller by 1, 2 or 4 so that a grid can be looked at."""
    image = _striped_padding(batch.images[index], *batch.valid_size[index])
    shrink = next((s for s in (1, 2) if max(image.shape) <= s * MAX_SIDE), 4)
    image = np.asarray(Image.fromarray(image).reduce(shrink))
    masks = list(form.decode(batch.masks[index][batch.is_target[index]]))
    labels: list[int] = batch.labels[index][batch.is_target[index]].tolist()
    captions: list[str] = [class_names[label] for label in labels]
    colours: list[pictures.Colour | None] = [None] * len(labels)
    if batch.is_ignored is not None:
        masks.append(batch.is_ignored[index])
        captions.append("ignored")
        colours.append(_IGNORED)
        labels.append(-1)
    repeat, step = max(form.stride // shrink, 1), max(shrink // form.stride, 1)
    masks = [mask[::step, ::step].repeat(repeat, axis=0).repeat(repeat, axis=1) for mask in masks]
    classes = labels if len(class_names) > 1 else None
    return pictures.draw_instances(image, masks, captions, colours, READABLE_SIDE, classes)


def _striped_padding(image: np.ndarray, valid_height: int, valid_width: int) -> np.ndarray:
    """The image with its padding, which is as black as a night photograph, made visible."""
    rows, columns = np.indices(image.shape[:2])
    stripes = np.array(_PADDING, np.uint8)[(rows + columns) // 8 % 2]
    is_padding = np.logical_or(rows >= valid_height, columns >= valid_width)
    return np.where(is_padding[..., None], stripes, image)


def _title(plan: ImagePlan, records: Sequence[ImageRecord]) -> str:
    title = records[plan.position].file_name
    if plan.paste is not None:
        title += f" + {records[plan.paste.position].file_name}"
    return title
