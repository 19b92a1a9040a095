"""End to end nearly all of the time goes into compiling the same small network."""

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

import sparseinst_jax
from sparseinst_jax.inference.predictor import Predictor
from sparseinst_jax.models.families import BACKBONES, FAMILIES
from sparseinst_jax.models.trees import functional
from sparseinst_jax.setup import builders
from sparseinst_jax.setup.loading import build_predictor
from tests import tiny_fastinst


@pytest.fixture(scope="module", autouse=True)
def _quickly(quick_compilation: None) -> None:
    pass


@pytest.fixture(scope="module", autouse=True)
def _families() -> Iterator[None]:
    """What a configuration of a test adds is known in its file alone."""
    with mock.patch.dict(BACKBONES), mock.patch.dict(FAMILIES):
        yield


@pytest.fixture(scope="session")
def stored_model(
    stored_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Predictor, Path]:
    """Return a trained network of a few layers, and the ONNX file that the package writes of it."""
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    predictor = sparseinst_jax.load(stored_run)
    predictor.export(path, verifies=False)
    return predictor, path


@pytest.fixture(scope="session")
def fastinst_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the ONNX file of a FastInst with random weights; its second class is left out."""
    path = tmp_path_factory.mktemp("fastinst") / "model.onnx"
    config = tiny_fastinst.get_config()
    network = functional(builders.build_model(config.model, num_classes=3, seed=0))
    build_predictor(config, *network, ("a", "b", "c"), (1, None, 3)).export(path, verifies=False)
    return path
