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
        return _of_few_channels(stride)
    if groups > 1:
        return _in_groups(stride, groups)
    if kernel.shape[:2] == (1, 1):
        return _products(stride)
    if winograd.is_faster(x, kernel, stride):
        return winograd.FORM
    is_wide = min(kernel.shape[2:]) >= winograd.LEAST_CHANNELS
    return _by_taps(stride) if is_wide and x.dtype == jnp.float32 else None


def _read_by_taps(x: jax.Array, side: int, stride: int = 1, same: bool = False) -> list[jax.Array]:
    """Return what each tap of a kernel reads: side * side images [B, h, w, C]."""
    height, width = (-(-length // stride) for length in x.shape[1:3])
    pads = [forms.borders(length, side, stride, same) for length in x.shape[1:3]]
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    rows, columns = (height - 1) * stride + 1, (width - 1) * stride + 1
    return [
        x[:, i : i + rows : stride, j : j + columns : stride]
        for i in range(side)
        for j in range(side)
    ]


@functools.cache
def _by_taps(stride: int) -> Form:
    """A convolution of many channels whose kernel gradient is a product for each tap.

    XLA:CPU's takes 1.2 to 2.2 times as long: 90 ms in place of 53 of 128 channels, stride 2, for
    two results of 64 x 64.
    """
    plain = forms.convolution(stride, 1)

    def backward(cotangent: jax.Array, x: jax.Array, kernel: jax.Array):
        to_x, _ = plain.backward(cotangent, x, kernel)
        pixels = cotangent.reshape(-1, cotangent.shape[-1])
        read = _read_by_taps(x, len(kernel), stride)
        taps = [part.reshape(-1, x.shape[-1]).T @ pixels for part in read]
        return to_x, jnp.stack(taps).reshape(kernel.shape)

    return Form(plain.forward, backward)


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
def _of_few_channels(stride: int) -> Form:
    """A convolution of few channels, padded as "same", as a sum of images times vectors.

    It compiles to one pass over memory, of which a norm becomes part: a fourth of the time that a
    product of patches takes, 1.2 ms in place of 5.2 of 320 x 448 pixels. XLA:CPU's gradient of such
    a kernel is slow, and that of a product of patches is one more product.
    """

    def forward(x: jax.Array, kernel: jax.Array) -> jax.Array:
        read = _read_by_taps(x.astype(jnp.float32), len(kernel), stride, same=True)
        taps = kernel.astype(jnp.float32).reshape(-1, *kernel.shape[2:])
        terms = [
            image[..., channel, None] * vector
            for image, vectors in zip(read, taps, strict=True)
            for channel, vector in enumerate(vectors)
        ]
        return functools.reduce(jnp.add, terms).astype(x.dtype)

    def convolve_patches(x: jax.Array, kernel: jax.Array) -> jax.Array:
        patches = jnp.concatenate(_read_by_taps(x, len(kernel), stride, same=True), axis=-1)
        y = patches.reshape(-1, patches.shape[-1]) @ kernel.reshape(-1, kernel.shape[-1])
        return y.reshape(*patches.shape[:-1], -1)

    return Form(forward, forms.bilinear(convolve_patches).backward)


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
    taps = kernel.astype(jnp.float32).reshape(9, -1)
    read = _read_by_taps(x.astype(jnp.float32), 3)
    return functools.reduce(jnp.add, [part * tap for part, tap in zip(read, taps, strict=True)])


def _depthwise_gradients(cotangent: jax.Array, x: jax.Array, kernel: jax.Array):
    # Without the barrier XLA would make the cotangent again for each of the shifts.
    cotangent = jax.lax.optimization_barrier(cotangent)
    read = _read_by_taps(x.astype(jnp.float32), 3)
    sums = [(part * cotangent).sum((0, 1, 2)) for part in read]
    to_x = _depthwise(cotangent, kernel[::-1, ::-1])
    return to_x.astype(x.dtype), jnp.stack(sums).reshape(kernel.shape).astype(kernel.dtype)


DEPTHWISE = Form(_depthwise, _depthwise_gradients)
