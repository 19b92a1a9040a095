"""Checks of a checkpoint's content, which may come from an untrusted source.

Arrays and JSON are read, nothing is run. Other files in the folder are not opened, and links are
refused.
"""

import math
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from sparseinst_jax.runtime.class_names import MAX_ID, class_name_fault
from sparseinst_jax.runtime.messages import brief

MAX_FILES = 100_000  # in the folder of one step; Orbax writes a few dozen
# Bytes of a file that is read whole as JSON: names and shapes of arrays, configuration, classes.
MAX_JSON = 1 << 26
# Numbers in all arrays of one item: 8 GB, more than a hundred times the largest network here. A
# tiny file can stand for an array of any size that holds one number everywhere.
MAX_NUMBERS = 1 << 31
MAX_DEPTH = 12  # groups in groups of a configuration; ours have 3
_OLD_FORM = "checkpoint"  # Orbax would read it in place of the arrays
_JSON_FILES = {"metadata", "metrics", "_METADATA", "_CHECKPOINT_METADATA", "_sharding"}


def refuse_unsafe_files(folder: Path) -> None:
    """Refuse (ValueError) a step's folder with links, devices, pipes or an oversized JSON."""
    cure = "copy the checkpoint with its files in place of the links"
    if folder.is_symlink():
        raise ValueError(f"{folder} is a symbolic link; name the folder it leads to, or {cure}")
    num_files = 0
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(parent, name)
            found = os.lstat(path)
            if stat.S_ISLNK(found.st_mode):
                raise ValueError(f"it holds a symbolic link, {path}; {cure}")
            if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
                raise ValueError(f"it holds a device or a pipe, {path}; remove it")
            if name == _OLD_FORM:
                raise ValueError(f"it holds {path}, a format that Orbax no longer writes")
            if name in _JSON_FILES and found.st_size > MAX_JSON:
                raise ValueError(f"{path} has {found.st_size} bytes, expected {MAX_JSON} at most")
        num_files += len(files)
        if num_files > MAX_FILES:
            raise ValueError(f"it holds more than {MAX_FILES} files")


def refuse_huge_arrays(stored: Any, items: Iterable[str]) -> None:
    """Refuse (ValueError) stored shapes that would take all memory, in all arrays of an item.

    What is stored is for each item a nested mapping of things with a `shape`.
    """
    for name in items:
        total = sum(_size(array) for array in jax.tree.leaves(stored[name]))
        if total > MAX_NUMBERS:
            raise ValueError(
                f"the arrays of {name} have {total:.3g} numbers, expected {MAX_NUMBERS} at most"
            )


def _size(array: Any) -> int:
    return math.prod(int(side) for side in getattr(array, "shape", None) or ())


def check_meta(meta: Any) -> dict[str, Any]:
    """Check the types of what is stored beside the arrays; returns it, or raises all faults."""
    if not isinstance(meta, dict):
        raise ValueError(f"its meta must be a JSON object, got {brief(meta)}")
    faults = []
    for key, kind in (("step", int), ("config", dict), ("class_names", list)):
        if key in meta and type(meta[key]) is not kind:
            faults.append(f"{key} must be of type {kind.__name__}, got {brief(meta[key])}")
    names, ids = meta.get("class_names", []), meta.get("category_ids", [])
    if isinstance(names, list):
        faults += [
            f"class_names: {fault}"
            for name in names
            if (fault := class_name_fault(name) if isinstance(name, str) else "no string")
            is not None
        ]
    if not isinstance(ids, list) or not all(type(i) is int and abs(i) <= MAX_ID for i in ids):
        faults.append(f"category_ids must be a list of integers, got {brief(ids)}")
    config = meta.get("config", {})
    if isinstance(config, dict):
        faults += [f"config: {fault}" for fault in _config_faults(config, "", 1)]
    if faults:
        raise ValueError("its meta is wrong: " + "; ".join(faults[:5]))
    return meta


def _config_faults(value: Any, key: str, depth: int) -> list[str]:
    if depth > MAX_DEPTH:
        return [f"{key} is nested deeper than {MAX_DEPTH}"]
    if isinstance(value, dict):
        return [
            fault
            for name, item in value.items()
            for fault in _config_faults(item, f"{key}.{brief(name)[1:-1]}".lstrip("."), depth + 1)
        ]
    if isinstance(value, list | tuple):
        return [fault for item in value for fault in _config_faults(item, key, depth + 1)]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and not abs(value) <= 2**63:
        return [f"{key} is {brief(value)}"]
    if is_number or value is None or isinstance(value, bool | str):
        return []
    return [f"{key} is of the type {type(value).__name__}"]
