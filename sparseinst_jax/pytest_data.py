"""The `--data DIR` option of this repository's tests, registered with pytest by the installation.

A `conftest.py` would come too late: until the option is known, pytest takes DIR for a folder of
tests and looks for its configuration there. Outside a checkout of this repository nothing is added.
"""

from pathlib import Path

import pytest


def add_data_option(parser: pytest.Parser) -> None:
    """Add `--data DIR`, the folder of real data sets that tests marked `data` need."""
    parser.addoption("--data", type=Path, default=None, help="folder of real data sets")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option where pytest is started in a checkout of this repository."""
    if Path("tests/parity/golden_weights.py").is_file():
        add_data_option(parser)
