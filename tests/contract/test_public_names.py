"""What the package gives under its own name."""

from __future__ import annotations

import pytest

import sparseinst_jax
from sparseinst_jax.inference.predictor import Predictor
from sparseinst_jax.setup.loading import load


def test_the_package_gives_its_public_names_on_demand():
    assert sparseinst_jax.load is load
    assert sparseinst_jax.Predictor is Predictor
    assert {"load", "Predictor", "Prediction"} <= set(dir(sparseinst_jax))


def test_another_name_is_refused():
    with pytest.raises(AttributeError, match="no attribute 'train_everything'"):
        sparseinst_jax.train_everything  # noqa: B018
