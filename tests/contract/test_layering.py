"""Imports go strictly down; families do not know each other; importing starts no backend."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "sparseinst_jax"

# From the top: a module may import from rows below its own, and from its own subpackage.
LAYERS = (
    ("train", "eval", "predict", "__main__"),
    ("cli",),
    ("__init__",),
    ("setup",),
    ("training", "evaluation"),
    ("inference", "weights"),
    ("export",),
    ("runner",),
    ("checkpoints", "drawing"),
    ("models",),
    ("losses", "matching"),
    ("data",),
    ("runtime", "configs"),
)
FAMILIES = ("sparseinst", "fastinst")
RANK = {name: rank for rank, row in enumerate(LAYERS) for name in row}


def _sources() -> list[Path]:
    return [*sorted((ROOT / PACKAGE).rglob("*.py")), *sorted(ROOT.glob("*.py"))]


def _module(path: Path) -> str:
    """Row name of a file: its first component inside the package, or a script's name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == PACKAGE else parts[0]


def _imported(path: Path) -> set[str]:
    """Row names of the package's modules that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{PACKAGE}.relative.import"]  # fails below: imports are absolute
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == PACKAGE and len(parts) > 1:
                found.add(parts[1])
    return found


def test_every_module_has_a_place_in_the_layers():
    assert {_module(path) for path in _sources()} <= RANK.keys()


def test_the_wheel_holds_every_folder_of_the_package_and_the_configurations():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / PACKAGE).rglob("*.py")}
    names = [".".join(folder.parts) for folder in folders]
    assert sorted([*names, "sparseinst_jax.configs"]) == sorted(listed)


def test_imports_go_strictly_down():
    wrong = [
        f"{path.relative_to(ROOT)} (row {RANK[_module(path)]}) imports {name} (row {RANK[name]})"
        for path in _sources()
        for name in sorted(_imported(path) & RANK.keys())
        if RANK[name] <= RANK[_module(path)] and name != _module(path)
    ]
    assert wrong == []


def test_what_is_imported_from_the_package_exists():
    modules = {_module(path) for path in _sources()}
    public = {"load", "Predictor", "Prediction"}  # names that the package itself gives
    wrong = [
        (str(path.relative_to(ROOT)), name)
        for path in _sources()
        for name in _imported(path) - modules - public
    ]
    assert wrong == []


def test_only_the_entry_layer_names_a_model_family():
    wrong = [
        str(path.relative_to(ROOT))
        for path in _sources()
        if _module(path) in ("training", "evaluation", "data", "weights", *FAMILIES)
        and _imported(path) & (set(FAMILIES) - {_module(path)})
    ]
    assert wrong == []


def test_training_knows_no_model():
    sources = [path for path in _sources() if _module(path) == "training"]
    assert [path.name for path in sources if "models" in _imported(path)] == []


# Other implementations, whose rules and weights have a door each: the rest knows no product.
PRODUCTS = re.compile("paddle|mmdet|detectron", re.IGNORECASE)
DOORS = ("data/ecosystems/", "weights/", "configs/")


def _named_products(text: str) -> list[str]:
    """Lines that name a product, but for paragraphs that give credit: `Source: ...`."""
    found, is_source = [], False
    for line in text.splitlines():
        is_source = "Source:" in line or (is_source and bool(line.strip('"# ')))
        if PRODUCTS.search(line) and not is_source:
            found.append(line.strip())
    return found


def test_only_the_doors_to_other_implementations_name_them():
    found = {
        str(path.relative_to(ROOT)): lines
        for path in sorted((ROOT / PACKAGE).rglob("*.py"))
        if not str(path.relative_to(ROOT / PACKAGE)).startswith(DOORS)
        and (lines := _named_products(path.read_text()))
    }
    assert found == {}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ('"""A.\n\nSource: detectron2\'s\nResizeScale of mmdet.\n"""\n', 0),
        ('"""A.\n\nSource: B.\n\nAs Detectron2 does.\n"""\n', 1),
        ('"""A.\n\nSource: B.\n"""\nrule = "paddledetection"\n', 1),
    ],
)
def test_credit_is_told_from_knowledge(text, number):
    assert len(_named_products(text)) == number


def test_the_config_object_stays_in_the_entry_layer():
    entry = RANK["setup"]
    wrong = [
        str(path.relative_to(ROOT))
        for path in _sources()
        if RANK[_module(path)] > entry and "ml_collections" in path.read_text()
    ]
    assert wrong == []


def test_importing_every_module_starts_no_jax_backend():
    names = [
        str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
        for path in sorted((ROOT / PACKAGE).rglob("*.py"))
    ]
    code = (
        f"import importlib\nfor name in {names!r}: importlib.import_module(name)\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized(), 'an import started a backend'\n"
        "import sys\n"
        "assert not {'torch', 'tensorflow'} & sys.modules.keys(), 'an import needs torch or TF'\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
