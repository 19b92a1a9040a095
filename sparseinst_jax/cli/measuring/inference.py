"""Workloads of inference: the network, with masks, from a file, post-processing alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sparseinst_jax.cli.measuring.timing import Workload
from sparseinst_jax.data.coco import CocoDataset
from sparseinst_jax.data.transforms import padded_size, resized_size
from sparseinst_jax.evaluation.evaluator import predict_dataset
from sparseinst_jax.inference import masks
from sparseinst_jax.inference.predictor import Predictor, Prepared
from sparseinst_jax.models.ops import normalize_images
from sparseinst_jax.models.sparseinst import inference
from sparseinst_jax.models.sparseinst.model import MASK_STRIDE, Outputs
from sparseinst_jax.models.trees import Tree

Size = tuple[int, int]
USUAL_SIZE = (640, 864)  # padded
USUAL_PHOTO = (480, 640)  # of COCO; becomes 640 x 853


@dataclasses.dataclass(frozen=True)
class Subject:
    """What inference is measured on.

    Attributes:
      apply, params, statistics: of the network, see `models.trees.functional`.
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

    @property
    def sizes(self) -> dict[str, Size]:
        """Facts of a result."""
        return {"size": self.size, "photo_size": self.photo_size}


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
    resized = resized_size(USUAL_PHOTO, min(size), max(size))
    return USUAL_PHOTO if padded_size(resized) == size else size


def _kept(number: float) -> dict[str, Any]:
    return {"kept_masks_per_image": number, "note": f"{number:g} masks kept an image"}


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
    predictor, items = subject.make_predictor(batch), []
    for number in range(batch):
        rng = np.random.default_rng(number)
        image = rng.integers(0, 256, (*subject.valid_size, 3), np.uint8)
        items.append(Prepared(image, subject.photo_size, subject.valid_size))

    def run() -> int:
        return sum(len(chunk) for found in predictor.run(items) for chunk, _ in found.chunks)

    def on_device(params: Tree, statistics: Tree, images: jax.Array, valid: jax.Array) -> Any:
        x = normalize_images(images, valid)
        return inference.select(subject.apply(params, statistics, x, train=False)[0])

    def compiled() -> dict[str, Any]:
        images = np.zeros((batch, *subject.size, 3), np.uint8)
        valid = np.full((batch, 2), subject.valid_size, np.int32)
        given = subject.params, subject.statistics, images, valid
        return {"network and scores": jax.jit(on_device).lower(*given).compile()}

    facts = {**subject.sizes, "batch": batch}
    return Workload(run, batch, facts, compiled, lambda: _kept(run() / batch))


def end_to_end(subject: Subject, photos: CocoDataset) -> Workload:
    """From an image file to scores, labels and run-length encoded masks."""
    sizes = [(record.height, record.width) for record in photos.records]
    path: Any = photos.records[sizes.index(subject.photo_size)].path
    predictor = subject.make_predictor(1)
    return Workload(lambda: predictor(path), 1, subject.sizes)


def whole_dataset(subject: Subject, photos: CocoDataset) -> Workload:
    """From the files of a data set to its COCO results: read, computed and packed side by side."""
    predictor = subject.make_predictor(1)
    # The network's classes are not those of the photos; each takes the name of one of theirs.
    names = photos.class_names
    predictor.class_names = tuple(names[i % len(names)] for i in range(subject.num_classes))
    return Workload(lambda: predict_dataset(predictor, photos), len(photos.records), subject.sizes)


def post_processing(subject: Any) -> Workload:
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
        lambda: _kept(run()),
    )


def _normal(*shape: int) -> Any:
    return np.random.default_rng(0).standard_normal(shape, np.float32)
