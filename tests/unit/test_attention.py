"""Attention as a CPU takes it against the plain form: results and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseinst_jax.models import ops
from sparseinst_jax.models.cpu import attention

pytestmark = pytest.mark.usefixtures("quick_compilation")

HEADS = 4
PIXELS, QUERIES = 36, 7  # four blocks of nine pixels


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 8)


def draw(rng, queries, keys, has_mask):
    """Query, key and value of two images, and what is seen: never nothing, once not of a block."""
    found = [rng.standard_normal((2, n, 8 * HEADS), np.float32) for n in (queries, keys, keys)]
    if not has_mask:
        return found
    is_seen = rng.random((2, queries, keys)) < 0.3
    is_seen[0, 0], is_seen[0, 1], is_seen[0, 2, :9] = False, True, False
    is_seen[0, 0, -1] = True
    return [*found, is_seen]


@pytest.mark.parametrize(
    ("queries", "keys", "has_mask"),
    [(PIXELS, QUERIES, False), (QUERIES, PIXELS, False), (QUERIES, PIXELS, True)],
    ids=["pixels look at queries", "queries look at pixels", "at some of them"],
)
def test_blocks_make_what_the_plain_form_makes(rng, queries, keys, has_mask):
    operands = draw(rng, queries, keys, has_mask)
    form = attention.form(operands[0], operands[1], HEADS, has_mask)
    cotangent = rng.standard_normal(operands[0].shape, np.float32)

    @jax.jit
    def results(cotangent, *operands):
        both = form, ops._attention(HEADS)
        return [(f.forward(*operands), *f.backward(cotangent, *operands)) for f in both]

    ours, theirs = results(cotangent, *operands)
    assert len(ours) == len(theirs) == 1 + len(operands)
    for found, expected in zip(ours[:4], theirs[:4], strict=True):
        atol = 2e-6 * np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=0, atol=atol)
    assert ours[4:] == theirs[4:] == ((None,) if has_mask else ())


def test_a_query_that_sees_nothing_sees_everything_alike(rng):
    query, key, value, is_seen = draw(rng, QUERIES, PIXELS, True)
    is_seen[1, 3] = False
    found = jax.jit(ops.attend, static_argnums=3)(query, key, value, HEADS, is_seen)
    np.testing.assert_allclose(found[1, 3], value[1].mean(0), atol=1e-6)


def test_the_form_is_that_of_the_platform_and_of_the_shape():
    def loops(platform, queries, keys, dtype=jnp.float32):
        shapes = [jax.ShapeDtypeStruct((1, n, 32), dtype) for n in (queries, keys, keys)]
        traced = jax.jit(ops.attend, static_argnums=3).trace(*shapes, HEADS)
        return traced.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.while")

    assert loops("cpu", PIXELS, QUERIES) == loops("cpu", QUERIES, PIXELS) == 1
    assert loops("cpu", QUERIES, QUERIES) == loops("cpu", PIXELS, QUERIES, jnp.bfloat16) == 0
    assert loops("cuda", PIXELS, QUERIES) == loops("tpu", QUERIES, PIXELS) == 0


def test_a_block_divides_the_pixels_and_is_near_its_size(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 256)
    lengths = 4096, 6912, 16 * 41 * 43, 108
    assert [attention._block_size(length) for length in lengths] == [256, 256, 328, 108]
