"""How names and layouts of one implementation become those of another: rules as data.

A table of an implementation lists its modules that are named differently (`Rename`), its arrays
that are named or laid out differently (`Leaf`), and the names that hold nothing of a model
(`Ignored`). What no rule speaks of keeps its name.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import NamedTuple

# What stands for a number in a `Rename`, and how it is read.
_FIELDS = {"{i}": r"(?P<i>\d+)", "{letter}": "(?P<letter>[a-z])"}


class Rename(NamedTuple):
    """A module that is named, nested or numbered differently.

    `{i}` in `theirs` stands for a number and `{letter}` for a letter that counts a, b, c from 0;
    `{i}` in `ours` is that number and `{twice_i}` twice it.
    """

    theirs: str
    ours: str
    why: str


class Leaf(NamedTuple):
    """An array of a module: its last name on either side, its rank, and the axes that make ours."""

    theirs: str
    ours: str
    rank: int
    axes: tuple[int, ...]
    why: str


class Ignored(NamedTuple):
    """A pattern of whole names that hold nothing of the model."""

    pattern: str
    why: str


def rename_module(rules: Iterable[Rename], module: str) -> str | None:
    """Apply the first rule that knows the module; None if none does."""
    for rule in rules:
        match = _compile(rule.theirs).fullmatch(module)
        if match is None:
            continue
        groups = match.groupdict()
        if "letter" in groups:
            number = ord(groups["letter"]) - ord("a")
        else:
            number = int(groups.get("i", 0))
        return rule.ours.format(i=number, twice_i=2 * number)
    return None


def find_leaf(leaves: Iterable[Leaf], name: str, rank: int) -> Leaf | None:
    """Find the rule of an array by the last part of its name and its rank."""
    return next((leaf for leaf in leaves if (leaf.theirs, leaf.rank) == (name, rank)), None)


def reason_to_ignore(rules: Iterable[Ignored], name: str) -> str | None:
    """Say why a name holds nothing of the model; None if it does."""
    return next((rule.why for rule in rules if re.fullmatch(rule.pattern, name)), None)


@functools.cache
def _compile(template: str) -> re.Pattern[str]:
    parts = re.split(r"(\{\w+\})", template)
    return re.compile("".join(_FIELDS.get(part) or re.escape(part) for part in parts))
