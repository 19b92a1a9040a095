"""Attention between many pixels and a few queries, block by block and head by head, for CPUs.

The scores of one head and some hundred pixels lie in the processor's cache, and every product is
one of two matrices that lie in memory as they are. `jax.nn.dot_product_attention` turns all heads
and pixels round first, which XLA:CPU takes longer for than for the products, and writes the scores
of the whole image to memory again and again. The gradient makes them a second time.

8 heads of 32 channels, 108 queries, two images of 4096 pixels, milliseconds of processor time, the
gradients with the forward pass that they repeat:

    pixels look at queries    68 -> 24    with gradients 212 -> 61
    queries look at pixels    76 -> 24    with gradients 270 -> 78

Source: Dao et al., "FlashAttention", arXiv:2205.14135.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from sparseinst_jax.models.forms import Form

BLOCK = 256  # pixels, about
UNSEEN = -1e30  # added to a score: its weight is 0, and in a row of such all are equal


def form(query: Any, key: Any, num_heads: int, has_mask: bool) -> Form | None:
    """Choose by the shapes and types [B, Q, C] and [B, S, C]; None where the plain form is best."""
    (_, queries, _), (_, keys, _) = query.shape, key.shape
    if query.dtype != jnp.float32 or max(queries, keys) < 2 * min(queries, keys):
        return None
    if queries > keys:
        return None if has_mask else _of_many(num_heads)
    return _to_many(num_heads)


@functools.cache
def _of_many(num_heads: int) -> Form:
    """Many queries look at a few keys: each block is for itself."""

    def forward(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        def block(image: jax.Array, cut: Callable[..., jax.Array]) -> jax.Array:
            heads = _heads(num_heads, _scaled(cut(query), num_heads), key[image], value[image])
            return jnp.concatenate([jax.nn.softmax(q @ k.T) @ v for q, k, v in heads], axis=-1)

        return _blocks(block, query).reshape(query.shape)

    def backward(cotangent: jax.Array, query: jax.Array, key: jax.Array, value: jax.Array):
        def block(image: jax.Array, cut: Callable[..., jax.Array]) -> list[jax.Array]:
            operands = _scaled(cut(query), num_heads), key[image], value[image], cut(cotangent)
            found = []
            for q, k, v, c in _heads(num_heads, *operands):
                weights = jax.nn.softmax(q @ k.T)
                to_weights = c @ v.T
                mean = (weights * to_weights).sum(-1, keepdims=True)
                to_scores = weights * (to_weights - mean)
                found.append((to_scores @ k, to_scores.T @ q, weights.T @ c))
            return [jnp.concatenate(each, axis=-1) for each in zip(*found, strict=True)]

        to_query, to_key, to_value = _blocks(block, query)
        return _scaled(to_query.reshape(query.shape), num_heads), to_key.sum(1), to_value.sum(1)

    return Form(forward, backward)


@functools.cache
def _to_many(num_heads: int) -> Form:
    """A few queries look at many keys: the blocks are put together by their largest scores."""

    def forward(
        query: jax.Array, key: jax.Array, value: jax.Array, is_seen: jax.Array | None = None
    ) -> jax.Array:
        result, _ = _attend(num_heads, _scaled(query, num_heads), key, value, is_seen)
        return result.reshape(query.shape)

    def backward(
        cotangent: jax.Array,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        is_seen: jax.Array | None = None,
    ):
        query = _scaled(query, num_heads)
        result, logarithms = _attend(num_heads, query, key, value, is_seen)
        means = (result * cotangent.reshape(result.shape)).sum(-1, keepdims=True)

        def block(image: jax.Array, cut: Callable[..., jax.Array]) -> list[jax.Array]:
            found = []
            of_heads = _scores(num_heads, query[image], cut(key), is_seen, cut)
            operands = query[image], cut(key), cut(value), cotangent[image]
            for head, (score, (q, k, v, c)) in enumerate(
                zip(of_heads, _heads(num_heads, *operands), strict=True)
            ):
                weights = jnp.exp(score - logarithms[image, :, head])
                to_scores = weights * (c @ v.T - means[image, :, head])
                found.append((to_scores @ k, to_scores.T @ q, weights.T @ c))
            return [jnp.concatenate(each, axis=-1) for each in zip(*found, strict=True)]

        to_query, to_key, to_value = _blocks(block, key)
        to_query = _scaled(to_query.sum(1), num_heads)
        gradients = to_query, to_key.reshape(key.shape), to_value.reshape(value.shape)
        return gradients if is_seen is None else (*gradients, None)

    return Form(forward, backward)


def _attend(
    num_heads: int,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    is_seen: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Return a few queries' results [B, Q, H, C/H], and the logarithms of the sums [B, Q, H, 1]."""

    def block(image: jax.Array, cut: Callable[..., jax.Array]) -> list[jax.Array]:
        found = []
        of_heads = _scores(num_heads, query[image], cut(key), is_seen, cut)
        for score, (v,) in zip(of_heads, _heads(num_heads, cut(value)), strict=True):
            largest = score.max(-1, keepdims=True)
            weights = jnp.exp(score - largest)
            found.append((largest, weights.sum(-1, keepdims=True), weights @ v))
        return [jnp.stack(each, axis=1) for each in zip(*found, strict=True)]

    each_largest, sums, results = _blocks(block, key)  # [B, blocks, Q, H, ...]
    largest = each_largest.max(1)
    factors = jnp.exp(each_largest - largest[:, None])
    total = (factors * sums).sum(1)
    return (factors * results).sum(1) / total, largest + jnp.log(total)


def _scores(
    num_heads: int,
    query: jax.Array,
    key: jax.Array,
    is_seen: jax.Array | None,
    cut: Callable[..., jax.Array],
) -> list[jax.Array]:
    """Score a block of keys for every head: [Q, S]."""
    more = 0.0 if is_seen is None else jnp.where(cut(is_seen, axis=2), 0.0, UNSEEN)
    return [q @ k.T + more for q, k in _heads(num_heads, query, key)]


def _scaled(query: jax.Array, num_heads: int) -> jax.Array:
    return query * (query.shape[-1] // num_heads) ** -0.5


def _heads(num_heads: int, *arrays: jax.Array) -> Iterator[tuple[jax.Array, ...]]:
    """Cut the channels: for each head its part of every array."""
    return zip(*[jnp.split(array, num_heads, axis=-1) for array in arrays], strict=True)


def _blocks(function: Callable[[jax.Array, Callable[..., jax.Array]], Any], pixels: Any) -> Any:
    """Call `function` for each block of pixels [B, P, C], one after the other.

    Args:
      function: gets the number of the image, and how to cut the block out of an array along an
        axis, 1 unless it says another.
      pixels: has the shape that counts.

    Returns:
      The results, [B, blocks, ...].
    """
    batch, length, _ = pixels.shape
    size = _block_size(length)
    number = length // size

    def call(index: jax.Array) -> Any:
        image, first = index // number, index % number * size

        def cut(array: jax.Array, axis: int = 1) -> jax.Array:
            starts, sizes = [0] * array.ndim, list(array.shape)
            starts[0], starts[axis] = image, first
            sizes[0], sizes[axis] = 1, size
            return jax.lax.dynamic_slice(array, starts, sizes)[0]

        return function(image, cut)

    found = jax.lax.map(call, jnp.arange(batch * number))
    return jax.tree.map(lambda x: x.reshape(batch, number, *x.shape[1:]), found)


def _block_size(length: int) -> int:
    """Return the divisor that is nearest to BLOCK, by ratio."""
    divisors = [n for n in range(1, length + 1) if length % n == 0]
    return min(divisors, key=lambda n: max(n / BLOCK, BLOCK / n))
