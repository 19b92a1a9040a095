"""Loaded images as a few flat arrays: what goes from a process that reads to the one that trains.

Padding is more than half of a batch, and shared memory is dear to fill and to free: it is padded
where it arrives.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from sparseinst_jax.data.target_masks import TargetForm
from sparseinst_jax.data.train_image import TrainImage


class PackedImages(NamedTuple):
    """The images of one step, each after the other.

    Attributes:
        image_ids: int64 [B].
        sizes: int32 [B, 2], (height, width).
        num_targets: int32 [B].
        labels: int32 [sum of num_targets].
        pixels: uint8, flat, of all images.
        masks: uint8, flat, of all targets.
        is_ignored: bool, flat, of all images; None when crowd regions are dropped.
    """

    image_ids: np.ndarray
    sizes: np.ndarray
    num_targets: np.ndarray
    labels: np.ndarray
    pixels: np.ndarray
    masks: np.ndarray
    is_ignored: np.ndarray | None


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
