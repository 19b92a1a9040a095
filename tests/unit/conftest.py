"""Fixtures that several files share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sparseinst_jax.weights.reading import WeightsFile, read_weights_file
from sparseinst_jax.weights.reading.stored_arrays import WeightsFileError


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., WeightsFile]:
    """Read the bytes of a weights file."""

    def read(content: bytes, name: str = "weights.bin", **options: bool) -> WeightsFile:
        path = tmp_path / name
        path.write_bytes(content)
        return read_weights_file(path, **options)

    return read


@pytest.fixture
def refusal(read: Callable[..., WeightsFile]) -> Callable[[bytes], str]:
    """The message that refuses the bytes of a weights file; it names the file."""

    def refusal(content: bytes) -> str:
        with pytest.raises(WeightsFileError) as caught:
            read(content)
        assert "weights.bin" in str(caught.value)
        return str(caught.value)

    return refusal
