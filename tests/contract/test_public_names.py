"""What the package gives under its own name and those of its rooms, and what it leaves alone."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sparseinst_jax

ROOT = Path(__file__).parents[2]
ROOMS = {"configs", "data", "losses", "matching", "models", "training", "weights"}
NAMES = {"Activations", "Prediction", "Predictor", "TrainResult", "build_model", "build_objective"}
NAMES |= {"evaluate", "fit", "load", "load_coco", "load_config", "plot_activations"}
NAMES |= {"prepare_process", "train"}


def test_the_public_names_are_these():
    assert set(sparseinst_jax.__all__) == ROOMS | NAMES
    assert ROOMS | NAMES <= set(dir(sparseinst_jax))


@pytest.mark.parametrize("room", ["sparseinst_jax", *sorted(ROOMS - {"configs"})])
def test_every_public_name_exists_is_documented_and_is_where_it_says(room):
    module = importlib.import_module(room if room == "sparseinst_jax" else f"sparseinst_jax.{room}")
    assert inspect.getdoc(module)
    names = getattr(module, "__all__", None) or [
        name for name, value in vars(module).items() if inspect.isfunction(value) and name[0] != "_"
    ]
    assert names
    for name in names:
        value = getattr(module, name)
        assert inspect.getdoc(value) or name == "configs", f"{room}.{name}"
        if inspect.isfunction(value) or inspect.isclass(value):
            assert value.__module__.startswith("sparseinst_jax.")


DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("notebooks/*.ipynb")]


@pytest.mark.parametrize("path", sorted(DOCUMENTS), ids=lambda path: path.name)
def test_every_name_of_the_package_in_a_document_exists(path):
    names = set(re.findall(r"\bsparseinst_jax((?:\.[A-Za-z]\w*)+)", path.read_text()))
    for name in sorted(names):
        value = sparseinst_jax
        for word in name.split(".")[1:]:
            try:  # a module that nobody has imported is no attribute yet
                value = importlib.import_module(f"{value.__name__}.{word}")
            except (ImportError, AttributeError):
                value = getattr(value, word, None)
            assert value is not None, f"sparseinst_jax{name}"


def test_another_name_is_refused():
    with pytest.raises(AttributeError, match="No sparseinst_jax attribute"):
        sparseinst_jax.train_everything  # noqa: B018


# Records every call into the C library; the listeners that JAX has once it and Orbax are there.
UNTOUCHED = """
import ctypes, gc, json, os, sys
import jax, orbax.checkpoint
from jax._src import monitoring
calls, real = [], ctypes.CDLL
class CDLL(real):
    def __getattr__(self, name):
        calls.append(name)
        return real.__getattr__(self, name)
ctypes.CDLL = CDLL
def state():
    listeners = [value for name, value in vars(monitoring).items() if name.endswith("_listeners")]
    return [dict(os.environ), sys.path, str(listeners), calls.count("mallopt"),
            calls.count("malloc_trim"), jax.config.jax_compilation_cache_dir, gc.get_threshold()]
before = json.dumps(state())
import sparseinst_jax
for name in sparseinst_jax.__all__:
    getattr(sparseinst_jax, name)
predictor = sparseinst_jax.load(sys.argv[1])
predictor.predict_batch([__import__("numpy").zeros((64, 96, 3), "uint8")])
assert json.dumps(state()) == before, (before, state())
sparseinst_jax.prepare_process()
changed = json.dumps(state())
assert changed != before and calls.count("mallopt") == 1
sparseinst_jax.prepare_process()
print("as before")
"""


def test_importing_loading_and_predicting_leave_the_process_as_it_was(stored_run):
    command = [sys.executable, "-c", UNTOUCHED, str(stored_run)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == "as before\n", run.stderr[-2000:]
