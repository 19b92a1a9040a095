"""Deformable convolution against its definition, worked out sample by sample in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseinst_jax.models import layers
from sparseinst_jax.models.backbones import deformable

pytestmark = pytest.mark.usefixtures("quick_compilation")

HEIGHT, WIDTH, CHANNELS, OUT = 5, 7, 3, 4


def pixel(image, row, column):
    """Read a pixel of [H, W, C]; outside all are 0."""
    inside = 0 <= row < image.shape[0] and 0 <= column < image.shape[1]
    return image[row, column] if inside else np.zeros(image.shape[2])


def sample(image, y, x):
    """Interpolate [H, W, C] at a place; it counts only if -1 < y < H and -1 < x < W."""
    height, width, channels = image.shape
    if not (-1 < y < height and -1 < x < width):
        return np.zeros(channels)
    row, column = int(np.floor(y)), int(np.floor(x))
    low, right = y - row, x - column
    return (
        (1 - low) * (1 - right) * pixel(image, row, column)
        + (1 - low) * right * pixel(image, row, column + 1)
        + low * (1 - right) * pixel(image, row + 1, column)
        + low * right * pixel(image, row + 1, column + 1)
    )


def by_definition(x, offsets, kernel, stride, modulation):
    """Sum kernel[t] @ (m * sample) over the taps t of every output pixel, in float64."""
    x, offsets, kernel, modulation = (
        np.asarray(a, np.float64) for a in (x, offsets, kernel, modulation)
    )
    batch, height, width = offsets.shape[:3]
    y = np.zeros((batch, height, width, kernel.shape[-1]))
    for b, i, j, t in np.ndindex(batch, height, width, 9):
        down, right = offsets[b, i, j, t]
        place = i * stride - 1 + t // 3 + down, j * stride - 1 + t % 3 + right
        value = modulation[b, i, j, t] * sample(x[b], *place)
        y[b, i, j] += value @ kernel[t // 3, t % 3]
    return y


def arguments(rng, stride=1, spread=2.0):
    """Draw x, offsets, kernel and modulation; the offsets reach far outside the small map."""
    height, width = -(-HEIGHT // stride), -(-WIDTH // stride)
    return (
        rng.standard_normal((2, HEIGHT, WIDTH, CHANNELS)).astype(np.float32),
        (spread * rng.standard_normal((2, height, width, 9, 2))).astype(np.float32),
        rng.standard_normal((3, 3, CHANNELS, OUT)).astype(np.float32),
        rng.random((2, height, width, 9)).astype(np.float32),
    )


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("is_modulated", [False, True], ids=["version 1", "version 2"])
def test_the_result_is_the_sum_over_moved_taps(stride, is_modulated, rng):
    x, offsets, kernel, modulation = arguments(rng, stride)
    if not is_modulated:
        modulation = np.ones_like(modulation)
    given = modulation if is_modulated else None
    ours = jax.jit(deformable.convolve, static_argnums=3)(x, offsets, kernel, stride, given)
    expected = by_definition(x, offsets, kernel, stride, modulation)
    np.testing.assert_allclose(ours, expected, atol=2e-5)


@pytest.mark.parametrize("stride", [1, 2])
def test_without_offsets_it_is_the_ordinary_convolution(stride, rng):
    x, offsets, kernel, _ = arguments(rng, stride)
    conv = layers.Conv(CHANNELS, OUT, 3, stride=stride, bias_init=None, rng=rng)
    conv.kernel[...] = jnp.asarray(kernel)
    ours = deformable.convolve(jnp.asarray(x), 0 * offsets, jnp.asarray(kernel), stride)
    np.testing.assert_allclose(ours, conv(jnp.asarray(x)), atol=1e-5)


def identity_conv(channels, stride=1):
    """Make a layer whose norm does nothing and whose kernel copies the centre tap."""
    conv = deformable.DeformableConv(
        channels,
        stride=stride,
        norm=layers.FrozenBatchNorm(channels),
        rng=np.random.default_rng(0),
    )
    conv.norm.var[...] = jnp.full((channels,), 1 - layers.NORM_EPSILON)
    kernel = np.zeros((3, 3, channels, channels), np.float32)
    kernel[1, 1] = np.eye(channels)
    conv.kernel[...] = jnp.asarray(kernel)
    return conv


def test_a_modulation_of_logit_0_halves_the_response(rng):
    x = rng.standard_normal((1, 4, 6, 2)).astype(np.float32)
    y = identity_conv(2)(jnp.asarray(x), jnp.zeros((1, 4, 6, 27)), False)
    np.testing.assert_allclose(y, 0.5 * x, atol=1e-6)


@pytest.mark.parametrize("tap", range(9))
def test_channels_are_down_and_right_of_each_tap_then_the_logits_of_each_tap(tap, rng):
    x = rng.standard_normal((1, 6, 8, 1)).astype(np.float32)
    conv = identity_conv(1)
    kernel = np.zeros((3, 3, 1, 1), np.float32)
    kernel[tap // 3, tap % 3] = 1
    conv.kernel[...] = jnp.asarray(kernel)
    padded = np.pad(x, ((0, 0), (4, 4), (4, 4), (0, 0)))

    def moved(down, right):
        row, column = 3 + tap // 3 + down, 3 + tap % 3 + right
        return padded[:, row : row + 6, column : column + 8]

    places = np.zeros((1, 6, 8, 27), np.float32)
    places[..., 18:] = 30  # the modulation is 1
    down, right = places.copy(), places.copy()
    down[..., 2 * tap], right[..., 2 * tap + 1] = 2, -1
    np.testing.assert_allclose(conv(jnp.asarray(x), down, False), moved(2, 0), atol=1e-6)
    np.testing.assert_allclose(conv(jnp.asarray(x), right, False), moved(0, -1), atol=1e-6)
    np.testing.assert_allclose(conv(jnp.asarray(x), down[..., :18], False), moved(2, 0), atol=1e-6)
    weighed = places.copy()
    weighed[..., 18 + tap] = np.log(3)  # the modulation is 3/4
    np.testing.assert_allclose(conv(jnp.asarray(x), weighed, False), 0.75 * moved(0, 0), atol=1e-6)


@pytest.mark.parametrize("axis, size", [(0, HEIGHT), (1, WIDTH)], ids=["rows", "columns"])
@pytest.mark.parametrize(
    "beyond, share",
    [(0.0, 1.0), (0.25, 0.75), (0.75, 0.25), (1.0, 0.0), (1.25, 0.0), (40.0, 0.0)],
)
def test_a_sample_fades_over_one_pixel_beyond_the_border(axis, size, beyond, share):
    """At y in (-1, 0) the row inside keeps its share; at y <= -1 and at y >= H nothing is left."""
    x = jnp.ones((1, HEIGHT, WIDTH, 1))
    kernel = np.zeros((3, 3, 1, 1), np.float32)
    kernel[1, 1] = 1
    offsets = np.zeros((1, HEIGHT, WIDTH, 9, 2), np.float32)
    grid = np.indices((HEIGHT, WIDTH))[axis]
    for edge in (-beyond, size - 1 + beyond):
        offsets[..., axis] = (edge - grid)[None, :, :, None]
        y = deformable.convolve(x, jnp.asarray(offsets), jnp.asarray(kernel))
        np.testing.assert_allclose(y, np.full(y.shape, share), atol=1e-6)


def numeric_gradient(function, argument, step=1e-6):
    """Differentiate a function of float64 numbers by central differences."""
    argument = np.array(argument, np.float64)
    gradient = np.zeros_like(argument)
    for index in np.ndindex(argument.shape):
        value = argument[index]
        argument[index] = value + step
        high = function(argument)
        argument[index] = value - step
        gradient[index] = (high - function(argument)) / (2 * step)
        argument[index] = value
    return gradient


@pytest.mark.parametrize("stride", [1, 2])
def test_every_gradient_equals_that_of_the_definition(stride, rng):
    height, width = (2, 3) if stride == 1 else (1, 2)
    x = rng.standard_normal((2, 2, 3, 2)).astype(np.float32)
    offsets = rng.uniform(-1.9, 1.9, (2, height, width, 9, 2)).astype(np.float32)
    # The derivative jumps where a place meets a row or column of pixels: keep away from there.
    offsets += np.where(np.abs(offsets - np.round(offsets)) < 0.01, 0.05, 0).astype(np.float32)
    kernel = rng.standard_normal((3, 3, 2, 2)).astype(np.float32)
    modulation = rng.random((2, height, width, 9)).astype(np.float32)
    of_y = rng.standard_normal((2, height, width, 2)).astype(np.float32)
    given = x, offsets, kernel, modulation

    def loss(x, offsets, kernel, modulation):
        return (deformable.convolve(x, offsets, kernel, stride, modulation) * of_y).sum()

    ours = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*given)
    for position, gradient in enumerate(ours):

        def defined(argument, position=position):
            changed = [*given[:position], argument, *given[position + 1 :]]
            return (by_definition(*changed[:3], stride, changed[3]) * of_y).sum()

        expected = numeric_gradient(defined, given[position])
        np.testing.assert_allclose(gradient, expected, atol=2e-4 * np.abs(expected).max())
        assert np.abs(expected).max() > 0.1


def test_an_offset_beyond_the_border_gets_no_gradient():
    x, kernel = jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1))
    far = jnp.full((1, 4, 4, 9, 2), 100.0)
    gradient = jax.jit(jax.grad(lambda offsets: deformable.convolve(x, offsets, kernel).sum()))
    assert not np.asarray(gradient(far)).any()
    assert np.asarray(gradient(jnp.full_like(far, -0.5))).any()


def test_places_are_float32_when_the_map_is_bfloat16():
    """Beyond column 256 bfloat16 counts in twos; a quarter of a pixel must not be lost there."""
    width = 320
    x = jnp.broadcast_to(jnp.arange(width) % 2, (1, 1, width))[..., None].astype(jnp.bfloat16)
    kernel = np.zeros((3, 3, 1, 1), np.float32)
    kernel[1, 1] = 1
    offsets = jnp.full((1, 1, width, 9, 2), 0.0).at[..., 1].set(0.25)

    @jax.jit
    def convolve(x):
        kernel_bf16 = jnp.asarray(kernel, jnp.bfloat16)
        y, vjp = jax.vjp(lambda x: deformable.convolve(x, offsets, kernel_bf16), x)
        return y, vjp(jnp.ones_like(y))[0]

    y, of_x = convolve(x)
    assert y.dtype == jnp.bfloat16
    expected = np.where(np.arange(width - 1) % 2, 0.75, 0.25)
    np.testing.assert_array_equal(y[0, 0, :-1, 0].astype(jnp.float32), expected)
    assert of_x.dtype == jnp.bfloat16
    np.testing.assert_array_equal(of_x[0, 0, 1:, 0].astype(jnp.float32), 1.0)


def test_the_windows_are_read_by_one_gather_and_never_held_for_the_gradient(rng):
    given = arguments(rng)
    text = str(jax.make_jaxpr(functools.partial(deformable.convolve, stride=1))(*given[:3]))
    assert text.count(" gather[") == 1
    _, vjp = jax.vjp(deformable.convolve, *(jnp.asarray(a) for a in given[:3]))
    kept = [leaf for leaf in jax.tree.leaves(vjp) if hasattr(leaf, "size")]
    # The columns alone, nine times as many numbers as x, would be 1890; weights are 4 a sample.
    assert max(leaf.size for leaf in kept) <= 4 * given[1].size // 2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_of_all_taps_at_once_are_those_of_one_tap_after_the_other(rng, dtype):
    x, offsets, kernel, _ = arguments(rng)
    corner, weights = deformable._bilinear(offsets, x.shape[1:3], 1)
    corner, weights = corner.reshape(2, -1, 2), weights.reshape(2, -1, 4)
    of_y = rng.standard_normal((2, HEIGHT * WIDTH, OUT)).astype(np.float32)
    x, kernel, of_y = (jnp.asarray(array, dtype) for array in (x, kernel, of_y))
    given = of_y, x, corner, weights, kernel
    found = jax.jit(deformable._gradients_at_once)(*given)
    expected = jax.jit(deformable._gradients_by_tap)(*given)
    tolerance = 3e-6 if dtype == jnp.float32 else 0.01
    for ours, theirs in zip(found, expected, strict=True):
        if theirs is None:
            assert ours is None
            continue
        assert ours.dtype == theirs.dtype
        ours, theirs = np.float32(ours), np.float32(theirs)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


def test_a_gpu_adds_the_gradients_of_all_taps_at_once(rng):
    given = arguments(rng)

    def gradients(x, offsets, kernel):
        return jax.grad(lambda *given: deformable.convolve(*given).sum(), (0, 1, 2))(
            x, offsets, kernel
        )

    def lowered(platform):
        traced = jax.jit(gradients).trace(*given[:3])
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert "stablehlo.while" in lowered("cpu")
    text = lowered("cuda")
    assert "stablehlo.while" not in text
    assert text.count('"stablehlo.scatter"') == 1
