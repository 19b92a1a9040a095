"""A writer of foreign weight files for tests: pickles by hand, PyTorch's formats without torch.

It shares no code with the reader: what it writes follows the documentation of the formats, and was
compared once with what torch.save writes.
"""

from __future__ import annotations

import io
import struct
import sys
import zipfile
from typing import Any, NamedTuple

import numpy as np

STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}


class Global(NamedTuple):
    """A name that the pickle asks to import."""

    path: str


class Call(NamedTuple):
    """A call that the pickle asks for, with what follows it."""

    path: str
    arguments: tuple = ()
    state: Any = None
    items: tuple = ()


class Persistent(NamedTuple):
    """An object outside of the pickle."""

    identity: tuple


class Raw(NamedTuple):
    """Operations as they are."""

    code: bytes


def pickle_of(value: Any) -> bytes:
    """A pickle of protocol 2 that makes the value."""
    return b"\x80\x02" + _code(value) + b"."


def _code(value: Any) -> bytes:
    match value:
        case Raw():
            return value.code
        case Global():
            module, _, name = value.path.rpartition(".")
            return f"c{module}\n{name}\n".encode()
        case Call():
            code = _code(Global(value.path)) + _code(tuple(value.arguments)) + b"R"
            if value.items:
                code += b"(" + b"".join(_code(k) + _code(v) for k, v in value.items) + b"u"
            return code if value.state is None else code + _code(value.state) + b"b"
        case Persistent():
            return _code(tuple(value.identity)) + b"Q"
        case None | True | False:
            return {None: b"N", True: b"\x88", False: b"\x89"}[value]
        case int():
            size = value.bit_length() // 8 + 1
            return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case tuple():
            return b"(" + b"".join(map(_code, value)) + b"t"
        case list():
            return b"](" + b"".join(map(_code, value)) + b"e"
        case dict():
            return b"}(" + b"".join(_code(k) + _code(v) for k, v in value.items()) + b"u"
    raise TypeError(type(value))


class Storages:
    """Collects the storages of a checkpoint while its tensors are described."""

    def __init__(self, is_legacy: bool = False):
        self.is_legacy = is_legacy
        self.contents: dict[str, bytes] = {}
        self.item_sizes: dict[str, int] = {}

    def add(self, array: np.ndarray, dtype: str | None = None) -> Persistent:
        """A storage with the array's bytes; gives how the pickle refers to it."""
        key = str(len(self.contents))
        dtype = dtype or array.dtype.name
        self.contents[key], self.item_sizes[key] = array.tobytes(), array.itemsize
        return self.refer(key, STORAGES[dtype], array.size)

    def refer(self, key: str, kind: str, size: int, view: tuple | None = None) -> Persistent:
        """How the pickle refers to a storage."""
        identity = ("storage", Global(f"torch.{kind}"), key, "cpu", size)
        return Persistent((*identity, view) if self.is_legacy else identity)

    def tensor(self, array: np.ndarray, dtype: str | None = None) -> Call:
        """A contiguous tensor in a storage of its own."""
        return tensor(self.add(array, dtype), array.shape)


def tensor(storage: Any, shape: Any, strides: Any = None, offset: Any = 0) -> Call:
    """A tensor in a storage, contiguous unless strides are given."""
    if strides is None:
        strides = tuple(int(np.prod(shape[axis + 1 :], dtype=int)) for axis in range(len(shape)))
    hooks = Call("collections.OrderedDict")
    return Call("torch._utils._rebuild_tensor_v2", (storage, offset, shape, strides, False, hooks))


def torch_zip(content: Any, storages: Storages, **extra: bytes) -> bytes:
    """What torch.save writes: a zip with the pickle and one entry per storage."""
    entries = {"archive/data.pkl": pickle_of(content), "archive/byteorder": b"little"}
    entries |= {f"archive/data/{key}": data for key, data in storages.contents.items()}
    entries |= {"archive/version": b"3\n", **{name: data for name, data in extra.items()}}
    return zip_of(entries)


def zip_of(entries: dict[str, bytes] | list[tuple[str, bytes]], compression: int = 0) -> bytes:
    """A zip file with these entries."""
    target = io.BytesIO()
    pairs = entries.items() if isinstance(entries, dict) else entries
    with zipfile.ZipFile(target, "w", compression) as archive:
        for name, data in pairs:
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return target.getvalue()


def torch_legacy(content: Any, storages: Storages) -> bytes:
    """What torch.save wrote before version 1.6: pickles, then the storages behind each other."""
    system = {
        "protocol_version": 1001,
        "little_endian": sys.byteorder == "little",
        "type_sizes": {"short": 2, "int": 4, "long": 4},
    }
    pickles = [0x1950A86A20F9469CFC6C, 1001, system, content, list(storages.contents)]
    data = [
        struct.pack("<q", len(data) // storages.item_sizes[key]) + data
        for key, data in storages.contents.items()
    ]
    return b"".join([*map(pickle_of, pickles), *data])


def safetensors(arrays: dict[str, np.ndarray], **changes: Any) -> bytes:
    """A .safetensors file of float32 arrays; `changes` replace entries of the header."""
    import json

    header: dict[str, Any] = {}
    start = 0
    for name, array in arrays.items():
        stop = start + array.nbytes
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps({**header, **changes}).encode()
    data = b"".join(array.tobytes() for array in arrays.values())
    return struct.pack("<Q", len(text)) + text + data


def npy(array: np.ndarray) -> bytes:
    """A .npy file."""
    target = io.BytesIO()
    np.save(target, array)
    return target.getvalue()
