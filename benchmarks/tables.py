"""Write the tables of docs/performance.md from the files in benchmarks/results.

    python benchmarks/tables.py            write
    python benchmarks/tables.py --check    exit code 1 if the document is not what the files say

A table stands between two marks, each a line of its own; what is between them is replaced:

    <!-- table: cpu_targets.json -->
    <!-- end -->

Known are the files of compare_torch.py and of gpu.py (rows, .jsonl), recognised by their content.
A mark without its file and a file without its mark are faults.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import rows  # noqa: E402

from sparseinst_jax.runtime.files import replace_file  # noqa: E402

MARK = re.compile(r"^<!-- table: (\S+) -->\n(.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL)
END = "<!-- end -->"
Report = Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the document; returns 1 where it is stale."""
    parser = argparse.ArgumentParser(description=__doc__)
    add, document = parser.add_argument, HERE.parent / "docs" / "performance.md"
    add("--results", metavar="FOLDER", type=Path, default=HERE / "results")
    add("--document", metavar="FILE", type=Path, default=document)
    add("--check", action="store_true", help="write nothing")
    given = parser.parse_args(argv)
    before = given.document.read_text()
    after = filled(before, given.results)
    if not given.check:
        replace_file(given.document, after.encode())
    elif after != before:
        marks = zip(MARK.finditer(before), MARK.finditer(after), strict=True)
        stale = ", ".join(old[1] for old, new in marks if old[2] != new[2])
        cure = "Run python benchmarks/tables.py"
        print(f"{given.document.name} is not what these say: {stale}. {cure}", file=sys.stderr)
        return 1
    return 0


def filled(document: str, results: Path) -> str:
    """Return the document with its tables made again.

    Raises:
      FileNotFoundError: a mark names a file that is not there.
      ValueError: a file has no mark or is of no known kind.
    """
    marked = {mark[1] for mark in MARK.finditer(document)}
    there = {path.name for path in results.glob("*.json*")}
    if absent := sorted(marked - there):
        raise FileNotFoundError(
            f"the document names {', '.join(absent)}, expected in {results.name}/: measure, or "
            "take the mark out"
        )
    if unused := sorted(there - marked):
        raise ValueError(
            f"no mark in the document for {', '.join(unused)}: write <!-- table: {unused[0]} --> "
            "and <!-- end --> where the table shall stand, or remove the file"
        )
    return MARK.sub(lambda m: f"<!-- table: {m[1]} -->\n{table(results / m[1])}\n{END}", document)


def table(path: Path) -> str:
    """Return the lines for one file: how it was measured, and the table.

    Raises:
      ValueError: it is of no known kind.
    """
    try:
        if path.suffix == ".jsonl":
            return _accelerator(rows.read(path, {}))
        return _comparison(json.loads(path.read_text()))
    except (LookupError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path.name}: not as our scripts write it: {error!r}") from error


def _comparison(report: Report) -> str:
    """A file of compare_torch.py."""
    first, settings = report["rows"][0], report["settings"]
    facts, theirs = first["ours"]["machine"], first["theirs"]
    targets = {(t["work"], t["against"], t["measure"]): t for t in report["targets"]}
    words = [f"`{report['command']}`"]
    words.append(f"{facts['device']}, {facts['processor']}, {facts['usable_cores']} cores")
    words.append(f"jax {facts['versions']['jax']}")
    if facts["load_1_5_15"]:
        words.append(f"load before {facts['load_1_5_15'][0]:.1f}")
    words.append(f"torch {theirs['torch']}, {theirs['threads']} threads")
    words.append(f"{settings['dtype']}, weights {report['weights']}")

    def aim(row: Report, measure: str, sign: str) -> str:
        target = targets.get((row["work"], row["against"], measure))
        if target is None:
            return ""
        return f"{sign} {target['limit']:g}, {'met' if target['is_met'] else '**missed**'}"

    def cells(row: Report) -> list[str]:
        speed, memory = row["speed"], row["memory"] or {}
        return [
            *(row["work"], row["against"]),
            *(rows.number(row[side], "p50_ms", 1) for side in ("theirs", "ours")),
            f"{speed['median']:.2f} ({speed['least']:.2f} to {speed['most']:.2f})",
            aim(row, "speed", "≥"),
            *(rows.number(memory, f"{side}_mib", 0) for side in ("theirs", "ours")),
            *(rows.number(memory, "ratio", 2), aim(row, "memory", "≤")),
        ]

    heading = ["work", "against", "PyTorch ms", "ours ms", "times as fast (rounds)", "aim"]
    heading += ["PyTorch MiB", "ours MiB", "times the memory", "aim"]
    return f"{'; '.join(words)}.\n\n{rows.table(heading, map(cells, report['rows']))}"


def _accelerator(found: Sequence[Report]) -> str:
    """A file of gpu.py: the rows of the device and the versions of its last row."""
    stamp = {key: found[-1][key] for key in ("device", "versions")}
    own = [row for row in found if all(row[key] == stamp[key] for key in stamp)]
    versions = ", ".join(f"{name} {version}" for name, version in stamp["versions"].items())
    return f"`python benchmarks/gpu.py`; {stamp['device']}; {versions}.\n\n{rows.tables(own)}"


if __name__ == "__main__":
    sys.exit(main())
