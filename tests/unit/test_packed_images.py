"""Images as flat arrays and back."""

import numpy as np
import pytest

from sparseinst_jax.data.loader import pack, unpack
from sparseinst_jax.data.target_masks import FULL_BITS, QUARTER_LEVELS
from sparseinst_jax.data.train_image import TrainImage


def _image(rng, height, width, labels, ignores_crowd, form):
    region = -(-height // form.stride), -(-width // form.stride)
    return TrainImage(
        rng.integers(0, 256, (height, width, 3), np.uint8),
        labels,
        [form.encode(rng.random((height, width)) < 0.5) for _ in labels],
        rng.random(region) < 0.5 if ignores_crowd else None,
        [],
        [],
    )


@pytest.mark.parametrize("form", [QUARTER_LEVELS, FULL_BITS], ids=["levels", "bits"])
@pytest.mark.parametrize("ignores_crowd", [False, True])
@pytest.mark.parametrize("labels", [([3, 1], [], [7]), ([], [], [])])
def test_packed_images_come_back_as_they_were(labels, ignores_crowd, form):
    rng = np.random.default_rng(0)
    sizes = [(5, 9), (8, 4), (1, 13)]
    images = [_image(rng, *s, x, ignores_crowd, form) for s, x in zip(sizes, labels, strict=True)]
    packed = pack([7, 5, 9], iter(images))
    assert packed.image_ids.tolist() == [7, 5, 9]
    # Nothing but what is there: no padding of the images, none of the targets.
    assert packed.pixels.nbytes == 3 * (45 + 32 + 13)
    bytes_each = [2 * 3, 2 * 1, 1 * 4] if form == QUARTER_LEVELS else [5 * 2, 8 * 1, 1 * 2]
    assert packed.masks.nbytes == np.array(bytes_each) @ [len(x) for x in labels]
    for image, other in zip(images, unpack(packed, form), strict=True):
        np.testing.assert_array_equal(image.image, other.image)
        assert image.labels == other.labels and len(image.masks) == len(other.masks)
        for mask, copy in zip(image.masks, other.masks, strict=True):
            np.testing.assert_array_equal(mask, copy)
        assert (other.is_ignored is None) == (not ignores_crowd)
        if ignores_crowd:
            np.testing.assert_array_equal(image.is_ignored, other.is_ignored)
