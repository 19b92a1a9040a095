"""The forms in which a CPU takes convolutions; no other platform gains from them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from sparseinst_jax.models import forms
from sparseinst_jax.models.cpu import depthwise, winograd
from sparseinst_jax.models.cpu.products import product
from sparseinst_jax.models.forms import Form

FEW_CHANNELS = 8


def form(
    x: jax.Array | jax.ShapeDtypeStruct,
    kernel: jax.Array,
    stride: int,
    groups: int,
    same: bool = False,
) -> Form | None:
    """Choose by the shapes and types of the operands; None where the plain form is best."""
    if groups == x.shape[-1] == kernel.shape[-1] and groups > 1:
        return depthwise.form(stride, same)
    if same and groups == 1 and kernel.shape[2] < FEW_CHANNELS:
        return _of_patches(stride)
    if groups > 1:
        return _in_groups(stride, groups)
    if kernel.shape[:2] == (1, 1):
        return _products(stride)
    return winograd.FORM if winograd.is_faster(x, kernel, stride) else None


@functools.cache
def _products(stride: int) -> Form:
    """A 1x1 convolution as one product of two matrices, and its gradients as two.

    XLA:CPU's gradient of a 1x1 convolution is far slower, and for the kernel gradient of a product
    of more axes it would transpose the image, which takes as long as the product.
    """

    def chosen(x: jax.Array) -> jax.Array:
        return x[:, ::stride, ::stride]

    def forward(x: jax.Array, kernel: jax.Array) -> jax.Array:
        x = chosen(x)
        y = product(x.reshape(-1, x.shape[-1]), kernel[0, 0]).astype(x.dtype)
        return y.reshape(*x.shape[:-1], -1)

    def backward(cotangent: jax.Array, x: jax.Array, kernel: jax.Array):
        pixels, read = cotangent.reshape(-1, cotangent.shape[-1]), chosen(x)
        to_kernel = read.reshape(-1, read.shape[-1]).T @ pixels
        to_read = (pixels @ kernel[0, 0].T).reshape(read.shape)
        (to_x,) = jax.linear_transpose(chosen, x)(to_read)
        return to_x, to_kernel.reshape(kernel.shape)

    return Form(forward, backward)


@functools.cache
def _of_patches(stride: int) -> Form:
    """A convolution of few channels, padded as "same", as one product of its patches.

    XLA:CPU's gradient of such a kernel is slow, and a product's is one more product.
    """

    def patches(x: jax.Array, side: int) -> jax.Array:
        """Return [B * h * w, k * k * C]."""
        height, width = (-(-length // stride) for length in x.shape[1:3])
        pads = [forms.borders(length, side, stride, same=True) for length in x.shape[1:3]]
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
        read = [
            x[
                :,
                i : i + (height - 1) * stride + 1 : stride,
                j : j + (width - 1) * stride + 1 : stride,
            ]
            for i in range(side)
            for j in range(side)
        ]
        return jnp.concatenate(read, axis=-1).reshape(-1, side * side * x.shape[-1])

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        height, width = (-(-length // stride) for length in x.shape[1:3])
        y = patches(x, kernel.shape[0]) @ kernel.reshape(-1, kernel.shape[-1])
        return y.reshape(len(x), height, width, -1)

    return forms.bilinear(convolve)


@functools.cache
def _in_groups(stride: int, groups: int) -> Form:
    """Each group as a convolution of its own.

    XLA:CPU takes 65 times as long for the kernel gradient of a grouped convolution as for those of
    its parts.
    """

    def split(*arrays: jax.Array) -> zip[tuple[jax.Array, ...]]:
        return zip(*[jnp.split(array, groups, axis=-1) for array in arrays], strict=True)

    def part(x: jax.Array, kernel: jax.Array) -> Form:
        return form(x, kernel, stride, 1) or forms.convolution(stride, 1)

    def forward(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.concatenate([part(x, k).forward(x, k) for x, k in split(x, kernel)], axis=-1)

    def backward(cotangent: jax.Array, x: jax.Array, kernel: jax.Array):
        parts = [part(x, k).backward(c, x, k) for c, x, k in split(cotangent, x, kernel)]
        return tuple(jnp.concatenate(gradients, axis=-1) for gradients in zip(*parts, strict=True))

    return Form(forward, backward)


def _depthwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Add up nine shifted products, which compiles to one pass over memory.

    On XLA:CPU eight times as fast as a convolution in as many groups as channels.
    """
    kernel = kernel.astype(jnp.float32)
    taps = [x * kernel[i, j, 0] for i, j, x in _shifted_3x3(x)]
    return functools.reduce(jnp.add, taps)


def _depthwise_gradients(cotangent: jax.Array, x: jax.Array, kernel: jax.Array):
    # Without the barrier XLA would make the cotangent again for each of the shifts.
    cotangent = jax.lax.optimization_barrier(cotangent)
    sums = [(x * cotangent).sum((0, 1, 2)) for _, _, x in _shifted_3x3(x)]
    to_x = _depthwise(cotangent, kernel[::-1, ::-1])
    return to_x.astype(x.dtype), jnp.stack(sums).reshape(kernel.shape).astype(kernel.dtype)


def _shifted_3x3(x: jax.Array) -> list[tuple[int, int, jax.Array]]:
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))).astype(jnp.float32)
    return [(i, j, padded[:, i : i + height, j : j + width]) for i in range(3) for j in range(3)]


DEPTHWISE = Form(_depthwise, _depthwise_gradients)
