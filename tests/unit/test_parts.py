"""A photo in overlapping parts: every object once, whatever part it is seen in."""

from __future__ import annotations

import numpy as np
import pytest

from sparseinst_jax.runner import run_lengths
from sparseinst_jax.runner.file_predictor import FilePredictor
from sparseinst_jax.runner.parts import OVERLAP, join, parts_of
from sparseinst_jax.runner.predictor import FoundInstances
from tests import exporting


@pytest.mark.parametrize("size", [(64, 100), (37, 53), (5, 300), (1, 1)])
@pytest.mark.parametrize("zoom", [1.0, 1.5, 2.0, 3.7])
def test_parts_cover_the_photo_and_each_other_by_a_quarter(size, zoom):
    parts = parts_of(size, zoom)
    seen = np.zeros(size, int)
    for (y, x), (height, width), photo_size, number in parts:
        assert photo_size == size and number == len(parts)
        assert y + height <= size[0] and x + width <= size[1]
        seen[y : y + height, x : x + width] += 1
    assert (seen > 0).all()
    for axis in (0, 1):
        starts, side = sorted({part.corner[axis] for part in parts}), parts[0].size[axis]
        assert all(side - gap >= OVERLAP * side - 1 for gap in np.diff(starts))


def _seen_in(photo: np.ndarray, labels: list[int]) -> list:
    """What a perfect network would find of masks [D, h, w] in the parts of a photo."""
    found = []
    for part in parts_of(photo.shape[1:], 2.0):
        (y, x), (height, width) = part.corner, part.size
        pieces = photo[:, y : y + height, x : x + width].astype(np.uint8).transpose(0, 2, 1)
        scores = np.linspace(0.9, 0.5, len(photo), dtype=np.float32)
        order = np.arange(len(photo), dtype=np.int32)
        chunks = iter([(pieces[:2], scores[:2]), (pieces[2:], scores[2:])])
        found.append((part, FoundInstances(np.array(labels), order, chunks, part.size)))
    return found


def test_what_several_parts_find_is_found_once_and_whole():
    photo = np.zeros((5, 80, 120), bool)
    photo[0, 2:9, 3:12] = True  # in a corner, in one part
    photo[1, 33:45, 50:70] = True  # over the middle, cut by some parts
    photo[2, 33:45, 50:70] = True  # the same place, another class
    photo[3, 36:40, 52:58] = True  # within it, and seen beside it in the same parts
    photo[4, 60:78, 0:120] = True  # wider than any part: pieces
    joined = join(_seen_in(photo, [0, 1, 2, 3, 1]))
    rles, scores = joined.encode()
    masks = run_lengths.decode_masks(rles, (80, 120))
    for label in (0, 2, 3):
        (mask,) = masks[joined.labels == label]
        np.testing.assert_array_equal(mask, photo[label])
    whole = [mask for mask in masks if (mask == photo[1]).all()]
    assert len(whole) == 2 and joined.labels.tolist().count(1) > 1  # once of each of two classes
    assert (masks[joined.labels == 1] & photo[4]).any(0).sum() == photo[4].sum()
    assert scores[joined.labels == 0].tolist() == pytest.approx([0.9])
    for (mask, score), expected in zip(joined.chunks, masks, strict=True):
        np.testing.assert_array_equal(mask[0].T, expected)
        assert score[0] in scores


def test_neighbours_stay_and_what_another_part_sees_all_of_is_left_to_it():
    photo = np.zeros((2, 80, 120), bool)
    photo[0, 10:20, 10:20] = True
    photo[1, 10:20, 16:26] = True  # shares less than a half
    assert len(join(_seen_in(photo, [0, 0])).rles) == 2
    found = _seen_in(photo[:0], [])
    nothing = join(found)
    assert nothing.rles == [] and nothing.scores.shape == (0,)
    assert nothing.original_size == (80, 120)
    # The first part is 60 columns wide, and the second begins with column 30.
    for columns, number in (((50, 60), 0), ((40, 60), 1), ((0, 60), 1), ((0, 10), 1)):
        mask = np.zeros((1, 60, 40), np.uint8)
        mask[:, slice(*columns), 4:9] = 1
        chunks = iter([(mask, np.ones(1, np.float32))])
        alone = FoundInstances(np.array([0]), np.array([0]), chunks, (40, 60))
        assert len(join([(found[0][0], alone)]).rles) == number


def test_columns_of_a_mask_are_encoded_as_the_whole(rng):
    for first, width in ((0, 7), (4, 9), (13, 7)):
        mask = np.zeros((20, 11), np.uint8)  # [width, height]
        mask[first : first + width] = rng.random((width, 11)) < 0.5
        mask[first] = 1
        expected = run_lengths.encode_transposed(mask[None])[0]
        piece = mask[first : first + width]
        assert run_lengths.encode_columns(piece, first, (11, 20)) == expected
    empty = run_lengths.encode_columns(np.zeros((3, 11), np.uint8), 5, (11, 20))
    assert run_lengths.areas_of([empty]) == [0]


def test_a_network_looks_at_each_part_as_if_it_were_the_photo(quick_compilation):
    config = exporting.narrow("giam_r50")
    whole = exporting.predictor_of(config)
    config.eval.zoom = 2.0
    zoomed = exporting.predictor_of(config)
    photo = exporting.photos()[0]
    found, parts = zoomed(photo, 0.01), parts_of(photo.shape[:2], 2.0)
    assert found.query_index is None and found.masks.shape[1:] == photo.shape[:2]
    expected = set()
    for (y, x), (height, width), *_ in parts:
        part = whole(np.ascontiguousarray(photo[y : y + height, x : x + width]), 0.01)
        for mask, score, label in zip(part.masks, part.scores, part.labels, strict=True):
            full = np.zeros(photo.shape[:2], bool)
            full[y : y + height, x : x + width] = mask
            expected.add((full.tobytes(), float(score), int(label)))
    ours = zip(found.masks, found.scores, found.labels, strict=True)
    ours = {(mask.tobytes(), float(score), int(label)) for mask, score, label in ours}
    assert ours <= expected and 0 < len(ours)
    (raw,) = zoomed.run([zoomed.prepare(photo)])
    assert len(raw.encode()[0]) >= len(found)
    model = exporting.written(exporting.narrow("giam_r50"))
    theirs = FilePredictor(model.SerializeToString(), zoom=2.0)(photo, 0.01)
    np.testing.assert_array_equal(theirs.labels, found.labels)
    np.testing.assert_allclose(theirs.scores, found.scores, atol=1e-5)
    with pytest.raises(ValueError, match=r"eval\.zoom is 2"):
        zoomed.activations(photo)
    config.eval.zoom = 0.5
    with pytest.raises(ValueError, match=r"eval\.zoom must be 1 to"):
        exporting.predictor_of(config)
