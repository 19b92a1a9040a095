"""Read, transform and pad the batches that the plan names; Grain runs the workers.

One element is one whole step, so the order is the plan's and a resumed run needs only its step.
"""

import functools
import gc
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from sparseinst_jax.data.batch import Batch
from sparseinst_jax.data.coco import CocoDataset, ImageRecord
from sparseinst_jax.data.failures import Skip, load_or_skip, supervised
from sparseinst_jax.data.plan import StepPlan, TrainPlan
from sparseinst_jax.data.target_masks import TargetForm
from sparseinst_jax.data.train_image import TrainImage, load_train_image

NUM_THREADS = 2  # per process; each works on a step of its own
PREFETCH_STEPS = 4
_PARENT_POLL_SECONDS = 2.0


class PackedImages(NamedTuple):
    """The images of one step, each after the other: what goes from a process that reads.

    Padding is more than half of a batch, and shared memory is slow to fill and to free: images are
    padded where they arrive.
    """

    image_ids: np.ndarray  # int64 [B]
    sizes: np.ndarray  # int32 [B, 2], (height, width)
    num_targets: np.ndarray  # int32 [B]
    labels: np.ndarray  # int32 [sum of num_targets]
    pixels: np.ndarray  # uint8, flat, of all images
    masks: np.ndarray  # uint8, flat, of all targets
    is_ignored: np.ndarray | None  # bool, flat, of all images; None when crowd regions are dropped


def pack(image_ids: Sequence[int], images: Iterable[TrainImage]) -> PackedImages:
    """Put loaded images into flat arrays; what training does not see of them is left out."""
    sizes, num_targets, labels, pixels, masks, ignored = [], [], [], [], [], []
    for image in images:
        sizes.append(image.image.shape[:2])
        num_targets.append(len(image.labels))
        labels.extend(image.labels)
        pixels.append(image.image.reshape(-1))
        masks.extend(mask.reshape(-1) for mask in image.masks)
        if image.is_ignored is not None:
            ignored.append(image.is_ignored.reshape(-1))
    return PackedImages(
        np.array(image_ids, np.int64),
        np.array(sizes, np.int32).reshape(-1, 2),
        np.array(num_targets, np.int32),
        np.array(labels, np.int32),
        np.concatenate(pixels),
        np.concatenate(masks) if masks else np.zeros(0, np.uint8),
        np.concatenate(ignored) if ignored else None,
    )


def unpack(packed: PackedImages, form: TargetForm) -> Iterator[TrainImage]:
    """Give the images back, with masks of this form; their arrays are views."""
    pixel = target = byte = place = 0
    for (height, width), number in zip(
        packed.sizes.tolist(), packed.num_targets.tolist(), strict=True
    ):
        shape = form.shape((height, width))
        num_bytes = number * shape[0] * shape[1]
        image = packed.pixels[pixel : pixel + 3 * height * width].reshape(height, width, 3)
        masks = packed.masks[byte : byte + num_bytes].reshape(number, *shape)
        is_ignored = packed.is_ignored
        if is_ignored is not None:
            rows, columns = -(-height // form.stride), -(-width // form.stride)
            is_ignored = is_ignored[place : place + rows * columns].reshape(rows, columns)
            place += rows * columns
        labels = packed.labels[target : target + number].tolist()
        yield TrainImage(image, labels, list(masks), is_ignored, [], [])
        pixel, target, byte = pixel + 3 * height * width, target + number, byte + num_bytes


@dataclass(repr=False)  # Grain prints sources; the records would fill the screen
class _Steps:
    """Grain source: element i is of step ``start + i``, with what was skipped of it.

    It is the batch, or its images packed where another process makes the batch.
    """

    records: Sequence[ImageRecord]
    plan: TrainPlan
    start: int
    number: int
    host_index: int
    host_count: int
    skips_errors: bool
    is_packed: bool

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> tuple[Batch | PackedImages, tuple[Skip, ...]]:
        step = self.step(int(index))
        skips: list[Skip] | None = [] if self.skips_errors else None
        if self.is_packed:
            images = load_images(self.records, step, skips)
            return pack(image_ids(self.records, step), images), tuple(skips or ())
        return make_batch(self.records, step, skips), tuple(skips or ())

    def step(self, index: int) -> StepPlan:
        """The plan of an element."""
        return self.plan.batch(self.start + index, self.host_index, self.host_count)

    def unpacked(self, index: int, images: PackedImages) -> Batch:
        """Make the batch of a packed element."""
        step = self.step(index)
        return pad_batch(step, images.image_ids.tolist(), unpack(images, step.targets))


def train_batches(
    dataset: CocoDataset,
    plan: TrainPlan,
    start_step: int = 0,
    num_steps: int | None = None,
    host_index: int = 0,
    host_count: int = 1,
    num_workers: int = 0,
    on_step: Callable[[int, Sequence[Skip]], None] | None = None,
) -> Iterator[Batch]:
    """Iterate over the batches of steps ``start_step ... start_step + num_steps - 1`` in order.

    Args:
        dataset: the index that the plan was made for.
        plan: what each step holds.
        start_step: first step; all that a resumed run needs.
        num_steps: number of batches; by default those of one epoch.
        host_index: this host.
        host_count: number of hosts.
        num_workers: processes that read ahead; 0 reads ahead in threads of this process. Processes
            start a fresh interpreter: the calling script needs ``if __name__ == "__main__":``.
            One that dies or hangs is replaced, see ``failures.supervised``; where shared memory
            is too small for them the threads of this process take over.
        on_step: leave out images that cannot be used, see ``failures``, and call this before
            each batch with them: (number of the step from 1, images). None raises.

    Yields:
        NumPy batches of this host, in order.

    Raises:
        ValueError: an image cannot be read; names the file. Or nothing can be read any more.
    """
    num_steps = math.ceil(plan.steps_per_epoch) if num_steps is None else num_steps
    if num_steps <= 0:
        return
    # Refuse an impossible host count before workers start.
    plan.batch(start_step, host_index, host_count)

    # Processes get the records by name: they open the files of a large data set themselves.
    def start(done: int, processes: int = num_workers) -> Iterator[tuple[Batch, tuple[Skip, ...]]]:
        first, number = start_step + done, num_steps - done
        options = host_index, host_count, on_step is not None, processes > 0
        source = _Steps(dataset.records, plan, first, number, *options)
        return _run_grain(source, processes)

    alone = functools.partial(start, processes=0) if num_workers else None
    items = supervised(start, num_steps, start_alone=alone)
    try:
        for step, (batch, skips) in enumerate(items, start=start_step + 1):
            if on_step is not None:
                on_step(step, skips)
            yield batch
    finally:
        items.close()


def _run_grain(source: _Steps, num_workers: int) -> Iterator[tuple[Batch, tuple[Skip, ...]]]:
    """Read the elements of a source in order, ahead of time."""
    # Without workers the threads read ahead; with them each process holds one step in hand.
    options = grain.ReadOptions(
        num_threads=1 if num_workers else NUM_THREADS,
        prefetch_buffer_size=1 if num_workers else PREFETCH_STEPS,
    )
    steps = grain.MapDataset.source(source).to_iter_dataset(options)
    if num_workers:
        # Grain reads absl flags in its workers; a program without absl.app has not parsed any.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS(sys.argv[:1])
        _start_quiet_tracker()
        steps = steps.mp_prefetch(
            grain.multiprocessing.MultiprocessingOptions(
                num_workers=min(num_workers, len(source)), per_worker_buffer_size=2
            ),
            functools.partial(_end_with_parent, os.getpid()),
        )
    iterator: Any = iter(steps)
    try:
        for index, (item, skips) in enumerate(iterator):
            # Worker processes hand over shared memory; with the batch made of it it can be freed at
            # once, and none is left over when the program ends.
            yield (source.unpacked(index, item) if num_workers else item), skips
    finally:
        close = getattr(iterator, "close", None)
        if close is not None:
            close()
        if num_workers:
            # Grain keeps the last batches in reference cycles; at the end of the program their
            # shared memory would be reported as leaked.
            iterator = steps = item = None
            gc.collect()


def _end_with_parent(parent: int, *_: int) -> None:
    """In a worker: exit when the parent is gone; a killed parent cannot say so."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _start_quiet_tracker() -> None:
    """Start the process that frees shared memory at the end, without its warning.

    Grain's processes can leave a batch behind when they are stopped at a broken image. It is freed;
    the warning would only stand between the user and the message that names the image.
    """
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [before, "ignore:resource_tracker"]))
    try:
        resource_tracker.ensure_running()
    finally:
        del os.environ["PYTHONWARNINGS"]
        if before is not None:
            os.environ["PYTHONWARNINGS"] = before


def make_batch(
    records: Sequence[ImageRecord], plan: StepPlan, skips: list[Skip] | None = None
) -> Batch:
    """Read and pad the images of a planned step.

    Images that cannot be used are added to ``skips``; without it the first of them raises.
    """
    return pad_batch(plan, image_ids(records, plan), load_images(records, plan, skips))


def load_images(
    records: Sequence[ImageRecord], plan: StepPlan, skips: list[Skip] | None
) -> Iterator[TrainImage]:
    """Read the images of a step one after the other, so that each can be freed at once."""
    options = plan.flip_labels, plan.ignores_crowd, plan.targets
    return (
        load_train_image(records, image, *options)
        if skips is None
        else load_or_skip(records, image, *options, skips)
        for image in plan.images
    )


def image_ids(records: Sequence[ImageRecord], plan: StepPlan) -> list[int]:
    """The ids of the images of a step."""
    return [records[image.position].image_id for image in plan.images]


def pad_batch(plan: StepPlan, image_ids: Sequence[int], images: Iterable[TrainImage]) -> Batch:
    """Pad the loaded images of a planned step, see ``make_batch``."""
    number, num_targets = len(plan.images), plan.num_targets
    height, width = plan.padded_size
    form = plan.targets
    region = height // form.stride, width // form.stride
    batch = Batch(
        images=np.zeros((number, height, width, 3), np.uint8),
        valid_size=np.zeros((number, 2), np.int32),
        labels=np.zeros((number, num_targets), np.int32),
        masks=np.zeros((number, num_targets, *form.shape(plan.padded_size)), np.uint8),
        is_target=np.zeros((number, num_targets), bool),
        image_id=np.array(image_ids, np.int64),
        is_ignored=np.zeros((number, *region), bool) if plan.ignores_crowd else None,
    )
    for index, loaded in enumerate(images):
        number_of_targets = len(loaded.labels)
        valid_height, valid_width = loaded.image.shape[:2]
        batch.images[index, :valid_height, :valid_width] = loaded.image
        batch.valid_size[index] = valid_height, valid_width
        batch.labels[index, :number_of_targets] = loaded.labels
        batch.is_target[index, :number_of_targets] = True
        for target, mask in enumerate(loaded.masks):
            batch.masks[index, target, : mask.shape[0], : mask.shape[1]] = mask
        if loaded.is_ignored is not None and batch.is_ignored is not None:
            rows, columns = loaded.is_ignored.shape
            batch.is_ignored[index, :rows, :columns] = loaded.is_ignored
    return batch
