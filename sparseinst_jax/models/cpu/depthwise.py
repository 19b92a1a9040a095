"""Convolution of each channel with a kernel of its own, as sums of shifted products.

XLA:CPU's convolution in as many groups as channels takes ten times as long, its gradients more.
All layers of EfficientNet-Lite0 for one photo of 320 x 448, milliseconds of one core: forward 14,
gradient of the image 13. Gradient of the kernels: 194 with one reduction for each tap, 43 with a
loop over rows that all taps share, fewer with one such loop for each row of the kernel, which also
compiles twice as fast.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from sparseinst_jax.models import forms
from sparseinst_jax.models.forms import Form


@functools.cache
def form(stride: int, same: bool) -> Form:
    """Make the form; operands are x [B, H, W, C] and a kernel [k, k, 1, C].

    At a stride, x is taken apart into stride x stride images of every such pixel: each tap reads
    one of them, and the gradient of x puts them together again.
    """

    def borders(x: jax.Array, side: int) -> list[tuple[int, int]]:
        """Zeros before and behind each axis; behind, up to whole strides."""
        pairs = [forms.borders(length, side, stride, same) for length in x.shape[1:3]]
        lengths = zip(x.shape[1:3], pairs, strict=True)
        return [(low, high + -(low + length + high) % stride) for length, (low, high) in lengths]

    def padded(x: jax.Array, side: int) -> jax.Array:
        return jnp.pad(x.astype(jnp.float32), ((0, 0), *borders(x, side), (0, 0)))

    def forward(x: jax.Array, kernel: jax.Array) -> jax.Array:
        size = tuple(-(-length // stride) for length in x.shape[1:3])
        return _products(padded(x, len(kernel)), _wide(kernel), stride, size).astype(x.dtype)

    def backward(cotangent: jax.Array, x: jax.Array, kernel: jax.Array):
        # Without the barrier XLA would make the cotangent again for each of its uses.
        cotangent = jax.lax.optimization_barrier(_wide(cotangent))
        (top, _), (left, _) = borders(x, len(kernel))
        to_padded = _gradient_of_image(cotangent, _wide(kernel), stride)
        to_x = to_padded[:, top : top + x.shape[1], left : left + x.shape[2]]
        to_kernel = _gradient_of_kernel(cotangent, padded(x, len(kernel)), len(kernel), stride)
        return to_x.astype(x.dtype), to_kernel.astype(kernel.dtype)

    return Form(forward, backward)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _grid(side: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(side) for j in range(side)]


def _products(x: jax.Array, kernel: jax.Array, stride: int, size: tuple[int, ...]) -> jax.Array:
    """Convolve a padded image."""
    height, width = size
    parts = {(i, j): x[:, i::stride, j::stride] for i, j in _grid(stride)}
    products = []
    for i, j in _grid(len(kernel)):
        part, top, left = parts[i % stride, j % stride], i // stride, j // stride
        products.append(part[:, top : top + height, left : left + width] * kernel[i, j, 0])
    return functools.reduce(jnp.add, products)


def _gradient_of_image(cotangent: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Of the padded image."""
    batch, height, width, channels = cotangent.shape
    reach = (len(kernel) - 1) // stride
    rows, columns = height + reach, width + reach
    edge = (0, 0), (reach, reach), (reach, reach), (0, 0)
    wide = jnp.pad(cotangent, edge)

    def part(row: int, column: int) -> jax.Array:
        products = []
        for i in range(row, len(kernel), stride):
            for j in range(column, len(kernel), stride):
                top, left = reach - i // stride, reach - j // stride
                products.append(wide[:, top : top + rows, left : left + columns] * kernel[i, j, 0])
        return functools.reduce(jnp.add, products)

    parts = jnp.stack([part(*place) for place in _grid(stride)])
    parts = parts.reshape(stride, stride, batch, rows, columns, channels)
    parts = parts.transpose(2, 3, 0, 4, 1, 5)
    return parts.reshape(batch, rows * stride, columns * stride, channels)


def _gradient_of_kernel(cotangent: jax.Array, x: jax.Array, side: int, stride: int) -> jax.Array:
    """Sum over the rows of all images, for one row of the kernel after the other."""
    batch, height, width, channels = cotangent.shape
    rows = x.shape[1]  # of a padded image
    x = x.reshape(batch * rows, -1, channels)
    parts = [x[:, column::stride] for column in range(stride)]
    cotangent = cotangent.reshape(batch * height, width, channels)

    def of_row(i: jax.Array) -> jax.Array:  # of the kernel: [k, C]
        def add(n: jax.Array, sums: list[jax.Array]) -> list[jax.Array]:
            read = n // height * rows + n % height * stride + i
            lines = [part[read] for part in parts]
            return [
                total + lines[j % stride][j // stride : j // stride + width] * cotangent[n]
                for j, total in enumerate(sums)
            ]

        sums = [jnp.zeros((width, channels))] * side
        return jnp.stack(
            [total.sum(0) for total in jax.lax.fori_loop(0, batch * height, add, sums)]
        )

    return jax.lax.map(of_row, jnp.arange(side))[:, :, None]
