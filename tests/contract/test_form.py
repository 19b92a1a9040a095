"""Docstrings, sizes, and what must not be written into the repository."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE_LINES, FUNCTION_LINES = 400, 60
# Size is a smell, not a law: what is longer says here why.
LONG: dict[str, str] = {
    "sparseinst_jax/data/images.py": "which files may be opened stands where they are opened",
    "sparseinst_jax/checkpoints/store.py": "the one module that knows Orbax",
    "sparseinst_jax/data/_index/reader.py": "every rule of a COCO json, in the order of reading",
    "sparseinst_jax/data/records.py": "a data set: its objects, images, columns seen as records",
    "sparseinst_jax/models/fastinst/model.py": "the network, to be read beside the paper",
    "sparseinst_jax/models/sparseinst/model.py": "the same",
    "sparseinst_jax/data/plan.py": "one function of seed and step, its draws in their order",
    "sparseinst_jax/data/importers/yolo.py:read_yolo": "a set in the order of reading",
    "sparseinst_jax/data/importers/labelme.py:read_labelme": "read, then what is said of it",
    "sparseinst_jax/setup/train.py:train": "a run in order: what is refused, said, made and left",
}

SOURCES = [*sorted((ROOT / "sparseinst_jax").rglob("*.py")), *sorted(ROOT.glob("*.py"))]
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def _definitions(path: Path):
    """Qualified name and node of every definition at module and class level."""

    def visit(body, prefix):
        for node in body:
            if isinstance(node, DEFINITIONS):
                yield f"{prefix}{node.name}", node
                if isinstance(node, ast.ClassDef):
                    yield from visit(node.body, f"{prefix}{node.name}.")

    yield from visit(ast.parse(path.read_text()).body, f"{path.relative_to(ROOT)}:")


def _is_public(name: str) -> bool:
    return not any(part.startswith("_") for part in name.split(":")[1].split("."))


def test_public_functions_and_classes_have_docstrings():
    missing = [
        name
        for path in SOURCES
        for name, node in _definitions(path)
        if _is_public(name) and not ast.get_docstring(node)
    ]
    assert missing == []


def test_every_module_says_what_it_holds():
    assert [
        str(path.relative_to(ROOT))
        for path in SOURCES
        if path.stat().st_size and not ast.get_docstring(ast.parse(path.read_text()))
    ] == []


def test_long_files_and_functions_have_a_reason():
    files = [
        (str(path.relative_to(ROOT)), len(path.read_text().splitlines()), FILE_LINES)
        for path in SOURCES
    ]
    functions = [
        (name, node.end_lineno - node.lineno + 1, FUNCTION_LINES)
        for path in SOURCES
        for name, node in _definitions(path)
        if not isinstance(node, ast.ClassDef)
    ]
    too_long = {name: size for name, size, most in files + functions if size > most}
    assert {name: size for name, size in too_long.items() if name not in LONG} == {}
    assert LONG.keys() <= too_long.keys(), "a reason for something that is no longer long"


def _tracked_text() -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listing.returncode:
        pytest.skip("not a git clone")
    binary = (".npz", ".xz", ".png", ".jpg", ".json", ".safetensors")
    paths = [ROOT / name for name in listing.stdout.split("\0") if name]
    return [path for path in paths if path.suffix not in binary and path.is_file()]


def test_no_private_path_and_no_package_registry_is_named():
    # Spelt in pieces, so that this file does not hold what it looks for.
    forbidden = [
        r"/(home|Users)/\w+/",
        "/ro" + r"ot\b",
        "/wo" + r"rk\b",
        r"/tm" + r"p/",
        "py" + r"pi\.org|python" + "hosted",
        "registry" + r"\.npmjs",
        "index" + "-url",
    ]
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in _tracked_text()
        for match in re.finditer("|".join(forbidden), path.read_text(errors="replace"))
    ]
    assert found == []


# Modules that run what a file asks for. Nothing needs them: weights.reading.pickles is an
# interpreter of its own, for the operations that `pickletools` finds and does not run, and what a
# process hands to its workers, Grain pickles.
UNPICKLERS = {"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "torch"}
UNPICKLERS |= {"imp", "code", "codeop", "xml"}  # xml: entities without end
# PyYAML's other loaders make objects of any class.
SAFE_YAML = {"yaml.safe_load(text)", "yaml.compose(text, Loader=yaml.SafeLoader)"}
YAML_NAMES = {"safe_load", "compose", "SafeLoader", "YAMLError"}
YAML_NAMES |= {"MappingNode", "ScalarNode", "SequenceNode"}
RUNNERS = {"eval", "exec", "compile", "__import__", "execfile"}
RUNNERS |= {"os.system", "os.popen", "os.execv", "os.execve", "os.spawnv", "pty.spawn"}
RUNNERS |= {"runpy.run_path", "runpy.run_module", "importlib.import_module", "tempfile.mktemp"}
# Each with what it runs; SECURITY.md tells it.
MAY_RUN = {
    ("config.py", "runpy.run_path"): "the configuration file that the user names",
    ("__init__.py", "importlib.import_module"): "a command of this package, out of a list",
}


def test_nothing_reads_a_pickle_or_runs_a_text():
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {fault}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if (fault := _runs_foreign_code(node)) and (path.name, fault) not in MAY_RUN
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import Unpickler",
        "import torch.serialization",
        "eval(text)",
        "exec(text)",
        "builtins.exec(text)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "numpy.load(path, allow_pickle=flag)",
        "np.load(path, None, True)",
        "np.lib.format.read_array(file)",
        "compile(text, 'x', 'exec')",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
        "subprocess.Popen(text, shell=flag)",
        "subprocess.getoutput(text)",
        "from yaml import load",
        "import yaml as y",
        "import yaml.loader as y",
        "yaml.load(text)",
        "read = yaml.load",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "yaml.load(text, yaml.UnsafeLoader)",
        "yaml.unsafe_load(text)",
        "yaml.full_load(text)",
        "yaml.load_all(text)",
        "yaml.safe_load_all(text)",
        "yaml.compose(text)",
        "yaml.compose(text, Loader=yaml.Loader)",
        "tempfile.mktemp()",
        "importlib.import_module(name)",
        "runpy.run_path(path)",
    ],
)
def test_the_check_of_foreign_code_sees_it(source):
    assert any(_runs_foreign_code(node) for node in ast.walk(ast.parse(source)))


def _runs_foreign_code(node: ast.AST) -> str | None:
    """What is wrong with a statement or call, or None."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [alias.name for alias in node.names]
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else names
        wrong = [name for name in names if name.split(".")[0] in UNPICKLERS]
        if isinstance(node, ast.ImportFrom) or any(alias.asname for alias in node.names):
            wrong += [name for name in names if name.split(".")[0] == "yaml"]
        return f"imports {wrong[0]}" if wrong else None
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "yaml":
        return None if node.attr in YAML_NAMES else ast.unparse(node)
    if not isinstance(node, ast.Call):
        return None
    called = ast.unparse(node.func)
    called = called.removeprefix("builtins.")
    if called.split(".")[0] == "yaml":
        return None if ast.unparse(node) in SAFE_YAML else called
    if called in RUNNERS:
        return called
    flags = {word.arg: ast.unparse(word.value) for word in node.keywords}
    if called.split(".")[-1] in ("load", "read_array") and called.split(".")[0] in ("np", "numpy"):
        return called if flags.get("allow_pickle") != "False" else None
    if called.split(".")[0] == "subprocess":
        is_text = called.split(".")[-1] in ("getoutput", "getstatusoutput")
        return called if is_text or flags.get("shell", "False") != "False" else None
    return None


@pytest.mark.parametrize(
    "source",
    [
        "re.compile(text)",
        "model.eval()",
        "np.load(path, allow_pickle=False)",
        "subprocess.run([program], check=True)",
        "tempfile.mkdtemp()",
        "import yaml",
        "yaml.safe_load(text)",
        "yaml.compose(text, Loader=yaml.SafeLoader)",
    ],
)
def test_the_check_of_foreign_code_passes_what_is_harmless(source):
    assert not any(_runs_foreign_code(node) for node in ast.walk(ast.parse(source)))


def test_the_changelog_has_its_headings():
    text = (ROOT / "CHANGELOG.md").read_text()
    for heading in ("# Changelog", "## [Unreleased]", "### Added", "### Numerics"):
        assert heading in text, heading


def _anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]
FILE_NAME = re.compile(r"\b\w[\w.-]*/[\w./-]+\.(?:py|md)\b")
NOT_OURS = {"tools/test_net.py"}  # the original's


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_files_named_in_the_documents_exist(path):
    text = path.read_text()
    files = set(FILE_NAME.findall(re.sub(r"https?:\S+", "", text)))
    homes = ROOT, ROOT / "sparseinst_jax", path.parent
    absent = {name for name in files if not any((home / name).exists() for home in homes)}
    assert absent - NOT_OURS == set()
    for name, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", text):
        page = path.parent / name if name else path
        assert page.exists(), name
        assert not anchor or anchor in _anchors(page.read_text()), f"{name}#{anchor}"
