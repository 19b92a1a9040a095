"""The short names of places in the docs lead there, and messages use no others."""

from __future__ import annotations

import re
from pathlib import Path

from sparseinst_jax.runtime.pages import PAGES

ROOT = Path(__file__).parents[2]


def _anchors(path: Path) -> set[str]:
    """As GitHub and MkDocs name headings: lower case, without signs, spaces as dashes."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in headings}


def test_every_name_leads_to_a_heading_that_exists():
    for name, place in PAGES.items():
        file, _, heading = place.partition("#")
        assert (ROOT / "docs" / file).is_file(), name
        assert not heading or heading in _anchors(ROOT / "docs" / file), name


def test_every_name_is_used_and_every_used_name_is_known():
    sources = [path for path in (ROOT / "sparseinst_jax").rglob("*.py") if path.name != "pages.py"]
    text = "\n".join(path.read_text() for path in sources)
    assert set(re.findall(r'\bpage\("([^"]+)"\)', text)) <= PAGES.keys()
    assert [name for name in PAGES if not re.search(f"[\"']{name}[\"']", text)] == []
