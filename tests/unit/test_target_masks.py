"""Quarter levels made from run lengths against those of the whole mask; masks in bits."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from pycocotools import mask as rle

from sparseinst_jax.data import target_masks
from sparseinst_jax.data.segmentations import read_runs
from sparseinst_jax.data.target_masks import (
    FULL_BITS,
    QUARTER_LEVELS,
    inner_pixels,
    levels_of_runs,
    pack_bits,
    reduce_mask,
    unpack_bits,
)


def _runs(mask):
    runs = read_runs(rle.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"])
    assert runs is not None
    return runs


def test_levels_are_the_inner_pixels_of_each_block():
    mask = np.zeros((8, 8), bool)
    mask[1:3, 1:3] = True  # all four inner pixels of block (0, 0)
    mask[0, 4:] = mask[3, 4:] = True  # border pixels of block (0, 1) only
    mask[5, 1] = True
    mask[6:8, 5:8] = True  # inner pixels (6, 5) and (6, 6)
    np.testing.assert_array_equal(reduce_mask(mask), [[4, 0], [1, 2]])
    pixels = inner_pixels((8, 8), np.arange(8), np.arange(8))
    np.testing.assert_array_equal(levels_of_runs(_runs(mask), pixels), [[4, 0], [1, 2]])


def test_levels_of_a_cut_block_count_the_outside_as_empty():
    levels = reduce_mask(np.ones((6, 9), bool))
    np.testing.assert_array_equal(levels, [[4, 4, 0], [2, 2, 0]])
    pixels = inner_pixels((6, 9), np.arange(6), np.arange(9))
    np.testing.assert_array_equal(levels_of_runs(_runs(np.ones((6, 9))), pixels), levels)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_levels_of_runs_are_those_of_the_moved_mask(share):
    rng = np.random.default_rng(int(100 * share))
    for height, width in itertools.product((1, 2, 5, 7, 12, 33), (1, 3, 8, 14, 31)):
        mask = rng.random((height, width)) < share
        # Enlarged, shrunk, cut at both ends, and turned round.
        for length, other in ((height, width), (2 * height + 1, 3 * width), (3, 2), (9, width)):
            rows = np.sort(rng.integers(0, height, length))
            columns = np.sort(rng.integers(0, width, other))
            for chosen in (columns, columns[::-1], np.arange(width)):
                expected = reduce_mask(mask[rows][:, chosen])
                pixels = inner_pixels((height, width), rows, chosen)
                levels = levels_of_runs(_runs(mask), pixels)
                assert levels.dtype == np.uint8
                np.testing.assert_array_equal(levels, expected)


def test_only_the_columns_that_an_object_has_are_written(monkeypatch):
    mask = np.zeros((4000, 8000), bool)
    mask[100:140, 5000:5016] = True
    written = []
    repeat = np.repeat
    monkeypatch.setattr(
        target_masks.np, "repeat", lambda *args: written.append(repeat(*args)) or written[-1]
    )
    pixels = inner_pixels(mask.shape, np.arange(4000), np.arange(8000))
    levels = levels_of_runs(_runs(mask), pixels)
    assert levels.sum() == 4 * 40 * 16 / 16
    # Half of the rows of half of 16 columns, and an empty one.
    assert [part.size for part in written] == [2000 * (8 + 1)]


def test_bits_come_back_on_the_host_and_on_the_device_the_first_pixel_highest():
    assert pack_bits(np.array([[1, 0, 0, 0, 0, 0, 0, 1, 1]], np.uint8)).tolist() == [[129, 128]]
    masks = np.random.default_rng(0).random((2, 3, 5, 32)) < 0.5
    bits = pack_bits(masks)
    assert bits.dtype == np.uint8 and bits.shape == (2, 3, 5, 4)
    np.testing.assert_array_equal(unpack_bits(bits), masks)
    np.testing.assert_array_equal(jnp.unpackbits(bits, axis=-1).astype(bool), masks)


@pytest.mark.parametrize("form", [QUARTER_LEVELS, FULL_BITS], ids=["levels", "bits"])
@pytest.mark.parametrize("size", [(1, 1), (5, 9), (8, 16), (33, 70)])
def test_a_form_has_the_shape_that_it_says_and_decodes_at_its_stride(form, size):
    mask = np.random.default_rng(1).random(size) < 0.5
    encoded = form.encode(mask)
    assert encoded.shape == form.shape(size) and encoded.dtype == np.uint8
    decoded = form.decode(encoded)[:, : -(-size[1] // form.stride)]
    whole = mask if form == FULL_BITS else reduce_mask(mask) >= 2
    assert decoded.dtype == bool
    np.testing.assert_array_equal(decoded, whole)
