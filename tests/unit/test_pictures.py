"""Pixels of drawn masks, contours and labels."""

import itertools

import numpy as np
import pytest
from PIL import Image

from sparseinst_jax.drawing import pictures


def test_colours_are_stable_and_far_apart():
    colours = [pictures.instance_colour(index) for index in range(24)]
    assert colours == [pictures.instance_colour(index) for index in range(24)]
    distances = [
        np.abs(np.subtract(first, second)).sum()
        for first, second in itertools.combinations(colours, 2)
    ]
    assert min(distances) >= 35
    neighbours = [
        np.abs(np.subtract(first, second)).sum() for first, second in itertools.pairwise(colours)
    ]
    assert min(neighbours) >= 150


def test_contour_is_the_rim_of_the_mask_and_closes_at_the_border():
    mask = np.zeros((6, 6), bool)
    mask[1:6, 1:5] = True
    expected = mask.copy()
    expected[2:5, 2:4] = False
    np.testing.assert_array_equal(pictures.contour(mask, 1), expected)
    np.testing.assert_array_equal(pictures.contour(mask, 3), mask)


def test_masks_are_blended_and_everything_else_stays():
    image = np.full((600, 640, 3), 100, np.uint8)
    mask = np.zeros((1, 600, 640), bool)
    mask[0, 200:400, 100:300] = True
    drawn = np.asarray(pictures.draw_instances(image, mask, [""]))
    colour = np.array(pictures.instance_colour(0))
    np.testing.assert_allclose(drawn[300, 200], 0.55 * 100 + 0.45 * colour, atol=1)
    np.testing.assert_array_equal(drawn[200, 150], colour)
    np.testing.assert_array_equal(drawn[~mask[0]], 100)


def test_the_first_instance_is_on_top_and_empty_masks_draw_nothing():
    image = np.zeros((600, 600, 3), np.uint8)
    masks = np.zeros((3, 600, 600), bool)
    masks[:2, 100:500, 100:500] = True
    drawn = np.asarray(pictures.draw_instances(image, masks, ["", "", "not drawn"]))
    top, below = (np.array(pictures.instance_colour(index)) for index in (0, 1))
    np.testing.assert_allclose(drawn[300, 300], 0.45 * top + 0.55 * 0.45 * below, atol=1)
    assert not drawn[~masks[0]].any()


def test_small_images_are_enlarged_until_text_is_readable():
    assert pictures.enlargement((480, 640)) == 1
    assert pictures.enlargement((128, 160)) == 4
    assert pictures.enlargement((5, 5)) == 6
    image = np.zeros((100, 160, 3), np.uint8)
    masks = np.zeros((1, 100, 160), bool)
    masks[0, 50:60, 50:60] = True
    picture = pictures.draw_instances(image, masks, ["cat 0.93"])
    assert picture.size == (640, 400)
    written = np.asarray(picture) == pictures.instance_colour(0)
    rows = np.flatnonzero(written.all(axis=2).any(axis=1))
    assert rows[0] < 200 - 12  # the label stands above the mask, at least 12 pixels high


def test_labels_keep_off_one_another_and_inside_the_picture():
    taken = []
    for _ in range(4):
        place = pictures._free_place((90, 0, 130, 40), (60, 12), (140, 100), taken)
        assert place[0] >= 0 and place[1] >= 0 and place[2] <= 140 and place[3] <= 100
        assert not any(pictures._overlap(place, other) for other in taken)
        taken.append(place)


@pytest.mark.parametrize("count", [0, 3])
def test_pictures_stand_side_by_side_under_their_titles(count):
    image = np.full((300, 512, 3), 7, np.uint8)
    masks = np.zeros((count, 300, 512), bool)
    picture = pictures.draw_instances(image, masks, ["a"] * count)
    row = pictures.beside([picture, picture], ["predicted", "annotated"])
    bar = row.height - 300
    assert row.width == 2 * 512 + 6 and bar > 10
    pixels = np.asarray(row)
    np.testing.assert_array_equal(pixels[bar:, :512], 7)
    np.testing.assert_array_equal(pixels[bar:, 518:], 7)


def test_a_picture_is_written_whole_under_its_name_alone(tmp_path):
    pictures.save_png(Image.new("RGB", (3, 2)), tmp_path / "new" / "a.png")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]
    assert Image.open(tmp_path / "new" / "a.png").size == (3, 2)
