"""The resize of 8-bit images against what OpenCV 4.6 and 4.14 gave on x86-64."""

import hashlib

import numpy as np
import pytest

from sparseinst_jax.data.ecosystems import opencv_resize


def pattern(height, width):
    """Values without any order, so that every rounding shows."""
    y, x, c = np.ogrid[:height, :width, :3]
    return ((y * y * 37 + x * 91 + c * 53 + x * y * 17) % 256).astype(np.uint8)


def digest(image):
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()[:16]


# Size, new size, INTER_LINEAR of the pattern, INTER_NEAREST of its first channel.
RECORDED = [
    ((12, 17), (9, 23), "0c2bf20ac0fd1678", "719d7b132ae6a62a"),
    ((37, 50), (24, 31), "e5da7f0a6bc5a6ff", "5a304976c27a7d15"),
    ((24, 30), (12, 15), "f12f0e56a25e54a6", "dc4ab2e8677eb079"),  # one half: a mean of 2x2
    ((5, 1), (3, 4), "5bba4afb491796d4", "26023cabc6ad81f9"),
    ((1, 7), (6, 3), "2fedc37af27efd0d", "20cb4b262ff01e00"),
    ((480, 640), (416, 554), "2dac85cdaa51d632", "63f3d985ef73ecc7"),
]
# Size, factor, new size, INTER_CUBIC with fx = fy = factor.
RECORDED_CUBIC = [
    ((12, 17), 853 / 640, (16, 23), "aa7c4235a5d50742"),
    ((37, 50), 0.7, (26, 35), "eb4d6bf76500b6e0"),
    ((50, 37), 1.1, (55, 41), "9f03dd2e2161342e"),
    ((96, 128), 853 / 640, (128, 171), "e07edf19472c6157"),
]


@pytest.mark.parametrize(("size", "new_size", "expected", "_"), RECORDED)
def test_bilinear_is_opencvs_to_the_bit(size, new_size, expected, _):
    found = opencv_resize.resize_bilinear(pattern(*size), new_size)
    assert found.shape == (*new_size, 3) and found.dtype == np.uint8
    assert digest(found) == expected


@pytest.mark.parametrize(("size", "new_size", "_", "expected"), RECORDED)
def test_nearest_takes_opencvs_pixels(size, new_size, _, expected):
    rows, columns = map(opencv_resize.nearest_indices, size, new_size)
    assert digest(pattern(*size)[rows][:, columns, 0]) == expected


@pytest.mark.parametrize(("size", "factor", "new_size", "expected"), RECORDED_CUBIC)
def test_bicubic_by_factor_is_opencvs(size, factor, new_size, expected):
    found = opencv_resize.resize_bicubic_by_factor(pattern(*size), factor)
    assert found.shape == (*new_size, 3) and found.dtype == np.uint8
    assert digest(found) == expected


def test_a_few_pixels_are_as_recorded():
    found = opencv_resize.resize_bilinear(pattern(4, 5), (3, 7))
    assert found[..., 0].tolist() == [
        [6, 60, 127, 194, 78, 72, 125],
        [93, 86, 114, 198, 98, 108, 175],
        [89, 144, 164, 111, 180, 176, 133],
    ]
    found = opencv_resize.resize_bicubic_by_factor(pattern(4, 5), 1.5)  # 7.5 columns become 8
    assert found[:3, :, 0].tolist() == [
        [0, 33, 110, 179, 93, 8, 83, 107],
        [0, 60, 157, 230, 149, 70, 151, 177],
        [51, 82, 153, 241, 169, 99, 192, 222],
    ]
    assert opencv_resize.nearest_indices(5, 7).tolist() == [0, 0, 1, 2, 2, 3, 4]
    assert opencv_resize.nearest_indices(853, 640)[:8].tolist() == [0, 1, 2, 3, 5, 6, 7, 9]


def test_the_same_size_gives_the_same_pixels():
    image = pattern(24, 16)
    np.testing.assert_array_equal(opencv_resize.resize_bilinear(image, (24, 16)), image)
    # 23.84 and 15.89: OpenCV looks at the sizes only.
    np.testing.assert_array_equal(opencv_resize.resize_bicubic_by_factor(image, 0.9934), image)


def test_sides_are_rounded_to_even_at_one_half():
    assert opencv_resize.size_by_factor((5, 7), 0.5) == (2, 4)
    assert opencv_resize.size_by_factor((480, 640), 853 / 640) == (640, 853)
    assert opencv_resize.size_by_factor((1, 3), 0.1) == (1, 1)
