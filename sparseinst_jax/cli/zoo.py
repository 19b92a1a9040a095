"""The command `zoo`: every published model, its scores and sizes, and where its weights are."""

from __future__ import annotations

import json
from collections.abc import Sequence

from sparseinst_jax.cli import command_parser
from sparseinst_jax.runtime.messages import columns
from sparseinst_jax.weights import zoo
from sparseinst_jax.weights.zoo import Row

DESCRIPTION = """\
The published SparseInst and FastInst models: AP, speed, size, weights, the ImageNet weights to
start from, and the command that converts the weights. Scores and speeds are published ones, not
ours.

  sparseinst zoo                     all of them
  sparseinst zoo r50vd dcn           those whose line holds both words
"""
COLUMNS = ("config", "model", "input", "AP val", "AP test-dev", "FPS", "params M", "GMAC", "GFLOPs")
LEGEND = (
    "Input: short side, the long one at most 853 (of 576: 777). GMAC: billions of",
    "multiply-accumulates for an image of 640 x 864, which the originals call GFLOPs; here GFLOPs",
    "are two to each. Parameters as the originals count them; others count frozen norms, too:",
    "--json.",
)
UNKNOWN_HASH = "sha256 unknown"
FETCH = f"sparseinst download NAME, or of a file {zoo.CONVERT}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = command_parser("zoo", DESCRIPTION)
    parser.add_argument("words", metavar="WORD", nargs="*", help="show lines that hold all of them")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="all facts, one object for each row")
    form.add_argument("--markdown", action="store_true", help="as docs/zoo.md shows them")
    arguments = parser.parse_args(argv)
    rows = zoo.select(arguments.words)
    if arguments.json:
        print(json.dumps([zoo.facts(row) for row in rows], indent=2))
    elif arguments.markdown:
        print(markdown(rows))
    else:
        print(text(rows))
    return 0


def text(rows: Sequence[Row]) -> str:
    """The table and, below it, the files, for a terminal."""
    sources = {row.source: zoo.SOURCES[row.source] for row in rows}
    from_where = [f"{name}: {where}." for name, where in sources.items()]
    notes = [f"{row.config}: {row.note}." for row in _one_each(rows) if row.note]
    trained = [[row.config, row.weights or "none published"] for row in _one_each(rows)]
    table = columns([COLUMNS, *map(_cells, rows)], 2)
    sections = [
        table,
        [*LEGEND, *from_where, *notes],
        [f"Trained weights ({UNKNOWN_HASH}); {FETCH}", *columns(trained, 2)],
        ["ImageNet weights that training starts from", *_backbones(rows)],
    ]
    return "\n\n".join("\n".join(section) for section in sections)


def _backbones(rows: Sequence[Row]) -> list[str]:
    """Address, hash, users and note of each file to start from."""
    lines = []
    for name, backbone in zoo.BACKBONES.items():
        users = [row.config for row in _one_each(rows) if row.backbone == name]
        prefix = backbone.sha256_prefix
        known = f"sha256 begins with {prefix}" if prefix else UNKNOWN_HASH
        if users:
            lines += [f"{backbone.address} ({known})", f"  for {', '.join(users)}"]
            lines += [f"  {backbone.note}"] if backbone.note else []
    return lines or ["none"]


def _cells(row: Row) -> tuple[str, ...]:
    def score(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    network = zoo.NETWORKS[row.network]
    scores = score(row.ap_val), score(row.ap_test), score(row.fps)
    size = f"{network.parameters / 1e6:.2f}", f"{network.gmacs:.1f}", f"{2 * network.gmacs:.1f}"
    return row.config, row.model, str(row.short_side), *scores, *size


def _one_each(rows: Sequence[Row]) -> list[Row]:
    """The first row of each configuration: two rows of one share their files."""
    return list({row.config: row for row in reversed(rows)}.values())[::-1]


def markdown(rows: Sequence[Row]) -> str:
    """The table with links, and the tables of sizes and of files, for docs/zoo.md."""
    lines = []
    for source in dict.fromkeys(row.source for row in rows):
        chosen = [row for row in rows if row.source == source]
        lines += [f"### {source}", "", f"From {zoo.SOURCES[source]}.", ""]
        lines += [f"| {' | '.join((*COLUMNS, 'trained weights', 'start from'))} |"]
        lines += ["|" + "---|" * (len(COLUMNS) + 2)]
        for row in chosen:
            name, *cells = _cells(row)
            linked = f"[{name}](../configs/{name}.py)"
            weights = f"[file]({row.weights})" if row.weights else "none"
            lines.append(f"| {' | '.join((linked, *cells, weights, _start(row)))} |")
        lines.append("")
    return "\n".join(lines).strip()


def _start(row: Row) -> str:
    if not row.backbone:
        return "nothing"
    backbone = zoo.BACKBONES[row.backbone]
    return f"[{backbone.file}]({backbone.address})"
