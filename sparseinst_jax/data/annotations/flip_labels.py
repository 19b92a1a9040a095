"""Labels that change when an image is mirrored, such as left and right."""

import difflib
from collections.abc import Sequence


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
