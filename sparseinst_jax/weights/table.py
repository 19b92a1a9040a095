"""What became of the arrays of a weights file, as a table for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

# Layers that depend on the classes: a row of their own.
CLASS_LAYER = ".cls_score."
_CLASS_HEAD = "class head"
_OTHER = "other"
_MOST_NAMES = 8  # names written out; the others are counted


def part_of(name: str) -> str:
    """The row of an array with an original name."""
    first, _, rest = name.partition(".")
    return _CLASS_HEAD if CLASS_LAYER in name else first if rest else _OTHER


def part_table(columns: Mapping[str, Mapping[str, Any]], own: Iterable[str]) -> list[str]:
    """Count arrays and their numbers for each part of the model.

    Args:
      columns: heading -> original name -> array.
      own: original names of the model's arrays, whose parts come first.

    Returns:
      Lines, the first of them the headings.
    """
    own_parts = sorted(dict.fromkeys(map(part_of, own)), key=lambda part: part == _CLASS_HEAD)
    named = (part_of(name) for column in columns.values() for name in column)
    strange = dict.fromkeys(part for part in named if part not in own_parts)
    rows = [["part", *columns]]
    for part in (*own_parts, *strange):
        sizes = [
            [np.size(array) for name, array in column.items() if part_of(name) == part]
            for column in columns.values()
        ]
        rows.append([part, *(f"{len(s)} ({sum(s):,})" if s else "-" for s in sizes)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines = [f"  {'  '.join(row).rstrip()}" for row in padded]
    return [f"{lines[0]}   in arrays (and numbers)", *lines[1:]]


def by_reason(what: str, reasons: Mapping[str, str]) -> list[str]:
    """One line for each reason, with the names that have it; `what` starts each line."""
    lines = []
    for reason in dict.fromkeys(reasons.values()):
        names = [name for name, why in reasons.items() if why == reason]
        count = f" ({len(names)})" if len(names) > _MOST_NAMES else ""
        lines.append(f"  {what}, {reason}{count}: {shorten(names)}")
    return lines


def shorten(names: Iterable[str]) -> str:
    """Write out the first few names and count the others."""
    names = list(names)
    rest = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")
