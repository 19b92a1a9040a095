"""Operations against values worked out by hand and against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseinst_jax.models import ops


def test_padding_is_zero_after_normalisation_whatever_its_pixels_are():
    images = np.full((1, 2, 3, 3), 200, np.uint8)
    normalized = np.asarray(ops.normalize_images(images, np.array([[1, 2]], np.int32)))
    expected = (200 - ops.PIXEL_MEAN) / ops.PIXEL_STD
    np.testing.assert_allclose(normalized[0, 0, :2], [expected, expected], rtol=1e-6)
    assert not normalized[0, 1].any()
    assert not normalized[0, 0, 2].any()


def test_bilinear_upsampling_by_two_blends_quarters_and_clamps_at_the_border():
    x = jnp.asarray([0.0, 4.0, 8.0]).reshape(1, 1, 3, 1)
    y = ops.resize_bilinear(x, (1, 6))
    np.testing.assert_allclose(np.asarray(y).ravel(), [0, 1, 3, 5, 7, 8], atol=1e-6)


def test_bilinear_shrinking_does_not_antialias():
    x = jnp.arange(8.0).reshape(1, 1, 8, 1)
    y = ops.resize_bilinear(x, (1, 2))  # centres at 1.5 and 5.5
    np.testing.assert_allclose(np.asarray(y).ravel(), [1.5, 5.5], atol=1e-6)


@pytest.mark.parametrize("source, target", [(3, 7), (7, 3), (1, 5), (6, 6), (5, 11)])
def test_gather_and_matrix_forms_of_bilinear_resizing_agree(source, target, rng):
    x = rng.standard_normal((2, source, 4, 3), np.float32)
    gathered = ops.resize_bilinear(jnp.asarray(x), (target, 4))
    product = np.einsum("ts,bswc->btwc", ops.bilinear_matrix(source, target), x)
    np.testing.assert_allclose(gathered, product, atol=1e-6)


def test_resize_gradient_is_the_transpose_of_the_resize(rng):
    x = rng.standard_normal((2, 5, 4, 3), np.float32)
    y = rng.standard_normal((2, 9, 11, 3), np.float32)
    resized, pull_back = jax.vjp(lambda x: ops.resize_bilinear(x, (9, 11)), jnp.asarray(x))
    (gradient,) = pull_back(jnp.asarray(y))
    assert np.vdot(resized, y) == pytest.approx(np.vdot(x, gradient), rel=1e-4)


def test_adaptive_pooling_windows_overlap_when_sizes_do_not_divide():
    x = jnp.arange(5.0).reshape(1, 5, 1, 1)
    pooled = ops.adaptive_average_pool(x, 3)  # windows [0, 2), [1, 4), [3, 5)
    np.testing.assert_allclose(np.asarray(pooled)[0, :, 0, 0], [0.5, 2.0, 3.5], atol=1e-6)


def test_adaptive_pooling_repeats_pixels_of_maps_smaller_than_the_grid():
    x = jnp.asarray([2.0, 6.0]).reshape(1, 2, 1, 1)
    pooled = ops.adaptive_average_pool(x, 6)
    np.testing.assert_allclose(np.asarray(pooled)[0, :, 0, 0], [2, 2, 2, 6, 6, 6])


def test_coordinates_run_from_minus_one_to_one_with_x_first():
    grid = ops.coordinates(2, 3)
    np.testing.assert_array_equal(grid[..., 0], [[-1, 0, 1], [-1, 0, 1]])
    np.testing.assert_array_equal(grid[..., 1], [[-1, -1, -1], [1, 1, 1]])


def test_max_pool_sees_a_border_that_never_wins():
    x = -jnp.arange(1.0, 17.0).reshape(1, 4, 4, 1)
    pooled = np.asarray(ops.max_pool_3x3_stride_2(x))[0, :, :, 0]
    np.testing.assert_array_equal(pooled, [[-1, -2], [-5, -6]])


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 2)])
def test_max_pool_gradient_goes_to_the_first_largest_pixel_of_each_window(size, rng):
    x = rng.integers(0, 4, (2, *size, 3)).astype(np.float32)  # with many equal pixels
    height, width = -(-size[0] // 2), -(-size[1] // 2)
    cotangent = rng.standard_normal((2, height, width, 3), np.float32)
    largest, to_x = np.zeros_like(cotangent), np.zeros_like(x)
    for image, row, column, channel in np.ndindex(cotangent.shape):
        top, left = max(2 * row - 1, 0), max(2 * column - 1, 0)
        window = x[image, top : 2 * row + 2, left : 2 * column + 2, channel]
        i, j = np.unravel_index(window.argmax(), window.shape)
        largest[image, row, column, channel] = window[i, j]
        to_x[image, top + i, left + j, channel] += cotangent[image, row, column, channel]
    pooled, pull_back = jax.vjp(jax.jit(ops.max_pool_3x3_stride_2), jnp.asarray(x))
    np.testing.assert_array_equal(pooled, largest)
    np.testing.assert_allclose(pull_back(jnp.asarray(cotangent))[0], to_x, atol=1e-6)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(pull_back)) == cotangent.size


def test_relu_passes_the_gradient_above_zero_and_keeps_only_its_result():
    x = jnp.asarray([-1.0, 0.0, 2.0])
    y, pull_back = jax.vjp(ops.relu, x)
    np.testing.assert_array_equal(y, [0, 0, 2])
    np.testing.assert_array_equal(pull_back(jnp.asarray([5.0, 6.0, 7.0]))[0], [0, 0, 7])
    (kept,) = jax.tree.leaves(pull_back)
    np.testing.assert_array_equal(kept, y)


def test_relu_of_a_sum_is_that_of_the_sum_to_the_last_bit(rng):
    a, b = rng.standard_normal((2, 1000)).astype(np.float32)
    a[:4], b[:4] = [1.0, -1.0, 0.0, 1e30], [-1.0, 1e-30, -2.0, 3e38]
    y, pull_back = jax.vjp(ops.relu_of_sum, jnp.asarray(a), jnp.asarray(b))
    np.testing.assert_array_equal(y, np.maximum(a + b, 0))
    cotangent = rng.standard_normal(1000).astype(np.float32)
    for gradient in pull_back(jnp.asarray(cotangent)):
        np.testing.assert_array_equal(gradient, np.where(a + b > 0, cotangent, 0))
    (kept,) = jax.tree.leaves(pull_back)
    assert kept.shape == y.shape


def test_nearest_upsampling_repeats_every_pixel():
    x = jnp.asarray([[1.0, 2.0]]).reshape(1, 1, 2, 1)
    np.testing.assert_array_equal(
        np.asarray(ops.upsample_nearest_x2(x))[0, :, :, 0], [[1, 1, 2, 2], [1, 1, 2, 2]]
    )


def test_depthwise_convolution_and_its_gradients_are_sums_over_nine_neighbours(rng):
    x, kernel = rng.normal(size=(2, 4, 5, 3)), rng.normal(size=(3, 3, 1, 3))
    cotangent = rng.normal(size=(2, 4, 5, 3))
    y, to_x, to_kernel = np.zeros_like(x), np.zeros_like(x), np.zeros_like(kernel)
    for row, column, i, j in np.ndindex(4, 5, 3, 3):
        r, c = row + i - 1, column + j - 1
        if 0 <= r < 4 and 0 <= c < 5:
            y[:, row, column] += x[:, r, c] * kernel[i, j, 0]
            to_x[:, r, c] += cotangent[:, row, column] * kernel[i, j, 0]
            to_kernel[i, j, 0] += (cotangent[:, row, column] * x[:, r, c]).sum(0)
    single = [jnp.asarray(a, jnp.float32) for a in (x, kernel, cotangent)]
    got, pull_back = jax.vjp(ops.depthwise_3x3, *single[:2])
    for a, b in zip((got, *pull_back(single[2])), (y, to_x, to_kernel), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_gelu_is_exact():
    x = np.array([-3.0, -1.0, 0.0, 0.5, 2.0], np.float32)
    wanted = [-0.00404970, -0.15865525, 0.0, 0.34573123, 1.95449974]
    np.testing.assert_allclose(ops.gelu(jnp.asarray(x)), wanted, rtol=1e-5, atol=1e-7)
