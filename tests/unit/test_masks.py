"""The composed upsampling against the plain steps, and RLE."""

import itertools
from typing import Any

import jax
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from sparseinst_jax.drawing.crops import crop, decode_crop
from sparseinst_jax.inference import masks
from sparseinst_jax.runner import run_lengths

CUT = masks.MaskCut(0.45, stride=4)
SIZES = [
    # mask grid, valid size, original size: enlarged, shrunk, equal, thin, tiny
    ((160, 216), (640, 853), (480, 640)),
    ((24, 32), (91, 122), (200, 131)),
    ((8, 8), (32, 32), (32, 32)),
    ((8, 40), (31, 155), (7, 311)),
    ((8, 8), (5, 3), (1, 2)),
    ((8, 8), (1, 32), (1, 300)),
]


def interpolate(values, length):
    """Resize the first axis with half-pixel centres and repeated edges, float64."""
    centre = (np.arange(length) + 0.5) * (len(values) / length) - 0.5
    centre = np.clip(centre, 0, len(values) - 1)
    columns = values.reshape(len(values), -1).T
    resized = [np.interp(centre, np.arange(len(values)), column) for column in columns]
    return np.stack(resized, axis=1).reshape(length, *values.shape[1:])


def plain_upsampling(probs, valid_size, original_size):
    """Bilinear x4, crop, bilinear to the original size: [h, w] -> [height, width], float64."""
    padded = interpolate(probs.astype(np.float64), 4 * probs.shape[0])
    padded = interpolate(padded.T, 4 * probs.shape[1]).T
    valid = padded[: valid_size[0], : valid_size[1]]
    return interpolate(interpolate(valid, original_size[0]).T, original_size[1]).T


@pytest.mark.parametrize(("grid", "valid", "original"), SIZES)
def test_composed_operator_equals_enlarging_cropping_and_resizing(grid, valid, original):
    for axis in (0, 1):
        index, weight = masks.upsampling_operator(
            grid[axis], 4, valid[axis], original[axis], original[axis]
        )
        dense = np.zeros((original[axis], grid[axis]))
        np.add.at(dense, (np.arange(original[axis])[:, None], index), weight)
        identity = np.eye(grid[axis])
        expected = interpolate(interpolate(identity, 4 * grid[axis])[: valid[axis]], original[axis])
        np.testing.assert_allclose(dense, expected, atol=1e-7)


@pytest.mark.parametrize(("grid", "valid", "original"), SIZES)
def test_upsampled_masks_equal_the_plain_steps_away_from_the_threshold(rng, grid, valid, original):
    probs = rng.random((2, 5, *grid), dtype=np.float32)
    chosen = np.array([4, 0, 2])
    ((found, _),) = masks.upsample_masks(probs, 1, chosen, valid, original, CUT)
    assert found.dtype == np.uint8
    for mask, query in zip(found, chosen, strict=True):
        expected = plain_upsampling(probs[1, query], valid, original)
        sure = np.abs(expected - 0.45) > 1e-6
        np.testing.assert_array_equal(mask.T[sure], (expected > 0.45)[sure])


def test_many_masks_come_in_chunks_and_in_order(rng):
    probs = rng.random((1, 40, 8, 8), dtype=np.float32)
    chosen = np.arange(39)[::-1]
    chunks = list(masks.upsample_masks(probs, 0, chosen, (32, 30), (50, 40), CUT))
    chunks = [chunk for chunk, _ in chunks]
    assert [len(chunk) for chunk in chunks] == [16, 16, 7]
    single = [
        next(masks.upsample_masks(probs, 0, np.array([query]), (32, 30), (50, 40), CUT))[0]
        for query in chosen
    ]
    np.testing.assert_array_equal(np.concatenate(chunks), np.concatenate(single))


@pytest.mark.parametrize("measures", [False, True])
@pytest.mark.parametrize(("grid", "valid", "original"), SIZES)
def test_what_an_accelerator_packs_is_what_a_cpu_fetches(
    rng, monkeypatch, grid, valid, original, measures
):
    probs = jax.device_put(rng.random((2, 40, *grid), dtype=np.float32))
    chosen, cut = rng.permutation(40)[:37], CUT._replace(measures=measures)

    def upsample():
        chunks = list(masks.upsample_masks(probs, 1, chosen, valid, original, cut))
        made = np.concatenate([chunk for chunk, _ in chunks])
        scores = np.concatenate([scores for _, scores in chunks]) if measures else None
        return len(chunks), made, scores

    _, expected, expected_scores = upsample()
    monkeypatch.setattr(masks, "_accelerator", lambda masks: jax.devices()[0])
    number, found, scores = upsample()
    assert number == 1
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)
    if measures:
        np.testing.assert_allclose(scores, expected_scores, rtol=1e-6)


def test_a_program_for_a_gpu_hands_out_bits(rng):
    operators = [masks.upsampling_operator(8, 4, 32, side, 128) for side in (100, 90)]
    arguments = np.zeros((1, 5, 8, 8), np.float32), np.zeros((2, 8), np.int32), *operators, None
    made, _ = jax.eval_shape(masks._upsample_and_pack, *arguments, CUT)
    assert (made.shape, made.dtype) == ((8, 128, 16), np.uint8)


def test_no_masks_give_no_chunks():
    none = np.zeros(0, np.int32)
    assert not list(masks.upsample_masks(np.zeros((1, 2, 8, 8)), 0, none, (32, 32), (9, 9), CUT))


def test_one_compiled_function_serves_every_original_size_of_a_bucket(rng):
    probs = rng.random((1, 3, 8, 9), dtype=np.float32)
    counts = []
    for original in [(100, 90), (128, 1), (33, 128)]:
        list(masks.upsample_masks(probs, 0, np.arange(3), (32, 36), original, CUT))
        counts.append((masks._upsample_rows._cache_size(), masks._cut_columns._cache_size()))
    assert counts[0] == counts[1] == counts[2]


def test_chunks_shrink_for_large_images():
    assert masks.chunk_length((640, 640), 100) == 16
    assert masks.chunk_length((640, 640), 3) == 4
    assert masks.chunk_length((4096, 4096), 100) == 1
    assert masks.chunk_length((2048, 2048), 100) == 4
    assert masks.chunk_length((8192, 8192), 100) == 1


def test_a_hundred_masks_of_a_large_photo_pass_through_little_memory():
    height, width = 3000, 4000
    bucket = (masks.bucket_length(height), masks.bucket_length(width))
    number = masks.chunk_length(bucket, 100)
    probs = jax.ShapeDtypeStruct((1, 100, 160, 216), np.float32)
    operators = [
        masks.upsampling_operator(grid, 4, valid, original, length)
        for grid, valid, original, length in zip(
            (160, 216), (640, 853), (height, width), bucket, strict=True
        )
    ]
    chosen = np.zeros(number, np.int32)
    rows = jax.eval_shape(masks._upsample_rows, probs, np.int32(0), chosen, operators[0])
    cut, _ = jax.eval_shape(masks._cut_columns, rows, operators[1], np.float32(0.45))
    assert cut.shape == (number, bucket[1], bucket[0])
    # One chunk that is made, and one that is looked at.
    taken = rows.size * rows.dtype.itemsize + 2 * cut.size * cut.dtype.itemsize
    assert taken <= 64 * 2**20


def test_rle_runs_down_the_columns():
    mask = np.array([[[0, 1, 1], [0, 1, 0]]], bool)
    (rle,) = run_lengths.encode_masks(mask)
    assert rle["size"] == [2, 3]
    # runs of zeros and ones: 2 zeros, 3 ones, 1 zero, written as COCO's text
    assert rle["counts"] == "231"
    np.testing.assert_array_equal(run_lengths.decode_masks([rle], (2, 3)), mask)


def test_encoding_and_decoding_change_nothing(rng):
    drawn = rng.random((4, 17, 23)) < [[[0.0]], [[0.2]], [[0.9]], [[1.0]]]
    np.testing.assert_array_equal(
        run_lengths.decode_masks(run_lengths.encode_masks(drawn), (17, 23)), drawn
    )
    np.testing.assert_array_equal(
        run_lengths.decode_masks([], (17, 23)), np.zeros((0, 17, 23), bool)
    )


def test_packed_as_pycocotools_packs(rng):
    """Empty, full, cut by each side, in pieces, and noise with more changes than are listed."""
    for size, share in itertools.product([(1, 1), (7, 5), (90, 120)], [0, 0.004, 0.5, 1]):
        noise = (rng.random((5, *size)) < share).astype(np.uint8)
        noise[1:3, : size[0] // 2] = 0
        noise[2:4, size[0] // 2 :, : size[1] // 2] = 0
        packed = run_lengths.encode_transposed(noise)
        expected: Any = coco_mask.encode(noise.transpose(2, 1, 0))
        assert [rle["counts"].encode() for rle in packed] == [rle["counts"] for rle in expected]
        assert packed[0]["size"] == [size[1], size[0]] == expected[0]["size"]
        masks = noise.transpose(0, 2, 1).astype(bool)
        np.testing.assert_array_equal(run_lengths.decode_masks(packed, masks.shape[1:]), masks)
        for rle, mask in zip(packed, masks, strict=True):
            found, wanted = decode_crop(rle), crop(mask)
            assert found[:2] == wanted[:2]
            np.testing.assert_array_equal(found.pixels, wanted.pixels)
            drawn = np.zeros_like(mask)
            height, width = found.pixels.shape
            drawn[found.top : found.top + height, found.left : found.left + width] = found.pixels
            np.testing.assert_array_equal(drawn, mask)


def test_boxes_enclose_masks_with_exclusive_ends():
    drawn = np.zeros((2, 10, 12), bool)
    drawn[0, 2:5, 3:11] = True
    boxes = run_lengths.boxes_of(run_lengths.encode_masks(drawn))
    np.testing.assert_array_equal(boxes, [[3, 2, 11, 5], [0, 0, 0, 0]])
    assert run_lengths.boxes_of([]).shape == (0, 4)


def test_areas_of_more_masks_than_pycocotools_counts_at_once():
    drawn = np.zeros((300, 4, 5), bool)
    for place in range(300):
        drawn[place].reshape(-1)[: place % 21] = True
    assert run_lengths.areas_of(run_lengths.encode_masks(drawn)).tolist() == [
        i % 21 for i in range(300)
    ]
    assert run_lengths.areas_of([]).shape == (0,)
