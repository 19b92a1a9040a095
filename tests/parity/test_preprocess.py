"""The resize of the original: sizes and pixels that detectron2 computed."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from sparseinst_jax.data.transforms import resize_image, resized_size
from tests.parity import golden_weights

GOLDEN = json.loads((Path(__file__).parent / "golden/preprocess/preprocess.json").read_text())


def _digest(image):
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: "x".join(map(str, c["hw"])))
def test_resized_pixels_equal_the_originals(case):
    image = golden_weights.image(*case["hw"], case["image_seed"])
    assert _digest(image) == case["input_sha256_16"]
    size = resized_size(tuple(case["hw"]), 640, 853)
    assert list(size) == case["out_hw"]
    resized = resize_image(image, size)
    # Pillow may round a pixel differently in another release, hence one level of 255.
    sampled = resized[case["ys"], case["xs"]].astype(int)
    assert np.abs(sampled - np.array(case["rgb"])).max() <= 1
    np.testing.assert_allclose(resized.mean((0, 1)), case["mean"], atol=0.02)


def test_every_size_of_the_table_equals_the_originals():
    wrong = [
        (row, resized_size((row[0], row[1]), row[2], row[3]))
        for row in GOLDEN["size_table_h_w_short_max_newh_neww"]
        if resized_size((row[0], row[1]), row[2], row[3]) != (row[4], row[5])
    ]
    assert wrong == []
