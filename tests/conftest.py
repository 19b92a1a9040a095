"""Shared set-up: threads and compilation cache before jax starts, and the `--data` option."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from sparseinst_jax import pytest_data, runtime

# Some tests start programs with several devices, which inherit the environment.
os.environ.setdefault("PJRT_NPROC", "32")
os.environ.setdefault("NPROC", "32")
runtime.prepare()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--data` where the installation has not; then only `--data=DIR` works."""
    with contextlib.suppress(ValueError):  # it is there
        pytest_data.add_data_option(parser)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave tests marked `data` out unless `--data` is given."""
    if config.getoption("--data") is not None:
        return
    needs_data = [item for item in items if item.get_closest_marker("data")]
    if needs_data:
        config.hook.pytest_deselected(items=needs_data)
        items[:] = [item for item in items if item not in needs_data]


@pytest.fixture(scope="session")
def data_dir(request: pytest.FixtureRequest) -> Path:
    """Return the folder given with `--data`."""
    return request.config.getoption("--data")


@pytest.fixture
def rng() -> np.random.Generator:
    """Return a generator with a fixed seed."""
    return np.random.default_rng(0)


@pytest.fixture(scope="module", autouse=True)
def _compiled_functions() -> Iterator[None]:
    """Let go of what a file compiled: see `commands/train.py` on memory mappings."""
    yield
    jax.clear_caches()
