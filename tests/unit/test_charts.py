"""Charts and the letters in them."""

import math

import numpy as np
import pytest
from PIL import Image

from sparseinst_jax.drawing import charts, fonts


@pytest.mark.parametrize(
    "low, high, expected",
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 270, [0, 100, 200]), (3, 3, [3])],
)
def test_ticks_are_round_numbers(low, high, expected):
    np.testing.assert_allclose(charts.nice_ticks(low, high), expected)


def test_a_line_ends_where_its_last_value_is_and_the_title_is_cut():
    frame = charts.Frame((200, 100), (20, 20, 20, 20), x_range=(0, 1), y_range=(0, 1))
    panel = np.asarray(charts.line_panel("W" * 99, {"a": [(0, 0), (1, 0.5)]}, frame, legend=False))
    blue = np.abs(panel.astype(int) - [0x1F, 0x77, 0xB4]).sum(-1) == 0
    ys, xs = np.nonzero(blue)
    assert (xs.min(), xs.max()) == pytest.approx((20, 180), abs=3)
    assert (ys.max(), ys.min()) == pytest.approx((80, 50), abs=3)
    assert (panel[:, -2:] == 255).all()


def test_a_matrix_is_darker_where_a_row_has_its_larger_share_and_writes_counts():
    counts = np.array([[8, 0], [1, 1]])
    picture = np.asarray(charts.matrix(counts, ["cat", "dog"], ["cat", "dog"])).astype(int)
    height, width = picture.shape[:2]
    cell = 18
    corners = [
        [
            picture[height - 8 - (2 - row) * cell + 2, width - 8 - (2 - column) * cell + 2].sum()
            for column in range(2)
        ]
        for row in range(2)
    ]
    assert corners[0][1] == 3 * 255 > corners[1][0] == corners[1][1] > corners[0][0]
    inside = picture[-8 - 2 * cell : -8 - cell, -8 - 2 * cell : -8 - cell]
    assert (inside == 255).all(axis=-1).any()  # the white digit on the dark cell


@pytest.mark.parametrize("number", [3, 81])
def test_names_beside_a_matrix_do_not_overlap(number):
    names = [f"a long name of class {index}" for index in range(number)]
    picture = charts.matrix(np.full((number, number), 123456), names, names)
    pixels = np.asarray(picture.convert("L"))
    left = math.ceil(max(map(fonts.own_font(13).getlength, names))) + 12
    # Each name is a run of dark rows of its own, and above the cells of dark columns.
    beside = (pixels[picture.height - 8 - (picture.width - left - 8) :, : left - 3] < 200).any(1)
    assert np.count_nonzero(np.diff(beside.astype(int), prepend=0) == 1) == number
    above = (pixels[: picture.height - 8 - (picture.width - left - 8) - 3, left:] < 200).any(0)
    assert np.count_nonzero(np.diff(above.astype(int), prepend=0) == 1) == number


def test_letters_that_a_font_lacks_are_replaced_and_line_breaks_too():
    font = fonts.own_font(14)
    assert fonts.drawable("cat\n dog\t1", font) == "cat dog 1"
    assert fonts.drawable("Äpfel, señor", font) == "Apfel, senor"
    assert fonts.drawable("苹果 1", font) == "?? 1"
    assert fonts.labels(["cat?", "苹果", ""], [1, 2, 3], font) == ["cat?", "2 ??", "3"]


def test_long_texts_lose_their_middle():
    font = fonts.own_font(14)
    short = fonts.shorten("a" * 50 + "_001", font, 90)
    assert short.startswith("aaa") and short.endswith("_001") and "..." in short
    assert 60 < font.getlength(short) <= 90
    assert fonts.shorten("cat", font, 90) == "cat"
    assert fonts.shorten("cat", font, 2) == ""


def test_a_picture_is_written_whole_under_its_name_alone(tmp_path):
    charts.save_png(Image.new("RGB", (3, 2)), tmp_path / "new" / "a.png")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]
    assert Image.open(tmp_path / "new" / "a.png").size == (3, 2)
