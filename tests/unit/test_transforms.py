"""Transforms of images and masks against Pillow's full-size result."""

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from sparseinst_jax.data import transforms as T
from sparseinst_jax.data.target_masks import reduce_mask

FLIP = T.Transform(True, None, None, (40, 60))
CROP = T.Transform(True, (90, 120), (11, 7, 50, 81), (37, 59))


def _nearest(mask, size):
    image = Image.fromarray(mask.astype(np.uint8))
    return np.asarray(image.resize(size[::-1], Image.Resampling.NEAREST))


def _mask(seed, size):
    rng = np.random.default_rng(seed)
    coarse = rng.random((size[0] // 7 + 1, size[1] // 7 + 1)) < 0.4
    return np.kron(coarse, np.ones((7, 7), bool))[: size[0], : size[1]]


def _encode(mask):
    return rle.encode(np.asfortranarray(mask.astype(np.uint8)))


def test_sizes_follow_the_shortest_edge_rule():
    # From the original: rounding happens once, at the end.
    assert T.resized_size((480, 640), 640, 853) == (640, 853)
    assert T.resized_size((333, 500), 640, 853) == (568, 853)
    assert T.resized_size((1200, 300), 640, 853) == (853, 213)
    assert T.resized_size((97, 31), 640, 853) == (853, 273)
    assert T.resized_size((480, 640), 400) == (400, 533)
    assert T.resized_size((100, 100), 32, 64) == (32, 32)


def test_padded_sizes_are_the_next_multiple():
    assert T.padded_size((640, 853)) == (640, 864)
    assert T.padded_size((1, 33)) == (32, 64)
    assert T.padded_size((5, 8), 4) == (8, 8)


@pytest.mark.parametrize("length,new", [(853, 640), (640, 853), (97, 273), (100, 400), (5, 1)])
def test_nearest_indices_are_pillows(length, new):
    values = np.random.default_rng(0).integers(0, 256, (1, length), np.uint8)
    expected = np.asarray(Image.fromarray(values).resize((new, 1), Image.Resampling.NEAREST))
    np.testing.assert_array_equal(values[0, T.nearest_indices(length, new)], expected[0])


@pytest.mark.parametrize("transform", [FLIP, CROP, FLIP._replace(flip=False, size=(171, 230))])
def test_run_lengths_move_as_a_full_size_nearest_resize(transform):
    mask = _mask(1, (71, 95))
    moved = mask[:, ::-1] if transform.flip else mask
    if transform.crop:
        y, x, height, width = transform.crop
        moved = _nearest(moved, transform.first_size)[y : y + height, x : x + width]
    expected = reduce_mask(_nearest(moved, transform.size))
    np.testing.assert_array_equal(T.mask_levels(_encode(mask), (71, 95), transform), expected)


def test_levels_equal_a_bilinear_reduction_of_the_padded_mask():
    mask = _mask(2, (40, 60))
    padded = np.zeros((64, 64), np.float64)
    padded[:40, :60] = mask
    # Half-pixel bilinear ÷4 samples at 4i + 1.5: the mean of pixels 4i + 1 and 4i + 2.
    halves = (padded[1::4] + padded[2::4]) / 2
    expected = (halves[:, 1::4] + halves[:, 2::4]) / 2
    transform = T.Transform(False, None, None, (40, 60))
    levels = T.mask_levels(_encode(mask), (40, 60), transform)
    np.testing.assert_array_equal(levels / 4, expected[:10, :15])


def test_polygons_move_as_coordinates():
    triangle = [[10.0, 5.0, 60.0, 5.0, 10.0, 45.0]]
    plain = T.Transform(False, None, None, (100, 200))
    assert T.move_polygons(triangle, (50, 100), plain) == [[20, 10, 120, 10, 20, 90]]
    flipped = plain._replace(flip=True)
    assert T.move_polygons(triangle, (50, 100), flipped) == [[180, 10, 80, 10, 180, 90]]
    # Resized x2, cut at (y 4, x 10), resized x3.
    crop = T.Transform(False, (100, 200), (4, 10, 50, 60), (150, 180))
    assert T.move_polygons(triangle, (50, 100), crop) == [[30, 18, 330, 18, 30, 258]]


def test_polygons_are_rasterised_at_the_final_size_and_cut_by_the_crop():
    square = [[10.0, 10.0, 50.0, 10.0, 50.0, 50.0, 10.0, 50.0]]
    crop = T.Transform(False, (100, 100), (30, 30, 64, 64), (64, 64))
    expected = np.zeros((64, 64), bool)
    expected[:20, :20] = True
    levels = T.mask_levels(square, (100, 100), crop)
    np.testing.assert_array_equal(levels, reduce_mask(expected))
    before = T.Transform(False, (100, 100), (0, 0, 64, 64), (64, 64))
    expected[:] = False
    expected[10:50, 10:50] = True
    np.testing.assert_array_equal(T.mask_levels(square, (100, 100), before), reduce_mask(expected))


def test_an_object_outside_the_crop_is_dropped():
    square = [[70.0, 70.0, 90.0, 70.0, 90.0, 90.0, 70.0, 90.0]]
    crop = T.Transform(False, (100, 100), (0, 0, 64, 64), (64, 64))
    assert T.mask_levels(square, (100, 100), crop) is None
    mask = np.zeros((100, 100), bool)
    mask[70:90, 70:90] = True
    assert T.mask_levels(_encode(mask), (100, 100), crop) is None


def test_an_object_that_vanishes_only_at_stride_four_stays():
    mask = np.zeros((16, 16), bool)
    mask[4, 4] = True  # a corner of its block: no inner pixel
    levels = T.mask_levels(_encode(mask), (16, 16), T.Transform(False, None, None, (16, 16)))
    np.testing.assert_array_equal(levels, np.zeros((4, 4)))


def test_flipping_twice_gives_the_image_back():
    image = np.random.default_rng(3).integers(0, 256, (20, 31, 3), np.uint8)
    flip = T.Transform(True, None, None, (20, 31))
    once = T.transform_image(image, flip)
    np.testing.assert_array_equal(once, image[:, ::-1])
    np.testing.assert_array_equal(T.transform_image(once, flip), image)


def test_an_image_is_flipped_resized_cropped_and_resized_in_this_order():
    image = np.random.default_rng(4).integers(0, 256, (71, 95, 3), np.uint8)
    first = T.resize_image(np.ascontiguousarray(image[:, ::-1]), (90, 120))[11:61, 7:88]
    expected = T.resize_image(np.ascontiguousarray(first), (37, 59))
    np.testing.assert_array_equal(T.transform_image(image, CROP), expected)


def test_masks_and_images_move_together():
    mask = _mask(5, (64, 96))
    image = np.repeat(mask[..., None].astype(np.uint8) * 255, 3, 2)
    transform = T.Transform(True, (128, 192), (10, 20, 96, 128), (96, 128))
    levels = T.mask_levels(_encode(mask), (64, 96), transform)
    seen = reduce_mask((T.transform_image(image, transform)[..., 0] > 127).astype(np.uint8))
    assert np.mean(levels == seen) > 0.97


def test_transforms_are_drawn_as_the_recipes_say():
    draws = np.random.default_rng(6).random((4000, T.NUM_DRAWS))
    sizes = (416, 512, 640)
    recipes = [T.Recipe(sizes, 853, name) for name in ("flip_resize", "flip_resize_crop")]
    plain = [T.draw_transform(d, (480, 640), recipes[0]) for d in draws]
    assert abs(np.mean([t.flip for t in plain]) - 0.5) < 0.03
    assert {t.size for t in plain} == {(416, 555), (512, 683), (640, 853)}
    assert all(t.crop is None for t in plain)
    drawn = [T.draw_transform(d, (480, 640), recipes[1]) for d in draws]
    cropped = [t for t in drawn if t.crop is not None]
    assert abs(len(cropped) / len(drawn) - 0.5) < 0.03
    assert {t.first_size for t in cropped} == {(400, 533), (500, 667), (600, 800)}
    heights = [t.crop[2] for t in cropped if t.first_size[0] == 400]
    assert (min(heights), max(heights)) == (384, 400)
    widths = [t.crop[3] for t in cropped if t.first_size[1] == 800]
    assert min(widths) < 390 and 590 < max(widths) <= 600
    for t in cropped:
        y, x, height, width = t.crop
        assert 0 <= y <= t.first_size[0] - height and 0 <= x <= t.first_size[1] - width
        assert max(t.size) <= 853


def test_a_crop_of_a_narrow_image_keeps_its_width():
    draws = np.full(T.NUM_DRAWS, 0.9999)
    transform = T.draw_transform(draws, (1000, 300), T.Recipe((640,), 853, "flip_resize_crop"))
    assert transform.first_size == (2000, 600)
    assert transform.crop == (1400, 0, 600, 600)
