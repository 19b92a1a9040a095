"""End to end nearly all of the time goes into compiling the same small network."""

from pathlib import Path

import pytest

import sparseinst_jax
from sparseinst_jax.inference.predictor import Predictor


@pytest.fixture(scope="module", autouse=True)
def _quickly(quick_compilation: None) -> None:
    pass


@pytest.fixture(scope="session")
def stored_model(
    stored_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Predictor, Path]:
    """Return a trained network of a few layers, and the ONNX file that the package writes of it."""
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    predictor = sparseinst_jax.load(stored_run)
    predictor.export(path, verifies=False)
    return predictor, path
