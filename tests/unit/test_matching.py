"""The matcher against brute force and in the cases where SciPy would raise."""

import itertools

import numpy as np

from sparseinst_jax import matching


def best_total(score):
    """Return the best sum of scores over all one-to-one choices, by trying every one."""
    num_masks, num_targets = score.shape
    if num_targets > num_masks:
        return best_total(score.T)
    choices = itertools.permutations(range(num_masks), num_targets)
    return max(sum(score[n, m] for m, n in enumerate(choice)) for choice in choices)


def test_matching_finds_the_best_total_score(rng):
    score = rng.random((5, 6, 3), np.float32)
    query_index = matching.match(score, np.ones((5, 3), bool))
    for image in range(5):
        assert len(set(query_index[image])) == 3
        total = sum(score[image, n, m] for m, n in enumerate(query_index[image]))
        assert np.isclose(total, best_total(score[image]))


def test_padding_columns_change_nothing_and_stay_unmatched(rng):
    score = rng.random((1, 6, 5), np.float32)
    is_target = np.array([[True, False, True, True, False]])
    score[:, :, ~is_target[0]] = 100.0
    query_index = matching.match(score, is_target)
    alone = matching.match(score[:, :, is_target[0]], np.ones((1, 3), bool))
    np.testing.assert_array_equal(query_index[0, is_target[0]], alone[0])
    np.testing.assert_array_equal(query_index[0, ~is_target[0]], [-1, -1])


def test_permuted_targets_permute_the_matches(rng):
    score = rng.random((1, 6, 4), np.float32)
    order = np.array([2, 0, 3, 1])
    first = matching.match(score, np.ones((1, 4), bool))
    second = matching.match(score[:, :, order], np.ones((1, 4), bool))
    np.testing.assert_array_equal(second[0], first[0, order])


def test_with_more_targets_than_masks_the_best_are_matched(rng):
    score = rng.random((1, 3, 5), np.float32)
    (query_index,) = matching.match(score, np.ones((1, 5), bool))
    matched = np.flatnonzero(query_index >= 0)
    assert sorted(query_index[matched]) == [0, 1, 2]
    assert np.isclose(score[0, query_index[matched], matched].sum(), best_total(score[0]))


def test_scores_that_are_not_finite_never_raise_and_are_avoided():
    score = np.array([[[np.nan, 1.0], [0.5, np.nan], [np.inf, -np.inf]]], np.float32)
    score[0, 2] = np.nan
    np.testing.assert_array_equal(matching.match(score, np.ones((1, 2), bool)), [[1, 0]])
    nothing = np.full((1, 3, 2), np.nan, np.float32)
    (query_index,) = matching.match(nothing, np.ones((1, 2), bool))
    assert len(set(query_index)) == 2


def test_leading_axes_are_kept_and_images_without_targets_are_ordinary(rng):
    score = rng.random((2, 3, 4, 5), np.float32)
    query_index = matching.match(score, np.zeros((2, 3, 5), bool))
    np.testing.assert_array_equal(query_index, np.full((2, 3, 5), -1))


def test_costs_are_minimised_and_one_that_is_not_finite_is_the_worst(rng):
    cost = rng.normal(size=(4, 6, 3)).astype(np.float32)
    is_target = np.ones((4, 3), bool)
    np.testing.assert_array_equal(
        matching.match(cost, is_target, minimise=True), matching.match(-cost, is_target)
    )
    cost[:, 2] = np.nan
    cost[:, 4] = np.inf
    assert not np.isin(matching.match(cost, is_target, minimise=True), (2, 4)).any()
