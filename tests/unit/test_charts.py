"""Charts and the letters in them."""

import numpy as np
import pytest

from sparseinst_jax import charts


@pytest.mark.parametrize(
    "low, high, expected",
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 270, [0, 100, 200]), (3, 3, [3])],
)
def test_ticks_are_round_numbers(low, high, expected):
    np.testing.assert_allclose(charts.nice_ticks(low, high), expected)
