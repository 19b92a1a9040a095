"""What the site has beside the pages of docs/: notebooks, the reference, files of the repository.

A link to a file outside of docs/ leads to a page that shows it: links are the same on the site and
in a checkout.
"""

import base64
import importlib
import inspect
import posixpath
import re
from pathlib import Path
from types import ModuleType

import nbformat
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
ROOMS = ("data", "models", "losses", "matching", "training", "weights", "configs")
ALWAYS = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "configs/base.py")
NAMES = re.compile(
    r"<!-- names of (\S+) -->.*", re.DOTALL
)  # of a page of the reference, to its end
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")
MOST_LINES = 12  # of an output that is shown at once

_homes: dict[str, Path] = {}  # address of a page -> the file that its links lead from


def on_files(files, *, config):
    """Add the pages that are made."""
    made: dict[str, str | bytes] = {}
    _homes.clear()
    for file in files.documentation_pages():
        _homes[file.src_uri] = ROOT / "docs" / file.src_uri
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        made |= _notebook(path)
    made["tutorials/index.md"] = (ROOT / "notebooks/README.md").read_text()
    _homes["tutorials/index.md"] = ROOT / "notebooks/README.md"
    waiting = [ROOT / name for name in ALWAYS]
    for uri, home in list(_homes.items()):
        text = made.get(uri)
        waiting += _outside(text if isinstance(text, str) else home.read_text(), home)
    while waiting:
        path = waiting.pop()
        uri = _address(path)
        if uri not in _homes:
            _homes[uri], text = path, path.read_text()
            made[uri] = text if path.suffix == ".md" else _source(path, text)
            waiting += _outside(text, path) if path.suffix == ".md" else []
    for uri, content in made.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown, *, page, config, files):
    """Lead links to the pages of their files."""
    home = _homes.get(page.file.src_uri)
    if home is None or home.suffix == ".py":
        return markdown

    def moved(link: re.Match) -> str:
        target = (home.parent / link[1]).resolve()
        if not target.is_file():
            return link[0]  # for MkDocs to refuse
        start = posixpath.dirname(page.file.src_uri)
        return f"]({posixpath.relpath(_address(target), start)}{link[2] or ''})"

    return NAMES.sub(_names, LINK.sub(moved, markdown))


def _outside(text: str, home: Path) -> list[Path]:
    """The files of the repository that a page leads to and that have no page yet."""
    targets = [(home.parent / link[1]).resolve() for link in LINK.finditer(text)]
    return [
        path
        for path in targets
        if path.is_file() and path.is_relative_to(ROOT) and _address(path).startswith("files/")
    ]


def _address(path: Path) -> str:
    """The page of a file."""
    path = path.resolve().relative_to(ROOT)
    if path.parts[0] == "docs":
        return posixpath.join(*path.parts[1:])
    if path.parts[0] == "notebooks" and path.suffix in (".ipynb", ".md"):
        name = "index" if path.suffix == ".md" else path.stem
        return f"tutorials/{name}.md"
    return f"files/{path.as_posix()}" + ("" if path.suffix == ".md" else ".md")


def _source(path: Path, text: str) -> str:
    kind = {".py": "python", ".sh": "sh", ".toml": "toml"}.get(path.suffix, "text")
    return f"# {path.relative_to(ROOT)}\n\n````{kind}\n{text}````\n"


def _notebook(path: Path) -> dict[str, str | bytes]:
    """A page and its pictures."""
    uri, parts, made = _address(path), [], {}
    _homes[uri] = path
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for output in cell.outputs:
            data = output.get("data", {})
            kind = next((kind for kind in ("png", "jpeg") if f"image/{kind}" in data), None)
            if kind is not None:
                name = f"tutorials/{path.stem}_{len(made)}.{kind}"
                made[name] = base64.b64decode(data[f"image/{kind}"])
                parts.append(f"![output]({posixpath.basename(name)})")
            else:
                text = output.get("text") or data.get("text/plain", "")
                if text.strip():
                    parts.append(_text(text))
    return {uri: "\n\n".join(parts), **made}


def _text(text: str) -> str:
    text = text.rstrip("\n")
    block = f"```text\n{text}\n```"
    if text.count("\n") < MOST_LINES:
        return block
    return '??? note "output"\n\n' + "\n".join(f"    {line}" for line in block.splitlines())


def _names(place: re.Match) -> str:
    """Every public name of a room, each with its docstring."""
    room = importlib.import_module(place[1])
    public = getattr(room, "__all__", None)
    if public is None:  # a module of functions
        return f"::: {place[1]}\n    options:\n      heading_level: 2"
    chosen = [name for name in public if place[1] != "sparseinst_jax" or name not in ROOMS]
    parts = [f"## {name}\n\n::: {_place(room, name)}" for name in chosen]
    return "\n\n".join(parts)


def _place(room: ModuleType, name: str) -> str:
    """Where a public name is defined: its docstring is read there."""
    value = getattr(room, name)
    if inspect.ismodule(value):
        return value.__name__
    if inspect.isfunction(value) or inspect.isclass(value):
        return f"{value.__module__}.{value.__qualname__}"
    stub = Path(str(room.__file__)).with_suffix(".pyi").read_text()  # a dict or a type
    line = re.search(rf"^from (\S+) import (\S+) as {name}$", stub, re.MULTILINE)
    assert line is not None, name
    return f"{room.__name__}{line[1]}.{line[2]}"
