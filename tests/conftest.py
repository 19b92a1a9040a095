"""Shared set-up: compilation cache and threads before jax starts, and the `--data` option."""

from __future__ import annotations

import functools
import gc
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax._src import compilation_cache, compiler
from jax._src.interpreters import mlir

from sparseinst_jax.runtime import process

# This process has one device and a thread for each core, as a user's has: with 32 a step takes a
# fifth more processor time. Programs that tests start choose for themselves.
_CHOSEN = {"PJRT_NPROC", "NPROC"} - os.environ.keys()
process.prepare_process()
jax.devices()  # reads the number
for _name in _CHOSEN:
    del os.environ[_name]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--data=DIR`; after a space pytest takes DIR for tests until it knows the option."""
    parser.addoption("--data", type=Path, default=None, help="folder of real data sets")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave tests marked `data` out unless `--data` is given."""
    if config.getoption("--data") is not None:
        return
    needs_data = [item for item in items if item.get_closest_marker("data")]
    if needs_data:
        config.hook.pytest_deselected(items=needs_data)
        items[:] = [item for item in items if item not in needs_data]


def pytest_collection_finish() -> None:
    """Let garbage collection pass over what was collected."""
    gc.freeze()


@pytest.fixture(scope="session")
def data_dir(request: pytest.FixtureRequest) -> Path:
    """Return the folder given with `--data`."""
    return request.config.getoption("--data")


@pytest.fixture
def rng() -> np.random.Generator:
    """Return a generator with a fixed seed."""
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """Compile without LLVM's optimisation, also in processes that a test starts.

    For files in which compiling takes most of the time and whose properties do not depend on it. A
    file that compares with recorded numbers, or bits of one program with those of another, compiles
    as users do. Three quarters of what remains are the emitters of fusions, which XLA can do
    without until JAX 0.11: later it does not know the flag.
    """
    option, emitters = "jax_disable_most_optimizations", "xla_cpu_use_fusion_emitters"
    options = compiler.get_compile_options
    options(1, 1)  # XLA reads its flags once: those of this process stay

    def without_emitters(*args: Any, **kwargs: Any) -> Any:
        result = options(*args, **kwargs)
        result.env_option_overrides = [*result.env_option_overrides, (emitters, False)]
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(option.upper(), "1")
        if jax.__version_info__ < (0, 11):
            patch.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} --{emitters}=false")
            patch.setattr(compiler, "get_compile_options", without_emitters)
        before = jax.config.read(option)
        jax.config.update(option, True)
        yield
        jax.config.update(option, before)


@pytest.fixture(scope="module", autouse=True)
def _compiled_functions() -> Iterator[None]:
    """Let go of what a file compiled: see `setup/train.py` on memory mappings.

    Until then a program that is compiled again, as by each run of the same small network, is read
    once from the compilation cache: reading one takes up to 3 s. And all are lowered in one MLIR
    context: making one for each of hundreds of small programs takes a sixth of the time of a file.
    """
    read, loaded = compilation_cache.get_executable_and_time, {}

    def read_once(key: str, *others: Any) -> Any:
        callbacks = others[3:]  # of JAX 0.11 and later: a part of the program that no key tells
        if key in loaded and not any(callbacks):
            return loaded[key]
        found = read(key, *others)
        if found[0] is not None:
            loaded[key] = found
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compilation_cache, "get_executable_and_time", read_once)
        patch.setattr(mlir, "make_ir_context", functools.cache(mlir.make_ir_context))
        yield
    loaded.clear()
    jax.clear_caches()


@pytest.fixture(scope="session")
def stored_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of 400 steps as version 0.1.0 wrote it, before its modules were moved.

    `configs/tiny.py` with few channels, a larger learning rate and an average of the weights. It
    was trained and is evaluated on `data/train.json` beside it: four images, in the paths of its
    configuration relative to the folder that holds both.
    """
    folder = tmp_path_factory.mktemp("stored")
    with tarfile.open(Path(__file__).parent / "stored_run.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "run"
