"""The tiled 3x3 convolution against the plain one, and where it takes its place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseinst_jax.models import complexity, forms, layers
from sparseinst_jax.models.cpu import winograd


def plain(x, kernel):
    """Convolve in float64 on the host: shifted products, summed."""
    padded = np.pad(np.float64(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1:3]
    taps = [
        padded[:, i : i + height, j : j + width] @ np.float64(kernel[i, j])
        for i in range(3)
        for j in range(3)
    ]
    return functools.reduce(np.add, taps)


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 1), (2, 9)])
def test_tiles_make_what_a_convolution_makes(rng, size):
    x = rng.standard_normal((2, *size, 3), np.float32)
    kernel = rng.standard_normal((3, 3, 3, 5), np.float32)
    np.testing.assert_allclose(winograd.convolve(x, kernel), plain(x, kernel), atol=2e-5)


def test_error_is_that_of_float32(rng):
    x = np.maximum(rng.standard_normal((1, 12, 14, 256), np.float32), 0)
    kernel = 0.03 * rng.standard_normal((3, 3, 256, 64), np.float32)
    expected = plain(x, kernel)
    error = np.abs(winograd.convolve(x, kernel) - expected)
    assert error.max() < 1e-5 * expected.std()


def ordinary_gradients(x, kernel, cotangent):
    return jax.jit(forms.convolution(stride=1, groups=1).backward)(cotangent, x, kernel)


def test_gradients_are_those_of_a_convolution(rng):
    x = rng.standard_normal((2, 5, 6, 3), np.float32)
    kernel = rng.standard_normal((3, 3, 3, 4), np.float32)
    cotangent = rng.standard_normal((2, 5, 6, 4), np.float32)
    ours = jax.jit(winograd.gradients)(cotangent, x, kernel)
    for found, expected in zip(ours, ordinary_gradients(x, kernel, cotangent), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 1), (2, 9)])
def test_gradient_of_the_kernel_from_tiles(rng, size):
    x = rng.standard_normal((2, *size, 3), np.float32)
    cotangent = rng.standard_normal((2, *size, 5), np.float32)
    expected = ordinary_gradients(x, np.zeros((3, 3, 3, 5), np.float32), cotangent)[1]
    found = jax.jit(winograd.kernel_gradient)(x, cotangent)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_gradients_take_products_of_tiles_only():
    x, kernel = jnp.zeros((1, 4, 4, 128)), jnp.zeros((3, 3, 128, 128))
    program = str(jax.make_jaxpr(winograd.gradients)(x, x, kernel))
    assert "dot_general" in program and "conv_general_dilated" not in program


def macs_and_operations(conv, shape):
    """Count multiply-accumulates, and the convolutions and products of the program for a CPU."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)

    def call(x):  # a bound method could not be cached
        return conv(x)

    text = jax.jit(call).lower(x).as_text()
    operations = ("stablehlo.convolution", "stablehlo.dot_general")
    return complexity.trace_macs(call, x)[""], [text.count(name) for name in operations]


def test_wide_convolutions_take_tiles_on_a_cpu_and_count_as_before(rng):
    wide = layers.Conv(128, 130, 3, rng=rng)
    macs, operations = macs_and_operations(wide, (1, 23, 24, 128))
    assert operations == [0, 16]
    assert macs == 23 * 24 * 9 * 128 * 130


@pytest.mark.parametrize(
    ("side", "channels", "options"),
    [
        (24, 64, {}),
        (16, 128, {}),
        (24, 128, {"stride": 2}),
        (24, 128, {"dtype": jnp.float16}),
    ],
    ids=["narrow", "fewer tiles than channels", "strided", "float16"],
)
def test_other_convolutions_stay_plain(rng, side, channels, options):
    conv = layers.Conv(channels, 128, 3, rng=rng, **options)
    assert macs_and_operations(conv, (1, side, side, channels))[1] == [1, 0]
