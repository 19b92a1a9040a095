"""3x3 convolution of stride 1 with 16 products where the definition takes 36, for CPUs.

Two by two results come from four by four inputs. With input d, kernel g and result y of a tile,

    y = A' [ (G g G') * (B' d B) ] A,

where * multiplies pixel by pixel (and sums over the input channels: 16 matrix products over all
tiles), and A, B, G hold only 0, 1, -1 and 1/2, so that no precision is lost: on normal numbers the
results differ from those of `lax.conv_general_dilated` by about 3e-6 of their deviation. Larger
tiles take fewer products still, and lose a digit.

The gradient of the kernel, with cotangents e of y, is G' [ sum of (B' d B) * (A e A') ] G.

On XLA:CPU, two cores, 1.4 (80x108, 256 channels) to 1.9 times (40x54x256) as fast as a convolution,
and the kernel's gradient 2.7 (two images of 64x64, 128 channels) to 4.4 times (256 channels): the
transforms are sums of shifted slices, each compiled to one pass over memory. The price is four
times the memory of input and output while it runs, and 0.2 s of compilation for each convolution.

Source: Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv:1509.09308, section
4.1, F(2x2, 3x3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from sparseinst_jax.models import forms
from sparseinst_jax.models.cpu.products import product
from sparseinst_jax.models.forms import Form

# Below it the transforms of the images take about what the products save; but XLA:CPU leaves the
# convolution of an image of few pixels to one core, and shares products among all.
LEAST_CHANNELS, LEAST_CHANNELS_OF_FEW = 128, 64
FEW_PIXELS = 1024, 4096


def is_faster(x: jax.Array | jax.ShapeDtypeStruct, kernel: jax.Array, stride: int) -> bool:
    """Whether `convolve` can take the place of a convolution, and gains.

    With fewer tiles than channels the transform of the kernel takes what the products save.
    """
    *inner, channels = x.shape
    is_of_few = FEW_PIXELS[0] <= math.prod(inner[-2:]) <= FEW_PIXELS[1]
    least_channels = LEAST_CHANNELS_OF_FEW if is_of_few else LEAST_CHANNELS
    return (
        kernel.shape[:2] == (3, 3)
        and stride == 1
        and min(kernel.shape[2:]) >= least_channels
        and math.prod(inner) // 4 >= channels
        and x.dtype == kernel.dtype
        and x.dtype in (jnp.float32, jnp.bfloat16)
    )


@jax.jit  # traced once for each shape
def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return x convolved with a 3x3 kernel, with a border of one zero.

    Of bfloat16 only the products' operands are, everything between is float32: 0.4 % of the
    results' deviation off, where a rounded result is 0.2 %.

    Args:
      x: float32 or bfloat16 [B, H, W, C].
      kernel: [3, 3, C, D], of its type.

    Returns:
      [B, H, W, D], of the same type.
    """
    batch, height, width, _ = x.shape
    dtype, x, kernel = x.dtype, x.astype(jnp.float32), kernel.astype(jnp.float32)
    kernel = _not_before(x, kernel)
    kernels = [_transform_kernel(list(row)) for row in _transform_kernel(list(kernel))]
    products = [
        [product(tile.astype(dtype), k.astype(dtype)) for tile, k in zip(tiles, row, strict=True)]
        for tiles, row in zip(_input_tiles(x), kernels, strict=True)
    ]
    strips = [_transform_product(column) for column in zip(*products, strict=True)]
    results = [_transform_product(row) for row in zip(*strips, strict=True)]
    rows, columns = _tiling(height, width)
    parts = [[y.reshape(batch, rows, columns, -1) for y in row] for row in results]
    joined = jnp.stack([jnp.stack(row, axis=3) for row in parts], axis=2)
    joined = joined.reshape(batch, 2 * rows, 2 * columns, -1)
    return joined[:, :height, :width].astype(dtype)


def kernel_gradient(x: jax.Array, cotangent: jax.Array) -> jax.Array:
    """Return the gradient of the kernel.

    Args:
      x: float32 [B, H, W, C], as given to `convolve`.
      cotangent: float32 [B, H, W, D], of its result.

    Returns:
      float32 [3, 3, C, D].
    """
    x = _not_before(cotangent, x)
    products = [
        [tile.T @ e for tile, e in zip(tiles, row, strict=True)]
        for tiles, row in zip(_input_tiles(x), _cotangent_tiles(cotangent), strict=True)
    ]
    rows = [_transpose_kernel(column) for column in zip(*products, strict=True)]
    return jnp.stack([jnp.stack(_transpose_kernel(row)) for row in zip(*rows, strict=True)])


def _not_before(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return y, in a way that needs x; NaN where the first number of x is not finite.

    XLA:CPU makes what depends on a network's arguments alone before all else, and would hold the
    transforms of every layer at once. A barrier does not keep it from that, a sum does.
    """
    return y + 0.0 * x[0, 0, 0, 0]


def _tiling(height: int, width: int) -> tuple[int, int]:
    return -(-height // 2), -(-width // 2)


def _input_tiles(x: jax.Array) -> list[list[jax.Array]]:
    """Return B' d B of all tiles: four by four of [tiles, C]."""
    _, height, width, channels = x.shape
    rows, columns = _tiling(height, width)
    padded = jnp.pad(x, ((0, 0), (1, 1 + height % 2), (1, 1 + width % 2), (0, 0)))
    strips = _transform_input([padded[:, i : i + 2 * rows : 2] for i in range(4)])
    return [
        [
            tile.reshape(-1, channels)
            for tile in _transform_input([s[:, :, j : j + 2 * columns : 2] for j in range(4)])
        ]
        for s in strips
    ]


def _cotangent_tiles(cotangent: jax.Array) -> list[list[jax.Array]]:
    """Return A e A' of all tiles: four by four of [tiles, D]."""
    _, height, width, channels = cotangent.shape
    padded = jnp.pad(cotangent, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
    strips = _transpose_product([padded[:, i::2] for i in range(2)])
    return [
        [
            tile.reshape(-1, channels)
            for tile in _transpose_product([s[:, :, j::2] for j in range(2)])
        ]
        for s in strips
    ]


def _transform_input(d: Sequence[jax.Array]) -> list[jax.Array]:
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _transform_kernel(g: Sequence[jax.Array]) -> list[jax.Array]:
    even, odd = 0.5 * (g[0] + g[2]), 0.5 * g[1]
    return [g[0], even + odd, even - odd, g[2]]


def _transform_product(m: Sequence[jax.Array]) -> list[jax.Array]:
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _transpose_kernel(m: Sequence[jax.Array]) -> list[jax.Array]:
    half_sum = 0.5 * (m[1] + m[2])
    return [m[0] + half_sum, 0.5 * (m[1] - m[2]), half_sum + m[3]]


def _transpose_product(e: Sequence[jax.Array]) -> list[jax.Array]:
    return [e[0], e[0] + e[1], e[0] - e[1], -e[1]]


def gradients(cotangent: jax.Array, x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the gradients of both operands; in bfloat16 by the plain form."""
    if x.dtype != jnp.float32:
        return forms.convolution(1, 1).backward(cotangent, x, kernel)
    to_x = convolve(cotangent, kernel[::-1, ::-1].swapaxes(2, 3))
    return to_x, kernel_gradient(x, cotangent)


FORM = Form(convolve, gradients)
