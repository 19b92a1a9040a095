"""Deformable convolution: every tap of the kernel reads the map at a learned place.

    y[p] = sum over taps t of  kernel[t] . m[p, t] x(p * stride - border + t + offset[p, t])

x(.) is bilinear, and zero beyond one pixel from the border. Version 1 has m = 1, version 2
("modulated") learns m too. The places of all taps go into one gather of 2x2 windows, their mean by
the four bilinear weights gives the columns [B, h, w, taps * C], and one matrix product with the
kernel the result. The modulation is a factor of the four weights, so it costs nothing.

Source: Dai et al., arXiv:1703.06211 (version 1); Zhu et al., arXiv:1811.11168 (version 2). The
channel order and the border are those of detectron2 and of PaddleDetection.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from sparseinst_jax.models import layers

KERNEL_SIZE = 3
TAPS = KERNEL_SIZE * KERNEL_SIZE
OFFSET_CHANNELS = 2 * TAPS  # channel 2t moves tap t down, 2t + 1 to the right, in pixels
MODULATED_CHANNELS = OFFSET_CHANNELS + TAPS  # then the logit of m for every tap
CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))


def offset_channels(modulated: bool) -> int:
    """Return the channels of the convolution that says where (and how much) to sample."""
    return MODULATED_CHANNELS if modulated else OFFSET_CHANNELS


class DeformableConv(nnx.Module):
    """3x3 deformable convolution without bias, and a norm; the places come from outside.

    Args:
      channels: of the input and of the output.
      stride: step in pixels.
      norm: applied to the result.
      dtype: compute type; places and bilinear weights are float32.
      rng: source of the initial weights.
    """

    def __init__(
        self,
        channels: int,
        *,
        stride: int,
        norm: nnx.Module,
        dtype: Any = jnp.float32,
        rng: np.random.Generator,
    ):
        shape, fan = (KERNEL_SIZE, KERNEL_SIZE, channels, channels), TAPS * channels
        self.kernel = nnx.Param(layers.msra(rng, shape, fan, fan))
        self.norm = norm
        self.stride, self.dtype = stride, dtype

    def __call__(self, x: jax.Array, places: jax.Array, train: bool) -> jax.Array:
        """Map [B, H, W, C] to [B, ceil(H / stride), ceil(W / stride), C].

        Args:
          x: the map.
          places: [B, h, w, 18], pixels; or [B, h, w, 27], then 9 logits of the modulation.
          train: passed to the norm.
        """
        offsets, modulation = split_places(places)
        kernel = self.kernel[...].astype(self.dtype)
        y = convolve(x.astype(self.dtype), offsets, kernel, self.stride, modulation)
        return self.norm(y, train)


def split_places(places: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Split the output of an offset convolution into offsets and the modulation in 0..1.

    Returns:
      offsets float32 [B, h, w, 9, 2], (down, right) in pixels; modulation float32 [B, h, w, 9], or
      None for 18 channels.
    """
    places = places.astype(jnp.float32)
    offsets = places[..., :OFFSET_CHANNELS].reshape(*places.shape[:3], TAPS, 2)
    if places.shape[-1] == OFFSET_CHANNELS:
        return offsets, None
    return offsets, jax.nn.sigmoid(places[..., OFFSET_CHANNELS:])


def convolve(
    x: jax.Array,
    offsets: jax.Array,
    kernel: jax.Array,
    stride: int = 1,
    modulation: jax.Array | None = None,
) -> jax.Array:
    """Convolve with a 3x3 kernel whose taps are moved, padding 1.

    Args:
      x: [B, H, W, C].
      offsets: float32 [B, h, w, 9, 2], (down, right) in pixels, taps in row-major order;
        h = ceil(H / stride), w = ceil(W / stride).
      kernel: [3, 3, C, O], of x's type.
      stride: step in pixels.
      modulation: float32 [B, h, w, 9] factors of the samples, or None for 1.

    Returns:
      [B, h, w, O], of x's type.
    """
    corner, weights = _bilinear(offsets, x.shape[1:3], stride)
    if modulation is not None:
        weights = weights * modulation[..., None]
    batch, height, width = offsets.shape[:3]
    corner = corner.reshape(batch, height * width * TAPS, 2)
    weights = weights.reshape(batch, height * width * TAPS, len(CORNERS))
    y = _sample_and_multiply(x, corner, weights, kernel)
    return y.reshape(batch, height, width, -1)


def _bilinear(
    offsets: jax.Array, size: tuple[int, ...], stride: int
) -> tuple[jax.Array, jax.Array]:
    """Return each sample's upper left pixel and the weights of the four pixels around it.

    A place a pixel or more outside is moved onto the ring of zeros around the map: its value is 0
    there and, as the clamp passes no gradient, its offset gets none. One less than a pixel outside
    keeps the share of the pixels inside.

    Returns:
      corner: int32 [B, h, w, 9, 2], row and column in the map with its ring, 0..H and 0..W.
      weights: float32 [B, h, w, 9, 4], in the order of CORNERS.
    """
    height, width = offsets.shape[1:3]
    row, column = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    grid = np.stack([row, column], -1)[:, :, None] * stride  # [h, w, 1, 2]
    taps = np.stack(np.divmod(np.arange(TAPS), KERNEL_SIZE), -1)  # [9, 2]
    place = offsets + (grid + taps).astype(np.float32)  # in the map with its ring
    limit = np.array(size, np.float32) + 1
    bound = jnp.broadcast_to(limit, place.shape)
    place = lax.clamp(jnp.zeros_like(bound), place, bound)
    corner = jnp.minimum(jnp.floor(place), limit - 1)
    below = place - corner  # share of the lower and of the right pixel, [B, h, w, 9, 2]
    shares = jnp.stack([1 - below, below], -2)  # [B, h, w, 9, upper or lower, 2]
    weights = jnp.stack([shares[..., i, 0] * shares[..., j, 1] for i, j in CORNERS], -1)
    return corner.astype(jnp.int32), weights


@jax.custom_vjp
def _sample_and_multiply(
    x: jax.Array, corner: jax.Array, weights: jax.Array, kernel: jax.Array
) -> jax.Array:
    """Map x [B, H, W, C], corner [B, P*9, 2], weights [B, P*9, 4] to [B, P, O]."""
    columns = _blend(_windows(_with_ring(x), corner), weights, x.dtype)
    columns = columns.reshape(x.shape[0], -1, TAPS * x.shape[-1])
    return jnp.einsum("bpc,co->bpo", columns, kernel.reshape(-1, kernel.shape[-1]))


def _forward(x, corner, weights, kernel):
    # The columns, nine times as large as x, are computed again rather than kept.
    return _sample_and_multiply(x, corner, weights, kernel), (x, corner, weights, kernel)


def _backward(residuals, of_y):
    forms = {"cuda": _gradients_at_once, "default": _gradients_by_tap}
    return lax.platform_dependent(of_y, *residuals, **forms)


def _gradients_by_tap(of_y, x, corner, weights, kernel):
    """Go through the taps one after the other: a ninth of the columns at a time.

    All taps at once take almost twice as long and ten times the memory on a CPU: the sums over
    channels keep the gather from being fused, and its result, 36 times x, is written out.
    """
    batch, height, width, channels = x.shape
    ringed = _with_ring(x)
    ring_width = width + 2
    image_start = jnp.arange(batch)[:, None] * ((height + 2) * ring_width)

    def tap(of_pixels, arguments):
        corner, weights, kernel = arguments  # [B, P, 2], [B, P, 4], [C, O]
        windows = _windows(ringed, corner)
        columns = _blend(windows, weights, x.dtype)
        of_kernel = jnp.einsum("bpc,bpo->co", columns, of_y)
        of_columns = jnp.einsum("bpo,co->bpc", of_y, kernel).astype(jnp.float32)
        of_weights = [
            jnp.einsum("bpc,bpc->bp", of_columns, windows[:, :, i, j].astype(jnp.float32))
            for i, j in CORNERS
        ]
        pixel = image_start + corner[..., 0] * ring_width + corner[..., 1]
        for n, (i, j) in enumerate(CORNERS):
            rows = (of_columns * weights[..., n, None]).reshape(-1, channels)
            place = (pixel + (i * ring_width + j)).reshape(-1)
            of_pixels = of_pixels.at[place].add(rows, mode="promise_in_bounds")
        return of_pixels, (jnp.stack(of_weights, -1), of_kernel)

    of_pixels = jnp.zeros((batch * (height + 2) * ring_width, channels), jnp.float32)
    arguments = (_by_tap(corner), _by_tap(weights), kernel.reshape(TAPS, channels, -1))
    of_pixels, (of_weights, of_kernel) = lax.scan(tap, of_pixels, arguments)
    of_x = of_pixels.reshape(ringed.shape)[:, 1:-1, 1:-1].astype(x.dtype)
    of_weights = jnp.moveaxis(of_weights, 0, 2).reshape(weights.shape)
    return of_x, None, of_weights, of_kernel.reshape(kernel.shape)


def _gradients_at_once(of_y, x, corner, weights, kernel):
    """All taps together, for a GPU: a tenth of the launches, and memory enough for the columns."""
    batch, height, width, channels = x.shape
    ringed, ring_width = _with_ring(x), width + 2
    windows = _windows(ringed, corner)  # [B, P*9, 2, 2, C]
    columns = _blend(windows, weights, x.dtype).reshape(batch, -1, TAPS * channels)
    of_kernel = jnp.einsum("bpc,bpo->co", columns, of_y)
    of_columns = jnp.einsum("bpo,co->bpc", of_y, kernel.reshape(TAPS * channels, -1))
    of_columns = of_columns.reshape(batch, -1, channels).astype(jnp.float32)
    of_weights = jnp.einsum("bsc,bsijc->bsij", of_columns, windows.astype(jnp.float32))

    image_start = jnp.arange(batch)[:, None] * ((height + 2) * ring_width)
    pixel = image_start + corner[..., 0] * ring_width + corner[..., 1]
    place = pixel[..., None] + np.array([i * ring_width + j for i, j in CORNERS])
    rows = of_columns[:, :, None] * weights[..., None]  # [B, P*9, 4, C]
    of_pixels = jnp.zeros((batch * (height + 2) * ring_width, channels), jnp.float32)
    of_pixels = of_pixels.at[place.reshape(-1)].add(
        rows.reshape(-1, channels), mode="promise_in_bounds"
    )
    of_x = of_pixels.reshape(ringed.shape)[:, 1:-1, 1:-1].astype(x.dtype)
    return of_x, None, of_weights.reshape(weights.shape), of_kernel.reshape(kernel.shape)


_sample_and_multiply.defvjp(_forward, _backward)


def _with_ring(x: jax.Array) -> jax.Array:
    return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))


def _by_tap(samples: jax.Array) -> jax.Array:
    """Reorder [B, P*9, n] to [9, B, P, n]."""
    batch, _, last = samples.shape
    return jnp.moveaxis(samples.reshape(batch, -1, TAPS, last), 2, 0)


def _windows(ringed: jax.Array, corner: jax.Array) -> jax.Array:
    """Return the 2x2 pixels from every corner [B, S, 2] on, [B, S, 2, 2, C]."""
    dimensions = lax.GatherDimensionNumbers(
        offset_dims=(2, 3, 4),
        collapsed_slice_dims=(),
        start_index_map=(1, 2),
        operand_batching_dims=(0,),
        start_indices_batching_dims=(0,),
    )
    size = (1, 2, 2, ringed.shape[-1])
    return lax.gather(ringed, corner, dimensions, size, mode="promise_in_bounds")


def _blend(windows: jax.Array, weights: jax.Array, dtype: Any) -> jax.Array:
    """Add up windows [B, S, 2, 2, C] by weights [B, S, 4] to [B, S, C], in float32."""
    # Four slices of one gather, which XLA fuses into one loop that never holds the windows.
    parts = [windows[:, :, i, j] * weights[:, :, n, None] for n, (i, j) in enumerate(CORNERS)]
    return functools.reduce(jnp.add, parts).astype(dtype)
