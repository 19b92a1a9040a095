"""What is imported when, and that nothing but work starts a device."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Each takes a fifth of a second or more to import; no picture needs them.
HEAVY = ("scipy.optimize", "orbax", "grain", "tensorflow_datasets", "matplotlib", "pandas")
# With `--help`; `build-tfds` alone may import what it is about.
COMMANDS = ("train", "eval", "predict", "check-data", "debug-batch", "import-data", "convert")
COMMANDS = (*COMMANDS, "benchmark", "summary", "build-tfds", "download", "doctor")


def imported(code: str) -> set[str]:
    """Run code in a fresh process: what it imports; `devices` is among them if it starts one."""
    tail = (
        "\nimport sys\n"
        "bridge = sys.modules.get('jax._src.xla_bridge')\n"
        "print(*sys.modules, *['devices'] * bool(bridge and bridge.backends_are_initialized()))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code + tail], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(run.stdout.splitlines()[-1].split())


def test_importing_the_package_imports_neither_jax_nor_numpy():
    assert not {"jax", "numpy", "flax", "devices", *HEAVY} & imported("import sparseinst_jax")


def test_what_predicts_is_imported_without_what_trains_and_starts_no_device():
    names = imported(
        "import sparseinst_jax.cli.predict, sparseinst_jax.cli.eval\n"
        "sparseinst_jax.Predictor, sparseinst_jax.load"
    )
    assert "jax" in names and not {"devices", *HEAVY} & names


@pytest.mark.parametrize("argument", ["--help", "zoo"])
def test_the_list_of_commands_and_of_models_needs_no_jax(argument):
    names = imported(f"from sparseinst_jax import cli; cli.main([{argument!r}])")
    assert not {"jax", "flax", "devices", *HEAVY} & names


def test_the_help_of_every_command_starts_no_device():
    code = (
        "import contextlib, sys\nfrom sparseinst_jax import cli\n"
        f"for name in {COMMANDS!r}:\n"
        "    assert 'tensorflow_datasets' not in sys.modules, name\n"
        "    with contextlib.suppress(SystemExit): cli.main([name, '--help'])\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
        "import jax\njax.local_devices()\n"
    )
    names = imported(code)
    modules = {f"sparseinst_jax.cli.{name.replace('-', '_')}" for name in COMMANDS}
    assert modules <= names and not {"torch", "tensorflow", "matplotlib"} & names
    assert "devices" in names  # now there is one, and it is seen
