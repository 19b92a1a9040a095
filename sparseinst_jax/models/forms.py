"""Forms of one operation, chosen for the platform that a program is lowered for.

A program may be lowered for another platform than the one it is traced on: exported for a GPU on a
laptop, or placed on the CPU of a machine with a GPU. So nothing here asks which backend is running;
every form is traced, and the one that the platform needs is kept when the program is lowered.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Form(NamedTuple):
    """One way to compute an operation.

    Attributes:
      forward: maps the operands to the result.
      backward: maps the cotangent of the result, then the operands, to a tuple of their cotangents.
    """

    forward: Callable[..., Any]
    backward: Callable[..., tuple[Any, ...]]


@functools.cache
def by_platform(default: Form, **others: Form) -> Callable[..., Any]:
    """Make a function that takes the form of the platform it is lowered for.

    Its gradient is a choice of its own: differentiated, the choice would keep what every form
    needs for its gradient. So only the operands are kept.

    Args:
      default: the plain form, which is also what `complexity` counts.
      **others: of platforms, under their names in jax: `cpu`, `cuda`, `rocm`, `tpu`.
    """

    def choose(part: Callable[[Form], Callable[..., Any]], *operands: Any) -> Any:
        parts = {platform: part(form) for platform, form in others.items()}
        return jax.lax.platform_dependent(*operands, default=part(default), **parts)

    @jax.custom_vjp
    def operation(*operands: Any) -> Any:
        return choose(lambda form: form.forward, *operands)

    def forward(*operands: Any) -> tuple[Any, tuple[Any, ...]]:
        return operation(*operands), operands

    def backward(operands: tuple[Any, ...], cotangent: Any) -> tuple[Any, ...]:
        return choose(lambda form: form.backward, cotangent, *operands)

    operation.defvjp(forward, backward)
    return operation


def bilinear(product: Callable[[Any, Any], Any]) -> Form:
    """Make a form of a function that is linear in both of its operands, as a convolution is."""

    def backward(cotangent: Any, a: Any, b: Any) -> tuple[Any, Any]:
        (to_a,) = jax.linear_transpose(lambda a: product(a, b), a)(cotangent)
        (to_b,) = jax.linear_transpose(lambda b: product(a, b), b)(cotangent)
        return to_a, to_b

    return Form(product, backward)


def borders(length: int, side: int, stride: int, same: bool) -> tuple[int, int]:
    """Pixels of zeros before and behind an axis for a kernel of odd size.

    As PyTorch pads, (side - 1) / 2 on either side; or, as TensorFlow does under the name "same",
    only as many as ceil(length / stride) results read, of an odd number the larger part behind.
    """
    if not same:
        return (side - 1) // 2, (side - 1) // 2
    whole = max((-(-length // stride) - 1) * stride + side - length, 0)
    return whole // 2, whole - whole // 2


@functools.cache
def convolution(stride: int, groups: int, same: bool = False) -> Form:
    """Return the plain form of a convolution; see `ops.convolve`."""

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        border = (kernel.shape[0] - 1) // 2
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(stride, stride),
            padding="SAME" if same else ((border, border), (border, border)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    return bilinear(convolve)


@functools.cache
def joined(form: Form) -> Form:
    """Make a form with a third operand: channels [1, H, W, S] before those of every image.

    They get no gradient.
    """

    def join(x: jax.Array, shared: jax.Array) -> jax.Array:
        shared = jnp.broadcast_to(shared, (*x.shape[:3], shared.shape[-1]))
        return jnp.concatenate([shared, x], axis=-1)

    def forward(x: jax.Array, kernel: jax.Array, shared: jax.Array) -> jax.Array:
        return form.forward(join(x, shared), kernel)

    def backward(cotangent: jax.Array, x: jax.Array, kernel: jax.Array, shared: jax.Array):
        to_all, to_kernel = form.backward(cotangent, join(x, shared), kernel)
        return to_all[..., shared.shape[-1] :], to_kernel, None

    return Form(forward, backward)
