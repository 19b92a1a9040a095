"""Building blocks: convolution, linear and the norms.

Weights start as NumPy arrays drawn on the host: 33 million numbers take under a second, where
eager initialisation on the device takes 8 to 28 seconds, and every backend starts equal.
Layout: images NHWC, convolution kernels HWIO, linear kernels [in, out].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparseinst_jax.data.batch import DEVICE_AXIS
from sparseinst_jax.models import ops

NormName = Literal["frozen_batch_norm", "batch_norm", "group_norm"]
Initializer = Callable[[np.random.Generator, tuple[int, ...], int, int], np.ndarray]

NORM_EPSILON = 1e-5
POOL_SIZES = (1, 2, 3, 6)
MANY_ROWS = 4096  # of a linear layer's input: the pixels of a map, not the masks of a batch


class FrozenStatistic(nnx.Variable):
    """A number that is loaded and never trained: scale, bias, mean and variance of frozen norms."""


class Counter(nnx.Variable):
    """A whole number that goes up in training; among the statistics, in no published weights."""


def xavier(rng: np.random.Generator, shape, fan_in: int, fan_out: int) -> np.ndarray:
    """Draw U(-b, b), b = sqrt(3 / fan_in).

    Source: Caffe2's "XavierFill", detectron2's `c2_xavier_fill`.
    """
    bound = np.sqrt(3.0 / fan_in)
    return (rng.random(shape, np.float32) * 2 - 1) * np.float32(bound)


def msra(rng: np.random.Generator, shape, fan_in: int, fan_out: int) -> np.ndarray:
    """Draw N(0, 2 / fan_out).

    Source: Caffe2's "MSRAFill", detectron2's `c2_msra_fill`.
    """
    return rng.standard_normal(shape, np.float32) * np.float32(np.sqrt(2.0 / fan_out))


def torch_uniform(rng: np.random.Generator, shape, fan_in: int, fan_out: int) -> np.ndarray:
    """Draw U(-b, b), b = 1 / sqrt(fan_in): PyTorch's default for kernels and biases."""
    return (rng.random(shape, np.float32) * 2 - 1) * np.float32(1.0 / np.sqrt(fan_in))


def glorot(rng: np.random.Generator, shape, fan_in: int, fan_out: int) -> np.ndarray:
    """Draw U(-b, b), b = sqrt(6 / (fan_in + fan_out)): PyTorch's `xavier_uniform_`."""
    bound = np.sqrt(6.0 / (fan_in + fan_out))
    return (rng.random(shape, np.float32) * 2 - 1) * np.float32(bound)


def normal(deviation: float) -> Initializer:
    """Return an initializer that draws N(0, deviation²)."""
    return lambda rng, shape, *_: rng.standard_normal(shape, np.float32) * np.float32(deviation)


def constant(value: float) -> Initializer:
    """Return an initializer that fills with one value."""
    return lambda rng, shape, fan_in, fan_out: np.full(shape, value, np.float32)


zeros = constant(0.0)


class Conv(nnx.Module):
    """Convolution with zero padding: (kernel_size - 1) / 2 on either side, as PyTorch pads.

    Args:
      in_channels, out_channels: numbers of channels.
      kernel_size: odd side of the square kernel in pixels.
      stride: step in pixels.
      groups: group g sees input channels [g * in / groups, (g + 1) * in / groups).
      kernel_init, bias_init: initializers; no bias when `bias_init` is None.
      norm: a norm applied to the result, kept under the name `norm`, or None.
      same: pad as TensorFlow does instead; see `forms.borders`.
      dtype: compute type; parameters stay float32.
      rng: source of the initial weights.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        kernel_init: Initializer = msra,
        bias_init: Initializer | None = zeros,
        norm: nnx.Module | None = None,
        same: bool = False,
        dtype: Any = jnp.float32,
        rng: np.random.Generator,
    ):
        area = kernel_size * kernel_size
        fan_in, fan_out = area * in_channels // groups, area * out_channels
        shape = (kernel_size, kernel_size, in_channels // groups, out_channels)
        self.kernel = nnx.Param(kernel_init(rng, shape, fan_in, fan_out))
        if bias_init is not None:
            self.bias = nnx.Param(bias_init(rng, (out_channels,), fan_in, fan_out))
        if norm is not None:
            self.norm = norm
        self.has_bias, self.has_norm = bias_init is not None, norm is not None
        self.kernel_size, self.stride, self.groups, self.dtype = kernel_size, stride, groups, dtype
        self.same = same

    def __call__(
        self, x: jax.Array, train: bool = False, shared: jax.Array | None = None
    ) -> jax.Array:
        """Map [B, H, W, in] to [B, ceil(H / stride), ceil(W / stride), out].

        Args:
          x: the images, without the channels of `shared`.
          train: passed to the norm.
          shared: [1, H, W, S], the first channels of all images, constants; see `ops.convolve`.
        """
        x, kernel = x.astype(self.dtype), self.kernel[...]
        shared = None if shared is None else shared.astype(self.dtype)
        if train and self.has_norm and isinstance(self.norm, FrozenBatchNorm) and not self.has_bias:
            # Its factor goes into the kernel: the gradients of results need no pass of their own.
            _, shift = self.norm.factors()
            y = self._convolve_scaled(x, kernel, self.norm, shared)
            return y + shift.astype(self.dtype)
        y = self._convolve(x, kernel.astype(self.dtype), shared)
        if self.has_bias:
            y = y + self.bias[...].astype(self.dtype)
        return self.norm(y, train) if self.has_norm else y

    def fold_norm(self) -> None:
        """Fold the norm into kernel and bias for inference, if it is the same for all images.

        For inference only.
        """
        if self.has_norm and isinstance(self.norm, FrozenBatchNorm | BatchNorm):
            self.fold(self.norm)
            del self.norm
            self.has_norm = False

    def fold(self, norm: FrozenBatchNorm | BatchNorm) -> None:
        """Multiply the kernel and add to the bias as a norm of the result does."""
        scale, shift = norm.factors()
        self.kernel = nnx.Param(self.kernel[...] * scale)
        self.bias = nnx.Param(shift + (self.bias[...] * scale if self.has_bias else 0.0))
        self.has_bias = True

    def _convolve(self, x: jax.Array, kernel: jax.Array, shared: jax.Array | None) -> jax.Array:
        return ops.convolve(x, kernel, self.stride, self.groups, shared, self.same)

    def _convolve_scaled(
        self, x: jax.Array, kernel: jax.Array, norm: FrozenBatchNorm, shared: jax.Array | None
    ) -> jax.Array:
        def convolve(x, kernel):
            scale, _ = norm.factors()
            kernel = (kernel * scale).astype(self.dtype)
            return self._convolve(x, kernel, shared)

        # The gradient keeps kernel and norm themselves, and scales again.
        return jax.checkpoint(convolve, prevent_cse=False)(x, kernel)


class Linear(nnx.Module):
    """Affine map of the last axis, computed in `dtype`; the kernel is [in, out]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        kernel_init: Initializer = torch_uniform,
        bias_init: Initializer = zeros,
        dtype: Any = jnp.float32,
        rng: np.random.Generator,
    ):
        fans = in_features, out_features
        self.kernel = nnx.Param(kernel_init(rng, (in_features, out_features), *fans))
        self.bias = nnx.Param(bias_init(rng, (out_features,), *fans))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [..., in] to [..., out]."""
        kernel, bias = self.kernel[...].astype(self.dtype), self.bias[...].astype(self.dtype)
        return affine(x.astype(self.dtype), kernel, bias)


def affine(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Map [..., in] to [..., out]; the pixels of a map as one product of two matrices.

    For the kernel's gradient of a product of more axes XLA:CPU turns x round, which takes up to
    twice as long as the product. Few rows are not worth another order of sums.
    """
    rows = x.shape[:-1]
    if all(isinstance(size, int) for size in rows) and math.prod(rows) >= MANY_ROWS:
        return (x.reshape(-1, x.shape[-1]) @ kernel + bias).reshape(*rows, -1)
    return x @ kernel + bias


class FrozenBatchNorm(nnx.Module):
    """Batch norm of four constant vectors: y = (x - mean) / sqrt(var + epsilon) * scale + bias."""

    def __init__(self, channels: int, *, epsilon: float = NORM_EPSILON):
        self.scale = FrozenStatistic(np.ones((channels,), np.float32))
        self.bias = FrozenStatistic(np.zeros((channels,), np.float32))
        self.mean = FrozenStatistic(np.zeros((channels,), np.float32))
        self.var = FrozenStatistic(np.ones((channels,), np.float32))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Normalise [B, H, W, C]; `train` changes nothing."""
        scale, shift = self.factors()
        return x * scale.astype(x.dtype) + shift.astype(x.dtype)

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """Return float32 [C], what to multiply by and what to add then."""
        scale = self.scale[...] * jax.lax.rsqrt(self.var[...] + self.epsilon)
        return scale, self.bias[...] - self.mean[...] * scale


class BatchNorm(nnx.Module):
    """Batch norm with trained scale and bias, and statistics of the batch over all devices.

    In training the mean and variance are those of the batch, averaged over the devices of the
    mapped axis, so that a step does not depend on how a batch is spread over devices. It does
    depend on gradient accumulation: each micro-batch is normalised separately. The running
    statistics move by 10 % a micro-batch; evaluation uses them.

    Differs from PyTorch: the running variance takes the variance of the batch as it normalises,
    not n / (n - 1) times it, which is 0.6 % at the 160 cells of the demo's coarsest map.
    """

    momentum = 0.1  # of the newest batch, as PyTorch counts it

    def __init__(self, channels: int, *, epsilon: float = NORM_EPSILON):
        self.scale = nnx.Param(np.ones((channels,), np.float32))
        self.bias = nnx.Param(np.zeros((channels,), np.float32))
        self.epsilon = epsilon
        self.mean = nnx.BatchStat(np.zeros((channels,), np.float32))
        self.var = nnx.BatchStat(np.ones((channels,), np.float32))

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Normalise [B, H, W, C]; in training also move the running statistics."""
        if not train:
            scale, shift = self.factors()
        else:
            wide = x.astype(jnp.float32)
            mean, square = wide.mean((0, 1, 2)), jnp.square(wide).mean((0, 1, 2))
            mean, square = _average_over_devices((mean, square))
            var = jnp.maximum(square - jnp.square(mean), 0.0)
            keep = 1 - self.momentum
            self.mean[...] = keep * self.mean[...] + self.momentum * jax.lax.stop_gradient(mean)
            self.var[...] = keep * self.var[...] + self.momentum * jax.lax.stop_gradient(var)
            scale, shift = self._factors(mean, var)
        return x * scale.astype(x.dtype) + shift.astype(x.dtype)

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """Return float32 [C], what evaluation multiplies by and adds then."""
        return self._factors(self.mean[...], self.var[...])

    def _factors(self, mean: jax.Array, var: jax.Array) -> tuple[jax.Array, jax.Array]:
        scale = self.scale[...] * jax.lax.rsqrt(var + self.epsilon)
        return scale, self.bias[...] - mean * scale


class LayerNorm(nnx.Module):
    """Layer norm over the channels of each pixel, statistics in float32.

    Args:
      channels: C.
      epsilon: added to the variance; implementations differ, so it has no default.
    """

    def __init__(self, channels: int, epsilon: float):
        self.scale = nnx.Param(np.ones((channels,), np.float32))
        self.bias = nnx.Param(np.zeros((channels,), np.float32))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise [..., C]."""
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        var = jnp.square(centred).mean(-1, keepdims=True)
        normalized = centred * jax.lax.rsqrt(var + self.epsilon)
        return (normalized * self.scale[...] + self.bias[...]).astype(x.dtype)


def _average_over_devices(values):
    """Average over the mapped axis of a training step; outside of one, return the values."""
    try:
        return jax.lax.pmean(values, DEVICE_AXIS)
    except NameError:  # no such axis: a single-device call, as in a notebook
        return values


class GroupNorm(nnx.Module):
    """Group norm, statistics in float32 over each image's groups of channels."""

    def __init__(self, channels: int, groups: int = 32, *, epsilon: float = NORM_EPSILON):
        while channels % groups or channels // groups < 2:
            groups //= 2  # narrow networks: at least two channels a group
        self.scale = nnx.Param(np.ones((channels,), np.float32))
        self.bias = nnx.Param(np.zeros((channels,), np.float32))
        self.groups, self.epsilon = groups, epsilon

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Normalise [B, H, W, C]."""
        grouped = x.astype(jnp.float32).reshape(*x.shape[:3], self.groups, -1)
        mean = grouped.mean((1, 2, 4), keepdims=True)
        var = jnp.square(grouped - mean).mean((1, 2, 4), keepdims=True)
        normalized = ((grouped - mean) * jax.lax.rsqrt(var + self.epsilon)).reshape(x.shape)
        return (normalized * self.scale[...] + self.bias[...]).astype(x.dtype)


class PyramidPooling(nnx.Module):
    """Means over 1x1, 2x2, 3x3 and 6x6 windows, projected, upsampled and joined with the input."""

    def __init__(self, channels: int, *, dtype: Any, rng: np.random.Generator):
        conv = functools.partial(
            Conv,
            kernel_init=torch_uniform,
            bias_init=torch_uniform,
            dtype=dtype,
            rng=rng,
        )
        self.stages = nnx.List([conv(channels, channels // 4, 1) for _ in POOL_SIZES])
        joined = channels + len(POOL_SIZES) * (channels // 4)
        self.bottleneck = conv(joined, channels, 1)

    def __call__(self, x: jax.Array) -> jax.Array:  # [B, h, w, C] to the same
        pooled = [
            ops.relu(stage(ops.adaptive_average_pool(x, size)))
            for stage, size in zip(self.stages, POOL_SIZES, strict=True)
        ]
        pooled = [ops.resize_bilinear(p, x.shape[1:3]) for p in pooled]
        return ops.relu(self.bottleneck(jnp.concatenate([*pooled, x], axis=-1)))


NORMS: dict[str, Callable[..., nnx.Module]] = {
    "frozen_batch_norm": FrozenBatchNorm,
    "batch_norm": BatchNorm,
    "group_norm": GroupNorm,
}
