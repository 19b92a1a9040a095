"""The vocabulary of tables of parameter names in other implementations.

A table lists the modules that are named differently (`Rename`), the arrays that are named or laid
out differently (`Leaf`), and the names that hold nothing of a model (`Ignored`). What no rule
mentions keeps its name. A family says in `WeightNames` what its published weights call its own
parts; `weights.ecosystems` knows the backbones, and `weights.convert` applies both.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import NamedTuple


class Rename(NamedTuple):
    """A module that is named, nested or numbered differently.

    A field in `theirs` stands for a number: `{i}`, a lower-case character, for digits, `{I}`, an
    upper-case one, for a letter that counts a, b, c from 0. Each can be used in `ours` as it is or
    as `{i+1}`, `{i-1}` or `{2i}`.
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


class WeightNames(NamedTuple):
    """What the published weights of a model family look like, apart from the backbone.

    Attributes:
      title: of the family, for messages.
      parts: first names of its own modules; a file without any holds a backbone alone.
      class_layers: published names of the layers with one output for each class; a network has
        the first one, and may lack others.
      has_no_object: whether these have one output more, for no object.
      options: which keys of a configuration decide whether a file fits, for messages.
      renames: modules, from our paths (`encoder/fusion`) to the published names.
      leaves: arrays beyond kernels, biases and norms, from ours to the published ones.
      ignored: published names that hold nothing of the model.
    """

    title: str
    parts: tuple[str, ...]
    class_layers: tuple[str, ...]
    options: str
    has_no_object: bool = False
    renames: tuple[Rename, ...] = ()
    leaves: tuple[Leaf, ...] = ()
    ignored: tuple[Ignored, ...] = ()

    def is_of_class_layer(self, name: str) -> bool:
        """Whether the published name is that of an array of a class layer."""
        return name.rpartition(".")[0] in self.class_layers


# Of a family without published weights: what PyTorch would call the paths of its parameters.
UNPUBLISHED = WeightNames("such a", parts=(), class_layers=("",), options="options")


def rename_module(rules: Iterable[Rename], module: str) -> str | None:
    """Apply the first rule that knows the module; None if none does."""
    for rule in rules:
        match = _pattern(rule.theirs).fullmatch(module)
        if match is None:
            continue
        values: dict[str, int] = {}
        for field, text in match.groupdict().items():
            number = ord(text) - ord("a") if field.isupper() else int(text)
            values |= {field: number, f"{field}+1": number + 1, f"{field}-1": number - 1}
            values[f"2{field}"] = 2 * number
        return rule.ours.format(**values)
    return None


def find_leaf(leaves: Iterable[Leaf], name: str, rank: int) -> Leaf | None:
    """Find the rule of an array by the last part of its name and its rank."""
    return next((leaf for leaf in leaves if (leaf.theirs, leaf.rank) == (name, rank)), None)


def reason_to_ignore(rules: Iterable[Ignored], name: str) -> str | None:
    """Say why a name holds nothing of the model; None if it does."""
    return next((rule.why for rule in rules if re.fullmatch(rule.pattern, name)), None)


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    pattern, seen = "", set()
    for part in re.split(r"(\{\w\})", template):
        field = part[1:-1]
        if not re.fullmatch(r"\{\w\}", part):
            pattern += re.escape(part)
        elif field in seen:
            pattern += f"(?P={field})"
        else:
            pattern += f"(?P<{field}>{'[a-z]' if field.isupper() else '[0-9]+'})"
            seen.add(field)
    return re.compile(pattern)
