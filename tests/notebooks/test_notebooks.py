"""The notebooks run from top to bottom, with public names alone, and are stored as they run."""

from __future__ import annotations

import ast
import shutil
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

import sparseinst_jax

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MOST_BYTES = 1_000_000
# Fewer steps than a reader takes: every cell runs, and what is learned is not compared.
FEWER_STEPS = {
    "2_inside": ("(30, 100, 300)", "(10, 20, 30)"),
    "3_change_it": ("NUM_STEPS = 60", "NUM_STEPS = 12"),
    "5_fastinst": ("num_steps=30", "num_steps=10"),
}
# What a reader has who installed the extra `notebooks`: nothing of it is ours.
OTHERS = {"IPython", "PIL", "flax", "jax", "matplotlib", "numpy", "optax"} | sys.stdlib_module_names

# The kernels compile quickly too: pictures and figures are not compared.
pytestmark = pytest.mark.usefixtures("quick_compilation")
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def _code(path: Path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    lines = [line for cell in cells if cell.cell_type == "code" for line in cell.source.split("\n")]
    return "\n".join("pass" if line.lstrip().startswith("!") else line for line in lines)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A copy of the notebooks' folder: what they draw and train is shared by them."""
    copy = tmp_path_factory.mktemp("copy") / "notebooks"
    return Path(shutil.copytree(FOLDER, copy, ignore=_made))


def _made(_: str, names: list[str]) -> set[str]:
    return {"data", "runs"} & set(names)


def test_there_are_five():
    assert [path.name[0] for path in NOTEBOOKS] == list("12345")


@by_name
def test_a_notebook_uses_public_names_alone(path):
    tree = ast.parse(_code(path))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names = names if isinstance(node, ast.Import) else [node.module or ""]
            assert {name.split(".")[0] for name in names} <= OTHERS | {"sparseinst_jax"}, names
            assert [name for name in names if name.startswith("sparseinst_jax.")] == []
        if isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_") or node.attr in ("_replace", "_asdict", "__init__")
            words = ast.unparse(node).split(".")
            if words[0] == "sij" and all(word.isidentifier() for word in words):
                _refuse_private(words[1:])


def _refuse_private(words: list[str]) -> None:
    """Each word is a public name of the one before, down to the first that is no module of ours."""
    value = sparseinst_jax
    for word in words:
        public = getattr(value, "__all__", None)
        assert public is None or word in public, f"{value.__name__}.{word}"
        value = getattr(value, word)
        if not getattr(value, "__name__", "").startswith("sparseinst_jax"):
            return


@by_name
def test_a_notebook_is_stored_with_its_outputs_and_small(path):
    assert path.stat().st_size <= MOST_BYTES
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert kinds & {"image/png", "image/jpeg"}
    assert [output for output in outputs if output.output_type == "error"] == []


@by_name
def test_a_notebook_runs(path, folder):
    notebook = nbformat.read(folder / path.name, as_version=4)
    if path.stem in FEWER_STEPS:
        steps, fewer = FEWER_STEPS[path.stem]
        (cell,) = (cell for cell in notebook.cells if steps in cell.source)
        cell.source = cell.source.replace(steps, fewer)
    client = nbclient.NotebookClient(
        notebook, timeout=240, resources={"metadata": {"path": str(folder)}}
    )
    client.execute()  # raises where a cell does
