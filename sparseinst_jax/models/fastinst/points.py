"""Masks looked at in random points, as PointRend does: bilinear samples, and which points to take.

Points are (x, y), 0 to 1 over the padded image, and a mask is 0 beyond its border: PyTorch's
`grid_sample` with `align_corners=False` and zero padding.

Source: Kirillov et al., "PointRend", arXiv:1912.08193, section 3.1; detectron2's point features.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

import jax
import jax.numpy as jnp


class Draw(enum.IntEnum):
    """What points are drawn for; each use has draws of its own."""

    MATCH = 0
    MATCH_GUIDED = 1
    CANDIDATES = 2
    CANDIDATES_GUIDED = 3
    ANYWHERE = 4
    ANYWHERE_GUIDED = 5


Points = Callable[[jax.Array, Draw, int, tuple[int, ...]], jax.Array]


def random_points(keys: jax.Array, use: Draw, head: int, shape: tuple[int, ...]) -> jax.Array:
    """Draw points uniformly.

    Args:
      keys: [B], one for each image.
      use: what for.
      head: of which prediction head.
      shape: (M, P): P points for each of M rows of an image. How many rows there are changes none.

    Returns:
      float32 [B, M, P, 2] in 0..1.
    """
    rows, number = shape

    def draw(key: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(key, use), head)
        row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))
        return jax.vmap(lambda k: jax.random.uniform(k, (number, 2)))(row_keys)

    return jax.vmap(draw)(keys)


def _taps(points: jax.Array, size: tuple[int, int]) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """Return row, column and weight of the four pixels around each point of a map of `size`.

    The weight of a pixel beyond the border is 0, and its place is inside.
    """
    height, width = size
    places, weights = [], []
    for length, position in ((width, points[..., 0]), (height, points[..., 1])):
        position = ((2 * position - 1 + 1) * length - 1) / 2
        lower = jnp.floor(position)
        upper_weight = position - lower
        index = lower.astype(jnp.int32)
        pair = ((index, 1 - upper_weight), (index + 1, upper_weight))
        places.append([jnp.clip(i, 0, length - 1) for i, _ in pair])
        weights.append([jnp.where((i >= 0) & (i < length), w, 0.0) for i, w in pair])
    return [
        (places[1][y], places[0][x], weights[1][y] * weights[0][x]) for y in (0, 1) for x in (0, 1)
    ]


def sample_all(maps: jax.Array, points: jax.Array) -> jax.Array:
    """Sample all maps of an image in the same points: [B, N, h, w] in [B, P, 2] to [B, P, N]."""
    batch, number, height, width = maps.shape
    pixels = maps.reshape(batch, number, -1).transpose(0, 2, 1)  # whole rows are gathered
    total = jnp.zeros((batch, points.shape[1], number), maps.dtype)
    for row, column, weight in _taps(points, (height, width)):
        there = jnp.take_along_axis(pixels, (row * width + column)[..., None], axis=1)
        total += there * weight[..., None]
    return total


def sample_each(maps: jax.Array, points: jax.Array) -> jax.Array:
    """Sample each map in points of its own: [..., h, w] in [..., P, 2] to [..., P]."""
    *_, height, width = maps.shape
    pixels = maps.reshape(*maps.shape[:-2], -1)
    total = jnp.zeros(points.shape[:-1], maps.dtype)
    for row, column, weight in _taps(points, (height, width)):
        total += jnp.take_along_axis(pixels, row * width + column, axis=-1) * weight
    return total


def sample_bits(bits: jax.Array, points: jax.Array) -> jax.Array:
    """Sample masks packed in bits.

    Args:
      bits: uint8 [B, M, H, W/8], see `data.target_masks.pack_bits`.
      points: [B, M, P, 2]; or [B, 1, P, 2], the same for all masks of an image.

    Returns:
      float32 [B, M, P] in 0..1.
    """
    batch, number, height, width = bits.shape
    bytes_ = bits.reshape(batch, number, -1)
    total = jnp.zeros((batch, number, points.shape[2]), jnp.float32)
    for row, column, weight in _taps(points, (height, 8 * width)):
        place = jnp.broadcast_to(row * width + column // 8, total.shape)
        byte = jnp.take_along_axis(bytes_, place, axis=-1)
        bit = (byte >> (7 - column % 8).astype(jnp.uint8)) & 1
        total += bit * weight
    return total


def least_certain(mask_logits: jax.Array, candidates: jax.Array, anywhere: jax.Array) -> jax.Array:
    """Choose the points in which a mask's loss is taken.

    Args:
      mask_logits: [B, M, h, w].
      candidates: [B, M, P', 2]; those where a logit is nearest to 0 are taken, as many as are
        missing after `anywhere`.
      anywhere: [B, M, R, 2], taken as they are.

    Returns:
      [B, M, P'/3, 2], where P'/3 is the number of points of a mask.
    """
    number = candidates.shape[2] // 3 - anywhere.shape[2]
    logits = sample_each(jax.lax.stop_gradient(mask_logits), candidates)
    _, index = jax.lax.top_k(-jnp.abs(logits), number)
    chosen = jnp.take_along_axis(candidates, index[..., None], axis=2)
    return jnp.concatenate([chosen, anywhere], axis=2)
