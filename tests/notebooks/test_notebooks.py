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
# Less than a reader's: every cell runs, and what is learned is not compared.
SHAPES = {"num_train=400, num_val=40": "num_train=32, num_val=16"}
LESS = {
    "1_from_photo_to_masks": {"num_train=8, num_val=40": "num_train=2, num_val=24"},
    "2_inside": SHAPES | {"(30, 100, 300)": "(1, 2)"},
    "3_change_it": SHAPES | {"NUM_STEPS = 60": "NUM_STEPS = 2", "reach=8": "reach=2"},
    "4_own_data": {
        '"data/more_shapes", 120': '"data/more_shapes", 30',
        "num_steps=120": "num_steps=2",
        "record.path, score_threshold=0.5": "record.path, score_threshold=0.0",
        "--score-threshold 0.5": "--score-threshold 0.0",
    },
    "5_fastinst": SHAPES | {"num_steps=30": "num_steps=2", "range(21)": "range(2)"},
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
    for text, less in LESS[path.stem].items():
        (cell,) = (cell for cell in notebook.cells if text in cell.source)
        cell.source = cell.source.replace(text, less)
    client = nbclient.NotebookClient(
        notebook, timeout=240, resources={"metadata": {"path": str(folder)}}
    )
    client.execute()  # raises where a cell does
