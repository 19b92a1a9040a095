"""Pixels of drawn masks, contours and labels."""

import itertools

import numpy as np
import pytest
from PIL import Image

from sparseinst_jax.drawing import pictures
from sparseinst_jax.drawing.label_places import label_places


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
    np.testing.assert_allclose(drawn[300, 300], 0.45 * top, atol=1)
    assert not drawn[~masks[0]].any()
    masks[1, 100:550, 100:550] = True
    drawn = np.asarray(pictures.draw_instances(image, masks, ["", "", ""]))
    np.testing.assert_allclose(drawn[520, 300], 0.45 * below, atol=1)
    np.testing.assert_array_equal(drawn[499, 300], top)
    np.testing.assert_array_equal(drawn[549, 300], below)


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


def test_objects_of_a_class_have_its_colour_and_neighbours_another_shade():
    masks = np.zeros((5, 600, 600), bool)
    for index, (y, x) in enumerate([(100, 100), (100, 200), (400, 100), (400, 400), (200, 100)]):
        masks[index, y : y + 100, x : x + 100] = True
    image, labels = np.zeros((600, 600, 3), np.uint8), [7, 7, 7, 2, 7]
    drawn = np.asarray(pictures.draw_instances(image, masks, [""] * 5, labels=labels))
    colours = [tuple(drawn[mask][0].tolist()) for mask in masks]  # of the outlines
    own, lighter, darker, _ = pictures.shades(pictures.instance_colour(7))
    assert colours == [own, lighter, own, pictures.instance_colour(2), darker]


def grid_masks(*boxes, shape=(60, 80)):
    masks = np.zeros((len(boxes), *shape), bool)
    for mask, (top, left, bottom, right) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = True
    return list(masks)


def covered(place, size, mask):
    (top, left), (height, width) = place, size
    return mask[top : top + height, left : left + width]


def test_the_label_of_a_large_object_lies_inside_and_that_of_a_small_one_touches_it():
    large, small = grid_masks((5, 5, 55, 45), (20, 60, 26, 66))
    size = (4, 12)
    inside, beside = label_places([large, small], [size, size])
    assert covered(inside, size, large).all()
    assert not covered(beside, size, small).any() and not covered(beside, size, large).any()
    grown = (beside[0] - 1, beside[1] - 1)
    assert covered(grown, (6, 14), small).any()


def test_labels_hide_neither_other_objects_nor_one_another():
    masks = grid_masks(*((10, left, 16, left + 6) for left in range(10, 70, 7)))
    places = label_places(masks, [(4, 12)] * len(masks))
    taken = np.zeros((60, 80), int)
    drawn = [place for place in places if place is not None]
    assert len(drawn) >= 6
    for place in drawn:
        assert not any(covered(place, (4, 12), mask).any() for mask in masks)
        covered(place, (4, 12), taken)[:] += 1
    assert taken.max() == 1


def test_a_label_without_a_good_place_is_left_out():
    boxes = [(y, x, y + 6, x + 6) for y in range(14, 40, 6) for x in range(20, 56, 6)]
    middle, *around = grid_masks((26, 38, 32, 44), *(box for box in boxes if box[:2] != (26, 38)))
    places = label_places([middle, *around], [(4, 12)] + [(0, 0)] * len(around))
    assert places == [None] * len(places)
    assert label_places([middle], [(61, 12)]) == [None]  # larger than the picture


def test_labels_of_many_objects_do_not_cover_the_picture():
    masks = grid_masks(
        *((y, x, y + 3, x + 3) for y in range(0, 200, 10) for x in range(0, 200, 10)),
        shape=(200, 200),
    )
    places = label_places(masks, [(6, 20)] * 400)
    assert 25 <= sum(place is not None for place in places) <= 0.15 * 200 * 200 / (6 * 20)


def test_an_object_between_the_cells_of_the_grid_has_its_label():
    image, mask = np.zeros((1201, 1601, 3), np.uint8), np.zeros((1, 1201, 1601), bool)
    mask[0, -1, -1] = True
    drawn = np.asarray(pictures.draw_instances(image, mask, ["speck 0.50"]))
    written = (drawn == pictures.instance_colour(0)).all(axis=2)
    assert written.sum() > 1000 and written[-1, -1]


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
