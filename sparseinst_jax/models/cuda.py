"""The forms in which a GPU takes convolutions: whole multiples of 8 channels, and few kernels.

cuDNN is slow where the number of channels is not a multiple of 8. XLA pads only float16, and never
groups. Measured on an H200 in bfloat16, 8 images of 640 x 864, milliseconds forward and backward:

    first convolution of a branch, 258 to 256     0.27 + 0.54   shared channels apart: 0.18 + 0.30
    activation maps, 4 groups of 64 to 100        0.43 + 0.90   one dense kernel:      0.22 + 0.42
    stem, 7x7 of stride 2, 3 to 64                0.65 + 0.44   blocks of 2x2 pixels:  0.32 + 0.27
    1x1, 1024 to 256 at 40 x 54                   0.08 + 0.10   a product:             0.04 + 0.07

The blocks were measured with 12 channels; here they have 16, a multiple of 8.
All forms are linear in image and kernel, so that their gradients are transposes.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from sparseinst_jax.models import forms
from sparseinst_jax.models.forms import Form

ALIGNMENT = 8  # channels
MOST_DENSE_GROUPS = 4  # more would make too many products with zeros


def form(
    x: jax.Array | jax.ShapeDtypeStruct,
    kernel: jax.Array,
    stride: int,
    groups: int,
    same: bool = False,
) -> Form | None:
    """Choose by the shapes of the operands; None where the plain form is best."""
    side, _, inputs, outputs = kernel.shape
    if groups > 1:
        return dense(stride, groups) if groups <= MOST_DENSE_GROUPS else None
    if side == 1:
        return product(stride)
    if same:
        return None
    if inputs < ALIGNMENT and all(length % stride == 0 for length in x.shape[1:3]):
        return blocks_of(stride)
    return aligned(stride) if inputs % ALIGNMENT or outputs % ALIGNMENT else None


@functools.cache
def product(stride: int) -> Form:
    """A 1x1 convolution as a product of each pixel."""
    return forms.bilinear(
        lambda x, kernel: jnp.einsum("bhwc,cd->bhwd", x[:, ::stride, ::stride], kernel[0, 0])
    )


@functools.cache
def aligned(stride: int) -> Form:
    """Channels of zeros up to a multiple of 8, before and after."""

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        outputs = kernel.shape[-1]
        x, kernel = _widen(x, -1, ALIGNMENT), _widen(_widen(kernel, 2, ALIGNMENT), 3, ALIGNMENT)
        return forms.convolution(stride, 1).forward(x, kernel)[..., :outputs]

    return forms.bilinear(convolve)


def _widen(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    """Add zeros at the end of an axis."""
    if x.shape[axis] % multiple == 0:
        return x
    border = [(0, 0)] * x.ndim
    border[axis] = 0, -x.shape[axis] % multiple
    return jnp.pad(x, border)


@functools.cache
def dense(stride: int, groups: int) -> Form:
    """Groups as one convolution, with zeros from every group to the others.

    Four times the products, and less than half of the time.
    """

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        side, _, inputs, outputs = kernel.shape
        apart = kernel.reshape(side, side, 1, inputs, groups, outputs // groups)
        apart = apart * jnp.eye(groups, dtype=kernel.dtype)[:, None, :, None]
        kernel = apart.reshape(side, side, groups * inputs, outputs)
        return aligned(stride).forward(x, kernel)

    return forms.bilinear(convolve)


@functools.cache
def blocks_of(stride: int) -> Form:
    """A convolution of few channels as one of stride 1 over blocks of stride x stride pixels.

    The pixels of a block become channels, and the kernel gets zeros before and behind, so that it
    begins and ends with a block.
    """

    def blocks(x: jax.Array, channels: int) -> jax.Array:
        """Map [B, H, W, C] to [B, H / stride, W / stride, stride * stride * channels]."""
        batch, height, width, own = x.shape
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, channels - own)))
        x = x.reshape(batch, height // stride, stride, width // stride, stride, channels)
        x = x.swapaxes(2, 3)
        return x.reshape(batch, height // stride, width // stride, stride * stride * channels)

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        side, _, inputs, outputs = kernel.shape
        # Fewest channels with which a block has a multiple of 8.
        multiple = ALIGNMENT // math.gcd(ALIGNMENT, stride * stride)
        channels = -(-inputs // multiple) * multiple
        border = (side - 1) // 2
        before = -border % stride  # rows of zeros, so that the first row begins a block
        behind = -(before + side) % stride
        kernel = jnp.pad(kernel, ((before, behind),) * 2 + ((0, 0), (0, 0)))
        # As an image of its own: [outputs, side, side, inputs].
        kernel = blocks(kernel.transpose(3, 0, 1, 2), channels).transpose(1, 2, 3, 0)
        low = (border + before) // stride  # blocks before the image
        padding = (low, kernel.shape[0] - 1 - low)
        kernel = _widen(kernel, 3, ALIGNMENT)
        y = jax.lax.conv_general_dilated(
            blocks(x, channels),
            kernel,
            window_strides=(1, 1),
            padding=(padding, padding),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y[..., :outputs]

    return forms.bilinear(convolve)


@functools.cache
def shared_apart(stride: int) -> Form:
    """Channels that all images share as a convolution of their own, of one image.

    Operands: x [B, H, W, C], kernel [k, k, S + C, D], shared [1, H, W, S]. No gradient of `shared`.
    """
    convolve = aligned(stride)

    def forward(x: jax.Array, kernel: jax.Array, shared: jax.Array) -> jax.Array:
        number = shared.shape[-1]
        y = convolve.forward(x, kernel[:, :, number:])
        return y + convolve.forward(shared, kernel[:, :, :number])

    def backward(cotangent: jax.Array, x: jax.Array, kernel: jax.Array, shared: jax.Array):
        number = shared.shape[-1]
        to_x, to_own = convolve.backward(cotangent, x, kernel[:, :, number:])
        of_all = cotangent.sum(0, keepdims=True)
        _, to_others = convolve.backward(of_all, shared, kernel[:, :, :number])
        return to_x, jnp.concatenate([to_others, to_own], axis=2), None

    return Form(forward, backward)
