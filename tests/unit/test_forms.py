"""Forms of one operation: which one a program holds, and that all give the same numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseinst_jax.models import forms, layers, ops
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
    "wide groups": ((1, 24, 24, 256), (3, 3, 128, 256), {"groups": 2}),
    "wide": ((1, 24, 24, 128), (3, 3, 128, 130), {}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_and_its_gradients_are_those_of_the_plain_form(name, rng):
    shape, kernel_shape, options = CONVOLUTIONS[name]
    x = rng.standard_normal(shape, np.float32)
    kernel = rng.standard_normal(kernel_shape, np.float32) / np.sqrt(np.prod(kernel_shape[:3]))
    kernel = np.float32(kernel)
    plain = forms.convolution(**{"stride": 1, "groups": 1} | options)
    y, pull_back = jax.vjp(functools.partial(ops.convolve, **options), x, kernel)
    cotangent = rng.standard_normal(y.shape, np.float32)
    found = y, *pull_back(cotangent)
    expected = plain.forward(x, kernel), *plain.backward(cotangent, x, kernel)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-6 * np.abs(theirs).max())


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
