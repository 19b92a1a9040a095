"""Numbers in messages."""

import io

import pytest

from sparseinst_jax.runtime.messages import percent, rounded
from sparseinst_jax.runtime.progress import ImageProgress


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        (8, 8, "100 %"),
        (0, 8, "0 %"),
        (1, 3, "33 %"),
        (1, 16, "6.2 %"),
        (199, 200, "99.5 %"),
        (99_999, 100_000, "above 99.9 %"),
        (1, 100_000, "below 0.1 %"),
    ],
)
def test_a_share_is_readable_and_never_rounded_to_nothing_or_all(part, whole, text):
    assert percent(part, whole) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (18007.2, "18,000"),
        (2244.41, "2,240"),
        (12.84, "12.8"),
        (8, "8"),
        (0.01234, "0.0123"),
        (0, "0"),
        (2.03e9, "2,030,000,000"),
    ],
)
def test_a_number_is_rounded_to_three_digits_without_an_exponent(value, text):
    assert rounded(value) == text


def test_progress_gives_a_speed_only_where_it_says_something():
    line = ImageProgress(8, None, "checked")
    line.done = 4
    assert line.line(2.0) == "checked 4/8 images, 2 images/s, ETA 0:00:02"
    line.done = 8
    assert line.line(0.00044) == "checked 8/8 images"
    assert line.line(60.04) == "checked 8/8 images in 60 s, 0.133 images/s"


def test_what_the_first_images_took_does_not_count_for_the_time_left(monkeypatch):
    now = [50.0]
    monkeypatch.setattr("sparseinst_jax.runtime.progress.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    with ImageProgress(100, stream) as line:
        for seconds in (90, 5, 5, 10):  # the network is compiled with the first ten
            now[0] += seconds
            line.advance(10)
    assert stream.getvalue().splitlines() == [
        "evaluated 10/100 images",
        "evaluated 30/100 images, 2 images/s, ETA 0:00:35",
        "evaluated 40/100 images, 1.5 images/s, ETA 0:00:40",
    ]
