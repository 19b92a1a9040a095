"""End to end nearly all of the time goes into compiling the same small network."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def _quickly(quick_compilation: None) -> None:
    pass
