"""3x3 convolution of stride 1 with 16 products where the definition takes 36, for CPUs.

Two by two results come from four by four inputs. With input d, kernel g and result y of a tile,

    y = A' [ (G g G') * (B' d B) ] A,

where * multiplies pixel by pixel (and sums over the input channels: 16 matrix products over all
tiles), and A, B, G hold only 0, 1, -1 and 1/2, so that no precision is lost: on normal numbers the
results differ from those of `lax.conv_general_dilated` by some 3e-6 of their deviation. Larger
tiles take fewer products still, and lose a digit.

On XLA:CPU, two cores, 1.4 (80x108, 256 channels) to 1.9 times (40x54x256) as fast as a convolution:
the transforms are sums of shifted slices, each compiled to one pass over memory. The price is four
times the memory of input and output while it runs, and 0.2 s of compilation for each convolution.

Source: Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv:1509.09308, section
4.1, F(2x2, 3x3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

# Below it the transforms of the images take about what the products save.
LEAST_CHANNELS = 128
NAME = "winograd_3x3"  # in traced programs


def is_faster(x: jax.Array, kernel: jax.Array, stride: int) -> bool:
    """Whether `convolve` can take the place of a convolution, and gains.

    With fewer tiles than channels the transform of the kernel takes what the products save.
    """
    *inner, channels = x.shape
    return (
        jax.default_backend() == "cpu"
        and kernel.shape[:2] == (3, 3)
        and stride == 1
        and min(kernel.shape[2:]) >= LEAST_CHANNELS
        and math.prod(inner) // 4 >= channels
        and x.dtype == kernel.dtype == jnp.float32
    )


@jax.custom_vjp
def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return x convolved with a 3x3 kernel, with a border of one zero.

    The gradient of x is of the same form, that of the kernel an ordinary convolution's.

    Args:
      x: float32 [B, H, W, C].
      kernel: float32 [3, 3, C, D].

    Returns:
      float32 [B, H, W, D].
    """
    return winograd_3x3(x, kernel)


@jax.jit
def winograd_3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """See `convolve`; `complexity` finds it in traced programs by its name, `NAME`."""
    batch, height, width, channels = x.shape
    rows, columns = -(-height // 2), -(-width // 2)  # of tiles
    border = ((0, 0), (1, 1 + height % 2), (1, 1 + width % 2), (0, 0))
    padded = jnp.pad(x, border)
    strips = _transform_input([padded[:, i : i + 2 * rows : 2] for i in range(4)])
    kernels = [_transform_kernel(list(row)) for row in _transform_kernel(list(kernel))]
    products = []
    for strip, row in zip(strips, kernels, strict=True):
        tiles = _transform_input([strip[:, :, j : j + 2 * columns : 2] for j in range(4)])
        products.append([t.reshape(-1, channels) @ k for t, k in zip(tiles, row, strict=True)])
    strips = [_transform_product(column) for column in zip(*products, strict=True)]
    results = [_transform_product(row) for row in zip(*strips, strict=True)]
    parts = [[y.reshape(batch, rows, columns, -1) for y in row] for row in results]
    joined = jnp.stack([jnp.stack(row, axis=3) for row in parts], axis=2)
    joined = joined.reshape(batch, 2 * rows, 2 * columns, -1)
    return joined[:, :height, :width]


def _transform_input(d: Sequence[jax.Array]) -> list[jax.Array]:
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _transform_kernel(g: Sequence[jax.Array]) -> list[jax.Array]:
    even, odd = 0.5 * (g[0] + g[2]), 0.5 * g[1]
    return [g[0], even + odd, even - odd, g[2]]


def _transform_product(m: Sequence[jax.Array]) -> list[jax.Array]:
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _forward(x, kernel):
    return convolve(x, kernel), (x, kernel)


def _backward(residuals, cotangent):
    x, kernel = residuals
    to_x = convolve(cotangent, kernel[::-1, ::-1].swapaxes(2, 3))

    def plain(kernel):
        border = ((1, 1), (1, 1))
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), border, dimension_numbers=layout)

    (to_kernel,) = jax.linear_transpose(plain, kernel)(cotangent)
    return to_x, to_kernel


convolve.defvjp(_forward, _backward)
