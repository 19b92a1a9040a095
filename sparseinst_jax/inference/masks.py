"""Bring masks from their grid over the padded image to the original image, and pack them as RLE.

The way back of a mask has three steps: bilinear from the mask grid to the padded image, a crop
to the valid part, and a bilinear resize to the original size. Each is linear and works on rows and
columns separately, so the chain is one small operator for each axis: a few taps per output pixel,
composed here on the host in float64. The device applies the two operators to the masks that are
kept, a chunk at a time, so that no more than a chunk of full-size float masks ever exists. From an
accelerator they come as bits, all chunks on their way at once: fetching takes longer than making.

Source: the original's `SparseInst.inference_single` (two `interpolate` calls on probabilities,
`align_corners=False`, no antialias).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparseinst_jax.runner.masks import (
    MASKNESS_EPSILON,
    NUM_TAPS,
    AxisOperator,
    MaskCut,
    upsampling_operator,
)

# Floats of one chunk after both operators: bounds the memory of very large photographs.
MAX_CHUNK_PIXELS = 16 * 1024 * 1024
MAX_CHUNK = 16
# An accelerator has more memory, and each wait costs more: most of a photograph's masks at once.
MAX_PACKED_PIXELS = 128 * 1024 * 1024
MAX_PACKED, MIN_PACKED = 128, 8


def bucket_length(original_length: int) -> int:
    """Round a side up to the few lengths for which an upsampling function is compiled."""
    step = 128 if original_length <= 1024 else 512
    return -(-original_length // step) * step


def chunk_length(
    bucket_size: tuple[int, int],
    num_masks: int,
    most: int = MAX_CHUNK,
    most_pixels: int = MAX_CHUNK_PIXELS,
) -> int:
    """Choose how many masks are upsampled at once: a power of two, fewer for large images."""
    fitting = max(1, most_pixels // (bucket_size[0] * bucket_size[1]))
    return min(most, 2 ** int(math.log2(fitting)), 2 ** math.ceil(math.log2(max(num_masks, 1))))


def _apply_to_rows(masks: jax.Array, operator: AxisOperator) -> jax.Array:
    """Apply an operator along axis 1: [D, h, w] -> [D, P, w]."""
    terms = [
        jnp.take(masks, operator.index[:, tap], axis=1, mode="clip")
        * operator.weight[:, tap][:, None]
        for tap in range(NUM_TAPS)
    ]
    return terms[0] + terms[1] + terms[2]


@jax.jit
def _upsample_rows(
    masks: jax.Array, image_index: jax.Array, query_index: jax.Array, row_operator: AxisOperator
) -> jax.Array:
    """Bring the rows of chosen masks of one image to full length: float32 [D, w, height].

    A compiled function of its own: in one with `_cut_columns`, XLA would fuse the two and make
    every row again for each tap of each column, which takes five times as long.
    """
    chosen = masks[image_index, query_index].astype(jnp.float32)
    return jnp.swapaxes(_apply_to_rows(chosen, row_operator), 1, 2)


@functools.partial(jax.jit, static_argnames="are_logits")
def _cut_columns(
    rows: jax.Array,
    column_operator: AxisOperator,
    threshold: jax.Array,
    original_size: tuple[int, int] | None = None,
    are_logits: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Bring the columns of [D, w, height] to full length and cut: uint8 [D, width, height].

    The columns come first because RLE runs down the columns; and the gather then moves whole rows
    of memory. With `original_size` also the mean probability inside each mask, float32 [D].
    """
    probs = _apply_to_rows(rows, column_operator)
    if are_logits:
        probs = jax.nn.sigmoid(probs)
    is_inside = probs > threshold
    masks = is_inside.astype(jnp.uint8)
    if original_size is None:
        return masks, None
    # The bucket's padding is no part of the image.
    is_inside &= jnp.arange(masks.shape[1])[:, None] < original_size[1]
    is_inside &= jnp.arange(masks.shape[2]) < original_size[0]
    total = jnp.where(is_inside, probs, 0.0).sum((1, 2))
    return masks, total / (is_inside.sum((1, 2), dtype=jnp.float32) + MASKNESS_EPSILON)


def upsample_masks(
    masks: jax.Array,
    image_index: int,
    query_index: np.ndarray,
    valid_size: tuple[int, int],
    original_size: tuple[int, int],
    cut: MaskCut,
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Bring some masks of one image to its original size, a chunk at a time.

    Args:
        masks: float [B, N, H/S, W/S] probabilities or logits on the device, at the stride S.
        image_index: which image of the batch.
        query_index: int [D], which of its masks, in the order of the result; one may come twice.
        valid_size: (height, width) of the resized image inside the padded one.
        original_size: (height, width) of the original image.
        cut: how they become zeros and ones.

    Yields:
        uint8 [D', width, height] (transposed: the order of COCO's RLE), zeros and ones; and the
        mean probability inside each mask, sum(p [p > t]) / (sum [p > t] + 1e-6), float32 [D'], or
        None where it is not asked for.
    """
    bucket = bucket_length(original_size[0]), bucket_length(original_size[1])
    sides = zip(masks.shape[2:], valid_size, original_size, bucket, strict=True)
    keys = [(grid, cut.stride, *lengths) for grid, *lengths in sides]
    measured = np.array(original_size, np.int32) if cut.measures else None
    device = _accelerator(masks)
    if device is None:
        operators = [upsampling_operator(*key) for key in keys]
        bounds, least = (MAX_CHUNK, MAX_CHUNK_PIXELS), 1

        def upsample(chosen: np.ndarray) -> tuple[jax.Array, jax.Array | None]:
            rows = _upsample_rows(masks, np.int32(image_index), chosen, operators[0])
            threshold = np.float32(cut.threshold)
            return _cut_columns(rows, operators[1], threshold, measured, cut.are_logits)

    else:
        operators = [_operator_on(device, *key) for key in keys]
        bounds, least = (MAX_PACKED, MAX_PACKED_PIXELS), MIN_PACKED

        def upsample(chosen: np.ndarray) -> tuple[jax.Array, jax.Array | None]:
            index = np.stack([np.full_like(chosen, image_index), chosen])
            return _upsample_and_pack(masks, index, *operators, measured, cut)

    def length(chosen: np.ndarray) -> int:
        return chunk_length(bucket, max(len(chosen), least), *bounds)

    chunk = length(query_index)
    chunks = [query_index[start : start + chunk] for start in range(0, len(query_index), chunk)]
    # The last one is not filled up to the length of the others, which would take as long.
    made = (upsample(_filled(chosen, length(chosen))) for chosen in chunks)
    # The device works on a chunk while the host handles the one before; an accelerator, whose
    # results are small, begins with all of them now.
    ahead = _one_ahead(made) if device is None else iter(list(map(_send, made)))
    return (
        _fetch(result, len(chosen), original_size, is_packed=device is not None)
        for chosen, result in zip(chunks, ahead, strict=True)
    )


def _accelerator(masks: Any) -> Any | None:
    """Return the device that the masks lie on, None for a CPU."""
    devices = masks.devices() if isinstance(masks, jax.Array) else ()
    return next((device for device in devices if device.platform != "cpu"), None)


def _filled(chosen: np.ndarray, length: int) -> np.ndarray:
    """Pad an index with zeros: int32 [length]."""
    filled = np.zeros(length, np.int32)
    filled[: len(chosen)] = chosen
    return filled


@functools.lru_cache(maxsize=256)
def _operator_on(device: Any, *key: int) -> AxisOperator:
    """Keep an operator, see `upsampling_operator`, on a device."""
    return jax.device_put(upsampling_operator(*key), device)


@functools.partial(jax.jit, static_argnames="cut")
def _upsample_and_pack(
    masks: jax.Array,
    index: jax.Array,
    row_operator: AxisOperator,
    column_operator: AxisOperator,
    original_size: jax.Array | None,
    cut: MaskCut,
) -> tuple[jax.Array, jax.Array | None]:
    """Upsample and cut masks [2, D] (image, query), eight pixels to a byte: [D, width, height / 8].

    One program with one small result, for an accelerator: an eighth of the bytes to fetch, and one
    wait.
    """
    rows = _upsample_rows(masks, index[0], index[1], row_operator)
    # Without the barrier every row would be made again for each tap of each column.
    rows = jax.lax.optimization_barrier(rows)
    threshold = jnp.float32(cut.threshold)
    is_inside, scores = _cut_columns(
        rows, column_operator, threshold, original_size, cut.are_logits
    )
    return jnp.packbits(is_inside, axis=-1), scores


def _send(made: Any) -> Any:
    """Let arrays travel to the host without waiting for them."""
    jax.tree.map(lambda array: array.copy_to_host_async(), made)
    return made


def _one_ahead(made: Iterator[Any]) -> Iterator[Any]:
    """Start each one before the previous one is yielded."""
    waiting = next(made, None)
    while waiting is not None:
        following = next(made, None)
        yield waiting
        waiting = following


def _fetch(
    made: tuple[jax.Array, jax.Array | None],
    count: int,
    original_size: tuple[int, int],
    is_packed: bool,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Fetch a chunk and cut off the padding of its bucket: uint8 [count, width, height]."""
    height, width = original_size
    masks, scores = np.asarray(made[0])[:count, :width], made[1]
    if is_packed:
        masks = np.unpackbits(masks, axis=-1, count=height)
    return masks[:, :, :height], None if scores is None else np.asarray(scores)[:count]
