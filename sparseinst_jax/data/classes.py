"""Names of classes: keep some, merge some, rename some; those of COCO; those that a flip swaps.

The json's categories are first merged and renamed, all at once (``("a=b", "b=a")`` swaps two
names), then chosen or left out by their new names. Labels stay in the order of the json's category
ids. A merged class has the id of the category that already bears its name, otherwise the smallest
id of its members; so the ids of results are ids of the json.
"""

import difflib
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparseinst_jax.runtime.messages import listed

# For weights whose file does not name its classes. Source: the categories of COCO 2017's instance
# annotations; ten of the ids 1 to 90 are not used.
_COCO = """\
1 person, 2 bicycle, 3 car, 4 motorcycle, 5 airplane, 6 bus, 7 train, 8 truck, 9 boat,
10 traffic light, 11 fire hydrant, 13 stop sign, 14 parking meter, 15 bench, 16 bird,
17 cat, 18 dog, 19 horse, 20 sheep, 21 cow, 22 elephant, 23 bear, 24 zebra, 25 giraffe,
27 backpack, 28 umbrella, 31 handbag, 32 tie, 33 suitcase, 34 frisbee, 35 skis,
36 snowboard, 37 sports ball, 38 kite, 39 baseball bat, 40 baseball glove, 41 skateboard,
42 surfboard, 43 tennis racket, 44 bottle, 46 wine glass, 47 cup, 48 fork, 49 knife,
50 spoon, 51 bowl, 52 banana, 53 apple, 54 sandwich, 55 orange, 56 broccoli, 57 carrot,
58 hot dog, 59 pizza, 60 donut, 61 cake, 62 chair, 63 couch, 64 potted plant, 65 bed,
67 dining table, 70 toilet, 72 tv, 73 laptop, 74 mouse, 75 remote, 76 keyboard,
77 cell phone, 78 microwave, 79 oven, 80 toaster, 81 sink, 82 refrigerator, 84 book,
85 clock, 86 vase, 87 scissors, 88 teddy bear, 89 hair drier, 90 toothbrush
"""
_COCO_ENTRIES = [entry.split(maxsplit=1) for entry in _COCO.split(",")]
COCO_CATEGORY_IDS = tuple(int(number) for number, _ in _COCO_ENTRIES)
COCO_CLASS_NAMES = tuple(name.strip() for _, name in _COCO_ENTRIES)


class Classes(NamedTuple):
    """The classes chosen from a json."""

    names: tuple[str, ...]  # of label 0 ... K-1
    category_ids: tuple[int, ...]  # the json's id of each label
    # the json's category id -> that of its class, None for a class that is left out
    kept_id: dict[int, int | None]


def choose_classes(
    categories: Mapping[int, str],
    keep: Sequence[Any] = (),
    class_map: Sequence[Any] = (),
    exclude: Sequence[Any] = (),
    *,
    all_known: bool = True,
    path: str | Path = "the json",
) -> Classes:
    """Merge, rename and choose classes.

    Args:
        categories: the json's id -> name.
        keep: names to keep, after merging; empty keeps all.
        class_map: texts ``old=new``.
        exclude: names to leave out, after merging.
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
    # Classes called 1 and 2 come as numbers.
    wanted, unwanted = [str(name) for name in keep], {str(name) for name in exclude}
    for key, names in (("classes", wanted), ("exclude_classes", sorted(unwanted))):
        for name in names if all_known else ():
            if name in new_names:
                continue
            fault = _unknown(name, new_names)
            if name in renames:
                fault = f"{name!r} is called {renames[name]!r} by config.data.class_map; give that"
            faults.append(f"config.data.{key}: {fault}")
    left = [name for name in new_names if name not in unwanted and (not wanted or name in wanted)]
    if not faults and new_names and not left:
        given = f"none of {wanted}" if wanted else "none but those excluded"
        faults.append(f"config.data.classes: {given} is among {_listed(new_names)}")
    if faults:
        raise ValueError(f"the classes of {path} cannot be chosen:\n  " + "\n  ".join(faults))
    members: dict[str, list[int]] = {}
    for category_id in sorted(categories):
        members.setdefault(new_name[category_id], []).append(category_id)
    id_of = {
        name: next((i for i in ids if categories[i] == name), ids[0])
        for name, ids in members.items()
        if name in left
    }
    kept_id = {i: id_of.get(name) for i, name in new_name.items()}
    pairs = sorted((i, name) for name, i in id_of.items())
    return Classes(tuple(name for _, name in pairs), tuple(i for i, _ in pairs), kept_id)


def warn_of_alike(names: Sequence[str]) -> list[str]:
    """A line, with what merges them, for each group of classes that are probably one."""
    lines = []
    for what, plain in (
        ("capitals or spaces", lambda name: "".join(name.casefold().split())),
        ("the number at their end", lambda name: re.sub(r"[\s_-]*\d+$", "", name)),
    ):
        alike: dict[str, list[str]] = {}
        for name in names:
            alike.setdefault(plain(name), []).append(name)
        for common, group in alike.items():
            if len(group) < 2 or not common:
                continue
            target = common if what.startswith("the") else group[0]
            merged = tuple(f"{name}={target}" for name in group if name != target)
            is_plain = all(re.fullmatch(r"[\w.-]+( [\w.-]+)*", name) for name in group)
            value = ",".join(merged) if is_plain else str(merged)
            lines.append(
                f"the classes {listed(map(repr, group))} differ only in {what}: if they are one, "
                f"correct the labels, or give {shlex.quote(f'--config.data.class_map={value}')}"
            )
    return lines


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

    An id that the json does not know stays: the reader of the entries reports it.
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
        old, equals, new = str(entry).partition("=")
        # A name of the json may end in a space: that is often what is to be mended.
        old, new = old if old in old_names else old.strip(), new.strip()
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
    """A message for an unknown class, with the closest known one."""
    names = list(names)
    lower = {other.lower(): other for other in names}
    close = difflib.get_close_matches(name.lower(), lower, n=1)
    hint = f"did you mean {lower[close[0]]!r}?" if close else f"the classes: {_listed(names)}"
    return f"there is no class {name!r}; {hint}"


def _listed(names: Any) -> str:
    return listed(sorted(map(repr, names)), 20)


def parse_flip_label_pairs(pairs: Sequence[str], class_names: Sequence[str]) -> tuple[int, ...]:
    """Read pairs of class names that swap in a mirrored image.

    Args:
        pairs: each ``"name=other name"``.
        class_names: in the order of the labels.

    Returns:
        the label of each label's object in a mirrored image; empty when there is no pair.

    Raises:
        ValueError: lists every pair that cannot be, with the closest class name.
    """
    faults: list[str] = []
    swapped = list(range(len(class_names)))
    seen: set[str] = set()
    for pair in pairs:
        names = [name.strip() for name in str(pair).split("=")]
        if len(names) != 2 or not all(names) or names[0] == names[1]:
            faults.append(f'{pair!r}: expected two different names as "left_hand=right_hand"')
            continue
        unknown = [name for name in names if name not in class_names]
        faults += [f"{pair!r}: no class {name!r}{_close(name, class_names)}" for name in unknown]
        faults += [f"{pair!r}: {name!r} is in another pair" for name in names if name in seen]
        seen.update(names)
        if not unknown:
            first, second = (list(class_names).index(name) for name in names)
            swapped[first], swapped[second] = second, first
    if faults:
        raise ValueError(
            "config.data.flip_label_pairs: "
            + "; ".join(faults)
            + f". Classes: {', '.join(class_names)}."
        )
    return tuple(swapped) if pairs else ()


def _close(name: str, class_names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, class_names, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
