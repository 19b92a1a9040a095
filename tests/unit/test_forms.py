"""Forms of one operation: which one a program holds, and that all give the same numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseinst_jax.models import cuda, forms, layers, ops
from sparseinst_jax.models.cpu import convolution as cpu_convolution
from sparseinst_jax.models.forms import Form


def double(x):
    return 2 * x


def triple(x):
    return 3 * x


# Neither gradient is that of its forward function, so that a mix would show.
OPERATION = forms.by_platform(
    Form(double, lambda cotangent, x: (5 * cotangent,)),
    cpu=Form(triple, lambda cotangent, x: (7 * cotangent,)),
)


def multiplications(function, platform, *arguments):
    """The constants of a program for a platform."""
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    return [number for number in (2, 3, 5, 7) if f"dense<{number}.000000e+00>" in text]


def test_a_program_holds_the_form_of_its_platform_and_of_no_other():
    x = jnp.ones(5)
    assert multiplications(OPERATION, "cpu", x) == [3]
    assert multiplications(OPERATION, "cuda", x) == [2]
    assert multiplications(OPERATION, "tpu", x) == [2]

    def gradient(x):
        return jax.vjp(OPERATION, x)[1](x)

    assert multiplications(gradient, "cpu", x) == [7]
    assert multiplications(gradient, "cuda", x) == [5]


def test_an_exported_program_for_two_platforms_holds_both_forms():
    exported = jax.export.export(jax.jit(OPERATION), platforms=["cpu", "cuda"])(jnp.ones(5))
    np.testing.assert_array_equal(exported.call(jnp.ones(5)), 3 * np.ones(5))
    assert "dense<2.0" in exported.mlir_module()


def test_the_form_is_that_of_the_platform_under_every_transformation():
    x = np.arange(6.0, dtype=np.float32).reshape(1, 6)
    gradient = jax.grad(lambda x: OPERATION(x).sum())
    for transform in (lambda f: f, jax.jit, jax.vmap, jax.pmap, jax.checkpoint):
        np.testing.assert_array_equal(transform(OPERATION)(x), 3 * x)
        np.testing.assert_array_equal(transform(gradient)(x), np.full((1, 6), 7))


def test_a_compiled_program_keeps_no_choice():
    text = jax.jit(OPERATION).lower(jnp.ones(5)).compile().as_text()
    assert "conditional" not in text


def test_only_the_operands_are_kept_for_the_gradient():
    x, kernel = jnp.ones((1, 24, 24, 128)), jnp.ones((3, 3, 128, 128))
    _, pull_back = jax.vjp(ops.convolve, x, kernel)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(pull_back))
    assert kept == x.nbytes + kernel.nbytes


CONVOLUTIONS = {
    "1x1": ((2, 6, 8, 5), (1, 1, 5, 3), {}),
    "1x1, stride 2, odd size": ((2, 7, 9, 5), (1, 1, 5, 3), {"stride": 2}),
    "groups": ((2, 6, 8, 8), (3, 3, 2, 12), {"groups": 4}),
    "groups, stride 2": ((2, 6, 8, 8), (3, 3, 4, 6), {"groups": 2, "stride": 2}),
    "activation maps": ((2, 10, 12, 256), (3, 3, 64, 400), {"groups": 4}),
    "wide groups": ((1, 24, 24, 256), (3, 3, 128, 256), {"groups": 2}),
    "many groups": ((2, 6, 8, 12), (3, 3, 1, 12), {"groups": 12}),
    "each channel": ((2, 6, 7, 12), (5, 5, 1, 12), {"groups": 12, "same": True}),
    "each channel, stride 2": ((2, 6, 8, 12), (5, 5, 1, 12), {"groups": 12, "stride": 2}),
    "each channel, same, stride 2": (
        (2, 8, 6, 12),
        (5, 5, 1, 12),
        {"groups": 12, "stride": 2, "same": True},
    ),
    "each channel, same, stride 2, odd size": (
        (2, 7, 8, 12),
        (3, 3, 1, 12),
        {"groups": 12, "stride": 2, "same": True},
    ),
    "colours, same": ((2, 6, 8, 3), (3, 3, 3, 8), {"stride": 2, "same": True}),
    "colours, same, odd size": ((2, 7, 5, 3), (3, 3, 3, 8), {"stride": 2, "same": True}),
    "wide": ((1, 24, 24, 128), (3, 3, 128, 130), {}),
    "few pixels": ((1, 32, 33, 64), (3, 3, 64, 72), {}),
    "wide, stride 2, odd size": ((2, 7, 9, 128), (3, 3, 128, 130), {"stride": 2}),
    "uneven channels": ((2, 6, 7, 18), (3, 3, 18, 5), {}),
    "uneven channels, stride 2": ((2, 7, 9, 10), (3, 3, 10, 8), {"stride": 2}),
    "3x3 of colours": ((2, 6, 7, 3), (3, 3, 3, 8), {}),
    "3x3 of colours, stride 2": ((2, 6, 8, 3), (3, 3, 3, 8), {"stride": 2}),
    "3x3 of colours, stride 2, odd size": ((2, 7, 8, 3), (3, 3, 3, 8), {"stride": 2}),
    "5x5 of colours, stride 2": ((2, 6, 8, 3), (5, 5, 3, 8), {"stride": 2}),
    "7x7 of colours, stride 2": ((2, 12, 8, 3), (7, 7, 3, 9), {"stride": 2}),
    "7x7 of colours, stride 4": ((2, 12, 8, 3), (7, 7, 3, 8), {"stride": 4}),
}
PLATFORMS = {"cpu": cpu_convolution, "cuda": cuda}


def draw_convolution(name, rng):
    """Images, a kernel, and the options, with which results are near 1."""
    shape, kernel_shape, options = CONVOLUTIONS[name]
    x = rng.standard_normal(shape, np.float32)
    kernel = rng.standard_normal(kernel_shape, np.float32)
    kernel /= np.sqrt(np.prod(kernel_shape[:3]), dtype=np.float32)
    return x, kernel, {"stride": 1, "groups": 1} | options


def assert_same(form, plain, rng, *operands):
    """Result and gradients are the plain form's in float64, up to 1e-6 of their largest number."""
    shape = jax.eval_shape(plain.forward, *operands).shape
    cotangent = rng.standard_normal(shape, np.float32)

    def results(form, *arrays):
        return jax.jit(lambda c, *xs: (form.forward(*xs), *form.backward(c, *xs)))(*arrays)

    found = results(form, cotangent, *operands)
    with jax.enable_x64(True):
        expected = results(plain, *(np.float64(array) for array in (cotangent, *operands)))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.dtype == np.float32
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * np.abs(theirs).max())


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_every_form_of_a_convolution_and_of_its_gradients_is_the_plain_one(name, platform, rng):
    x, kernel, options = draw_convolution(name, rng)
    form = PLATFORMS[platform].form(x, kernel, **options)
    if form is not None:
        assert_same(form, forms.convolution(**options), rng, x, kernel)


@pytest.mark.parametrize("name", ["1x1, stride 2, odd size", "wide"])
def test_in_bfloat16_a_cpu_sums_in_float32(name, rng):
    x, kernel, options = draw_convolution(name, rng)
    form = cpu_convolution.form(x, kernel, **options)
    whole = forms.convolution(**options).forward(x, kernel)
    x, kernel = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    assert cpu_convolution.form(x, kernel, **options) is form
    y = form.forward(x, kernel)
    assert y.dtype == jnp.bfloat16
    error = np.asarray(y, np.float32) - np.asarray(whole)
    assert error.std() < 6e-3 * whole.std()
    to_x, to_kernel = form.backward(y, x, kernel)
    assert (to_x.dtype, to_kernel.dtype) == (jnp.bfloat16, jnp.bfloat16)
    text = jax.jit(form.forward).lower(x, kernel).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products and all("bf16>) -> tensor" in line and "f32>" in line for line in products)


def test_channels_that_all_images_share_can_be_convolved_once(rng):
    x = rng.standard_normal((2, 6, 8, 8), np.float32)
    kernel = rng.standard_normal((3, 3, 10, 4), np.float32) / 9
    shared = rng.standard_normal((1, 6, 8, 2), np.float32)
    plain = forms.joined(forms.convolution(1, 1))
    assert_same(cuda.shared_apart(1), plain, rng, x, kernel, shared)
    whole = np.concatenate([np.repeat(shared, 2, 0), x], axis=-1)
    np.testing.assert_allclose(
        ops.convolve(x, kernel, shared=shared), ops.convolve(whole, kernel), atol=1e-6
    )


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_is_differentiated_in_the_form_of_its_platform(name, rng):
    x, kernel, options = draw_convolution(name, rng)
    y, pull_back = jax.vjp(functools.partial(ops.convolve, **options), x, kernel)
    cotangent = rng.standard_normal(y.shape, np.float32)
    form = cpu_convolution.form(x, kernel, **options) or forms.convolution(**options)
    for ours, theirs in zip(pull_back(cotangent), form.backward(cotangent, x, kernel), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_depthwise_convolution_and_its_gradients_are_those_of_the_plain_form(rng):
    x = rng.standard_normal((2, 7, 9, 6), np.float32)
    kernel = rng.standard_normal((3, 3, 1, 6), np.float32)
    y, pull_back = jax.vjp(ops.depthwise_3x3, x, kernel)
    cotangent = rng.standard_normal(y.shape, np.float32)
    plain = ops._DEPTHWISE
    expected = plain.forward(x, kernel), *plain.backward(cotangent, x, kernel)
    for ours, theirs in zip((y, *pull_back(cotangent)), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_a_program_for_any_batch_size_holds_the_plain_form(platform, rng):
    conv = layers.Conv(128, 128, 3, rng=rng)
    (batch,) = jax.export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((batch, 24, 24, 128), jnp.float32)
    exported = jax.export.export(jax.jit(lambda x: conv(x)), platforms=[platform])(x)
    assert exported.mlir_module().count("stablehlo.convolution") == 1
