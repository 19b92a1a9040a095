"""Keep some classes of a json, merge some, rename some.

The json's categories are first merged and renamed, all at once (``("a=b", "b=a")`` swaps two
names), then chosen by their new names. Labels stay in the order of the json's category ids. A
merged class has the id of the category that already bears its name, otherwise the smallest id of
its members; so the ids of results are ids of the json.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparseinst_jax.runtime.messages import listed


class Classes(NamedTuple):
    """The classes that a json comes to.

    Attributes:
        names: of label 0 ... K-1.
        category_ids: the json's id of each label.
        kept_id: the json's category id -> that of its class, None for a class that is left out.
    """

    names: tuple[str, ...]
    category_ids: tuple[int, ...]
    kept_id: dict[int, int | None]


def choose_classes(
    categories: Mapping[int, str],
    keep: Sequence[Any] = (),
    class_map: Sequence[Any] = (),
    *,
    all_known: bool = True,
    path: str | Path = "the json",
) -> Classes:
    """Merge, rename and choose classes.

    Args:
        categories: the json's id -> name.
        keep: names to keep, after merging; empty keeps all.
        class_map: texts ``old=new``.
        all_known: refuse a name that the json does not have; otherwise it is passed over as long
            as something is left (a validation json need not have every class).
        path: what a message calls the json.

    Raises:
        ValueError: unknown names, entries of another form, nothing left; all in one message.
    """
    old_names = set(categories.values())
    faults: list[str] = []
    renames = _read_map(class_map, old_names, faults, all_known)
    new_name = {i: renames.get(name, name) for i, name in categories.items()}
    new_names = dict.fromkeys(new_name.values())
    wanted = [str(name) for name in keep]  # classes called 1 and 2 come as numbers
    if all_known:
        for name in wanted:
            if name in new_names:
                continue
            fault = _unknown(name, new_names)
            if name in renames:
                fault = f"{name!r} is called {renames[name]!r} by config.data.class_map; give that"
            faults.append(f"config.data.classes: {fault}")
    elif wanted and not set(wanted) & new_names.keys():
        faults.append(f"config.data.classes: none of {wanted} is among {_listed(new_names)}")
    if faults:
        raise ValueError(f"the classes of {path} cannot be chosen:\n  " + "\n  ".join(faults))
    members: dict[str, list[int]] = {}
    for category_id in sorted(categories):
        members.setdefault(new_name[category_id], []).append(category_id)
    id_of = {
        name: next((i for i in ids if categories[i] == name), ids[0])
        for name, ids in members.items()
        if not wanted or name in wanted
    }
    kept_id = {i: id_of.get(name) for i, name in new_name.items()}
    pairs = sorted((i, name) for name, i in id_of.items())
    return Classes(tuple(name for _, name in pairs), tuple(i for i, _ in pairs), kept_id)


def map_categories(content: Mapping[str, Any], classes: Classes) -> dict[str, Any]:
    """Apply chosen classes to the content of an annotation json, for scoring against it."""
    return {
        **content,
        "categories": [
            {"id": category_id, "name": name}
            for category_id, name in zip(classes.category_ids, classes.names, strict=True)
        ],
        "annotations": map_category_ids(content.get("annotations", []), classes),
    }


def map_category_ids(entries: Sequence[Mapping[str, Any]], classes: Classes) -> list[Any]:
    """Give annotations or detections the ids of their classes; those left out are dropped.

    An id that the json does not know stays: whoever reads the entries says so.
    """
    mapped = []
    for entry in entries:
        old = entry.get("category_id")
        new = classes.kept_id.get(old, old) if isinstance(old, int) else old
        if new is not None or old is None:
            mapped.append({**entry, "category_id": new} if new != old else entry)
    return mapped


def _read_map(
    class_map: Sequence[Any], old_names: set[str], faults: list[str], all_known: bool
) -> dict[str, str]:
    renames: dict[str, str] = {}
    for entry in class_map:
        old, equals, new = (part.strip() for part in str(entry).partition("="))
        if not (old and equals and new):
            faults.append(f'config.data.class_map: expected "old=new", got {entry!r}')
        elif old in renames:
            faults.append(f"config.data.class_map: {old!r} occurs more than once")
        elif all_known and old not in old_names:
            faults.append(f"config.data.class_map: {_unknown(old, old_names)}")
        else:
            renames[old] = new
    return renames


def _unknown(name: str, names: Any) -> str:
    """Say that a class does not exist, and which the user may have meant."""
    names = list(names)
    lower = {other.lower(): other for other in names}
    close = difflib.get_close_matches(name.lower(), lower, n=1)
    hint = f"did you mean {lower[close[0]]!r}?" if close else f"the classes: {_listed(names)}"
    return f"there is no class {name!r}; {hint}"


def _listed(names: Any) -> str:
    return listed(sorted(map(repr, names)), 20)
