"""Workloads of inference: the network, with post-processing, from a file, post-processing alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sparseinst_jax.cli.measuring.workloads import Workload
from sparseinst_jax.data.transforms import padded_size, resized_size
from sparseinst_jax.inference import masks
from sparseinst_jax.inference.predictor import Predictor, Prepared
from sparseinst_jax.models.layers import Tree
from sparseinst_jax.models.ops import normalize_images
from sparseinst_jax.models.sparseinst import inference
from sparseinst_jax.models.sparseinst.model import MASK_STRIDE, Outputs

Size = tuple[int, int]
USUAL_SIZE = (640, 864)  # padded
USUAL_PHOTO = (480, 640)  # of COCO; becomes 640 x 853


@dataclasses.dataclass(frozen=True)
class Subject:
    """What inference is measured on.

    Attributes:
      apply, params, statistics: of the network, see `layers.functional`.
      make_predictor: takes the number of images that go through the network together.
      num_masks, num_classes: N and K.
      size: (height, width) of the padded image.
      photo_size: (height, width) of the original.
    """

    apply: Callable[..., Any]
    params: Tree
    statistics: Tree
    make_predictor: Callable[[int], Predictor]
    num_masks: int
    num_classes: int
    size: Size
    photo_size: Size

    @property
    def valid_size(self) -> Size:
        """(height, width) of the resized photo inside the padded image."""
        return valid_size(self.photo_size, self.size)


def valid_size(photo_size: Size, size: Size) -> Size:
    """Return what a photo is resized to so that it fills a padded image.

    Raises:
      ValueError: after the resize it would be padded to another size.
    """
    resized = resized_size(photo_size, min(size), max(size))
    if padded_size(resized) != size:
        raise ValueError(
            f"a photo of {photo_size[0]}x{photo_size[1]} is resized to {resized[0]}x{resized[1]}, "
            f"which does not fill --size {size[0]}x{size[1]} (multiples of 32): give --photo-size "
            "HEIGHTxWIDTH of the same shape, or another --size"
        )
    return resized


def usual_photo(size: Size) -> Size:
    """Return the size of COCO's photos where they fill the padded image, else its own size."""
    try:
        valid_size(USUAL_PHOTO, size)
    except ValueError:
        return size
    return USUAL_PHOTO


def network(subject: Subject, batch: int) -> Workload:
    """From normalised images to the network's outputs."""
    images = _normal(batch, *subject.size, 3)
    given = jax.device_put((subject.params, subject.statistics, images))
    forward = jax.jit(lambda p, s, x: subject.apply(p, s, x, train=False)[0])
    return Workload(
        lambda: jax.block_until_ready(forward(*given)),
        batch,
        {"size": subject.size, "batch": batch},
        lambda: {"network": forward.lower(*given).compile()},
    )


def with_masks(subject: Subject, batch: int) -> Workload:
    """From resized photos on the host to the kept masks at their original size on the host."""
    predictor = subject.make_predictor(batch)
    items = [_prepared(subject, number) for number in range(batch)]

    def run() -> int:
        return sum(len(chunk) for found in predictor.run(items) for chunk, _ in found.chunks)

    def compiled() -> dict[str, Any]:
        images = np.zeros((batch, *subject.size, 3), np.uint8)
        valid = np.full((batch, 2), subject.valid_size, np.int32)
        given = subject.params, subject.statistics, images, valid
        return {"network and scores": jax.jit(on_device).lower(*given).compile()}

    def on_device(params: Tree, statistics: Tree, images: jax.Array, valid: jax.Array) -> Any:
        x = normalize_images(images, valid)
        return inference.select(subject.apply(params, statistics, x, train=False)[0])

    return Workload(
        run,
        batch,
        {"size": subject.size, "photo_size": subject.photo_size, "batch": batch},
        compiled,
        lambda: {"kept_masks_per_image": run() / batch},
    )


def end_to_end(subject: Subject, photo: Path) -> Workload:
    """From an image file to scores, labels and run-length encoded masks."""
    predictor = subject.make_predictor(1)
    return Workload(
        lambda: predictor(photo), 1, {"size": subject.size, "photo_size": subject.photo_size}
    )


def post_processing(subject: Subject) -> Workload:
    """From the network's outputs on the device, all kept, to masks at the original size."""
    height, width = subject.size
    number = subject.num_masks
    outputs = jax.device_put(
        Outputs(
            _normal(1, number, subject.num_classes),
            4 * _normal(1, number, height // 4, width // 4),
            _normal(1, number),
        )
    )
    select = jax.jit(inference.select)

    def run() -> int:
        selection = select(outputs)
        is_kept = jax.device_get(selection[:4])[-1]
        chunks = masks.upsample_masks(
            selection.masks,
            0,
            np.flatnonzero(is_kept[0]),
            subject.valid_size,
            subject.photo_size,
            masks.MaskCut(inference.MASK_THRESHOLD, MASK_STRIDE),
        )
        return sum(len(chunk) for chunk, _ in chunks)

    return Workload(
        run,
        1,
        {"size": subject.size, "photo_size": subject.photo_size, "batch": 1},
        lambda: {"scores": select.lower(outputs).compile()},
        lambda: {"kept_masks_per_image": run()},
    )


def _prepared(subject: Subject, seed: int) -> Prepared:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (*subject.valid_size, 3), np.uint8)
    return Prepared(image, subject.photo_size, subject.valid_size)


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)
