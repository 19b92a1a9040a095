"""What an ONNX file holds, read as data before any runtime sees it, without the `onnx` package.

A file may come from anywhere. Its bytes are walked field by field (protobuf's wire format): no
array is read, nothing can run, and what is not one of our files is refused with a reason: cut off,
no metadata, another operator set, operators of other makers, arrays outside the file or larger than
it. What a file can still do is compute: take time and memory.

Source: the field numbers of onnx/onnx.proto.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparseinst_jax.runner.metadata import KEY, Metadata, from_json
from sparseinst_jax.runtime.messages import brief, listed

OPSETS = range(17, 22)  # those between which the meaning of our operators is the same
SUFFIX = ".onnx"
CURE = "give a file that `sparseinst export` wrote"
_MAX_NODES = 1 << 17
_MODEL = {"graph": 7, "opset": 8, "metadata": 14, "functions": 25}
_GRAPH = {"node": 1, "constant": 5}
Fields = Iterator[tuple[int, Any]]


def read_metadata(source: str | os.PathLike | bytes) -> Metadata:
    """Check a file, or its content, and read what it says of itself.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not one of our files; says why.
    """
    if isinstance(source, bytes):
        return _read(memoryview(source), "the content")
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; {CURE}")
    if not path.is_file() or not path.stat().st_size:
        kind = "an empty file" if path.is_file() else "no file"
        raise ValueError(f"{path} is {kind}; {CURE}")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        with memoryview(content) as view:
            return _read(view, path)


class _Broken(Exception):
    """The bytes are no protobuf."""


def _read(view: memoryview, path: Any) -> Metadata:
    try:
        return _read_model(view, path)
    except _Broken as error:
        message = f"{path} is no ONNX file, or only a part of one ({error}); {CURE}"
        raise ValueError(message) from None


def _read_model(view: memoryview, path: Any) -> Metadata:
    opsets: dict[str, int] = {}
    texts: list[str] = []
    faults: list[str] = []
    graphs = 0
    for number, value in _fields(view):
        if number == _MODEL["opset"]:
            entry = dict(_fields(_message(value)))
            opsets[_text(entry.get(1, b""))] = int(entry.get(2, 0))
        elif number == _MODEL["metadata"]:
            entry = dict(_fields(_message(value)))
            texts += [_text(entry.get(2, b""))] * (_text(entry.get(1, b"")) == KEY)
        elif number == _MODEL["graph"]:
            graphs += 1
            faults += _graph_faults(_message(value), len(view))
        elif number == _MODEL["functions"]:
            faults.append("it defines operators of its own")
    if not graphs and not texts:
        raise _Broken("it holds no graph")
    if len(texts) != 1 or graphs != 1:
        raise ValueError(f"{path} has no metadata of this package; {CURE}")
    metadata = from_json(texts[0], path)
    opset = opsets.get("", opsets.get("ai.onnx"))
    if opset not in OPSETS:
        known = f"{OPSETS.start} to {OPSETS.stop - 1}"
        faults.append(f"it asks for the operator set {opset}, not one of {known}")
    if faults:
        raise ValueError(f"{path} is not a file that can be run: {listed(faults, 5, '; ')}; {CURE}")
    return metadata


def _graph_faults(graph: memoryview, size: int) -> list[str]:
    faults, nodes = [], 0
    for number, value in _fields(graph):
        if number == _GRAPH["node"]:
            nodes += 1
            faults += _node_faults(_message(value))
        elif number == _GRAPH["constant"]:
            faults += _tensor_faults(_message(value), size)
        if nodes > _MAX_NODES or len(faults) > 100:
            return [*faults, f"more than {_MAX_NODES} nodes"] if nodes > _MAX_NODES else faults
    return faults


def _node_faults(node: memoryview) -> list[str]:
    kind, domain, faults = "", "", []
    for number, value in _fields(node):
        if number == 4:
            kind = _text(value)
        elif number == 7:
            domain = _text(value)
        elif number == 5:
            # A graph inside an attribute: If, Loop and Scan, which none of our files has.
            faults += [
                "a node holds a graph" for field, _ in _fields(_message(value)) if field in (6, 11)
            ]
    if domain not in ("", "ai.onnx"):
        faults.append(f"the operator {brief(kind)} is of {brief(domain)}")
    return faults


def _tensor_faults(tensor: memoryview, size: int) -> list[str]:
    number_of_values, faults = 1, []
    for number, value in _fields(tensor):
        if number == 1:
            sides = [value] if isinstance(value, int) else list(_varints(_message(value)))
            for side in sides:
                number_of_values *= side
            if any(side >= 1 << 63 for side in sides) or number_of_values > size:
                return ["an array is larger than the file"]
        elif number in (13, 14) and value:
            faults.append("an array lies in another file")
    return faults


def _fields(view: memoryview) -> Fields:
    """Walk a message: field number and value, a number or the bytes."""
    place, end = 0, len(view)
    while place < end:
        key, place = _varint(view, place)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, place = _varint(view, place)
            yield number, value
            continue
        if kind == 2:
            length, place = _varint(view, place)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise _Broken(f"a field of the kind {kind}")
        if length > end - place:
            raise _Broken("it ends in the middle")
        yield number, view[place : place + length]
        place += length


def _varint(view: memoryview, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(view):
            raise _Broken("it ends in the middle")
        byte = view[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise _Broken("a number of more than ten bytes")


def _varints(view: memoryview) -> Iterator[int]:
    place = 0
    while place < len(view):
        value, place = _varint(view, place)
        yield value


def _message(value: Any) -> memoryview:
    if not isinstance(value, memoryview):
        raise _Broken("a number in the place of a message")
    return value


def _text(value: Any) -> str:
    try:
        return bytes(value if isinstance(value, memoryview | bytes) else b"").decode()
    except UnicodeDecodeError:
        raise _Broken("a text that is none") from None
