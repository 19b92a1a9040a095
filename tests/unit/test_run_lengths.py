"""Compressed run lengths are added up as pycocotools reads them, whatever they hold."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from sparseinst_jax.data.segmentations import compressed_length
from sparseinst_jax.evaluation import coco_entries
from sparseinst_jax.evaluation.coco_entries import INVALID, lengths_and_areas


def draw_texts(seed, number):
    """Run lengths of masks from empty to noise, odd and even in number, some starting inside."""
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(number):
        height, width = rng.integers(1, 90, 2)
        mask = rng.random((height, width)) < rng.choice([0, 0.01, 0.5, 1])
        texts.append(coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"])
    return texts


def test_lengths_and_areas_are_those_of_pycocotools(monkeypatch):
    monkeypatch.setattr(coco_entries, "CHARACTERS_TOGETHER", 500)
    texts = draw_texts(0, 300)
    lengths, areas = lengths_and_areas(texts)
    assert lengths.tolist() == [compressed_length(text) for text in texts]
    rles = [{"size": [1, int(n)], "counts": t} for n, t in zip(lengths, texts, strict=True)]
    assert areas.tolist() == [int(coco_mask.area(rle)) for rle in rles]


def test_long_runs_and_differences_are_added_up_by_hand():
    runs = [70000, 1, 2**31 - 1, 65537, 3, 0, 5]
    rle = coco_mask.frPyObjects({"size": [1, sum(runs)], "counts": runs}, 1, 1)
    lengths, areas = lengths_and_areas([rle["counts"]])
    assert (lengths.tolist(), areas.tolist()) == ([sum(runs)], [1 + 65537 + 0])


@pytest.mark.parametrize("text", [b"", b"P", b"0P", b"/", b"\xff", b"11N", b"o" * 9 + b"1"])
def test_a_broken_text_is_found_and_spoils_no_other(text):
    assert compressed_length(text) is None
    before, after = draw_texts(1, 2)
    expected = [compressed_length(before), INVALID, compressed_length(after)]
    assert lengths_and_areas([before, text, after])[0].tolist() == expected


@pytest.mark.parametrize("seed", range(4))
def test_random_letters_are_read_as_one_at_a_time(seed):
    rng = np.random.default_rng(seed)
    texts = [
        bytes(rng.integers(46, 114, rng.integers(0, 9)).astype(np.uint8).tolist())
        for _ in range(400)
    ]
    alone = [compressed_length(text) for text in texts]
    assert 10 < sum(length is not None for length in alone) < 390
    expected = [INVALID if length is None else length for length in alone]
    assert lengths_and_areas(texts)[0].tolist() == expected


def test_nothing_to_measure_gives_nothing():
    lengths, areas = lengths_and_areas([])
    assert lengths.shape == areas.shape == (0,)
