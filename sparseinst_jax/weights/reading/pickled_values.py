"""What the names in a pickle of arrays mean: inert values of ours for NumPy's and PyTorch's.

`MEANINGS` is the allow-list of `pickles`: only these names give anything but an empty
`Foreign`. Each function takes the arguments that the pickle holds and makes a description; none
allocates an array.

Source: what `numpy.ndarray.__reduce__` and `torch.Tensor.__reduce_ex__` write.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from sparseinst_jax.weights.reading.stored_arrays import (
    ITEM_SIZES,
    NUMPY_NAMES,
    Piece,
    StoredArray,
    WeightsFileError,
    c_strides,
    f_strides,
    short,
)

_TORCH_STORAGES = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
}
_UNTYPED = ("torch.storage.UntypedStorage", "torch.UntypedStorage")


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Name:
    """A dotted name in a pickle; nothing stands behind it."""

    path: str


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Foreign:
    """An object whose class this package does not know: empty except for the name."""

    path: str


def set_items(target: dict[Any, Any], pairs: Any) -> None:
    """Puts items into a dict; a name that is there already is refused.

    Only keys that cannot be made to collide, and whose hash does not recurse, stay as they are.
    """
    for key, value in pairs:
        is_small = isinstance(key, int) and abs(key) < 1 << 63
        if not (is_small or key is None or isinstance(key, str | bytes | float | Name)):
            key = Foreign(f"a key of type {type(key).__name__}")
        if isinstance(key, str) and key in target:
            raise WeightsFileError(
                f"the name {short(key)} is there twice, expected once: damaged, or tampered with"
            )
        target[key] = value


@dataclasses.dataclass(slots=True, eq=False)
class PickledDtype:
    """A NumPy dtype: its name and byte order."""

    name: str
    is_big_endian: bool = False

    def set_state(self, state: Any) -> None:
        """Takes what follows for `__setstate__`, (version, byte order, ..., field names, ...)."""
        _, order, _, names, *_ = state
        if order not in ("<", ">", "=", "|"):
            raise ValueError("a dtype with an unknown byte order")
        self.is_big_endian = order == ">"
        if names is not None:
            self.name = "structured"


@dataclasses.dataclass(slots=True, eq=False)
class PickledArray:
    """A NumPy array whose content is in the pickle."""

    shape: Any = ()
    dtype: Any = None
    is_fortran: Any = False
    data: Any = None

    def set_state(self, state: Any) -> None:
        """Takes (version, shape, dtype, whether the first axis is the fastest, content)."""
        *_, self.shape, self.dtype, self.is_fortran, self.data = state

    def stored(self) -> StoredArray:
        """Where the array is; with a piece of None if its content is none."""
        dtype = self.dtype if isinstance(self.dtype, PickledDtype) else PickledDtype("unknown")
        shape = self.shape if type(self.shape) is tuple else (self.shape,)
        if not all(type(size) is int for size in shape):
            return StoredArray(None, dtype.name, shape, shape)
        strides = f_strides(shape) if self.is_fortran else c_strides(shape)
        data = self.data
        if isinstance(data, str):  # of Python 2, or short bytes of protocol 2
            data = data.encode("latin-1")
        piece = Piece(data, 0, len(data)) if isinstance(data, bytes) else None
        return StoredArray(piece, dtype.name, shape, strides, 0, dtype.is_big_endian, True)


Settable = PickledDtype | PickledArray  # what gets its content afterwards


@dataclasses.dataclass(slots=True, eq=False)
class Storage:
    """A run of numbers that tensors lie in."""

    name: str  # of the storage in the file
    dtype: str | None  # of the numbers, or None if it is only bytes
    num_bytes: int  # what the pickle claims
    piece: Piece | None = None  # the bytes; None until the file was read so far
    is_big_endian: bool = False  # order of the bytes of a number


class PickledTensor(NamedTuple):
    """A PyTorch tensor: where in which storage."""

    storage: Storage
    offset: Any
    shape: Any
    strides: Any
    dtype: str

    def stored(self) -> StoredArray:
        """Where the array is; shape and strides are checked by its `fault`."""
        shape = self.shape if type(self.shape) is tuple else (self.shape,)
        strides = self.strides if type(self.strides) is tuple else (self.strides,)
        storage = self.storage
        return StoredArray(
            storage.piece, self.dtype, shape, strides, self.offset, storage.is_big_endian
        )


def storage_of(kind: object, name: str, size: object) -> Storage:
    """The storage that a PyTorch pickle refers to; `kind` is the `Name` of its class.

    Its size is in numbers; of untyped storages in bytes.
    """
    if not isinstance(kind, Name):
        raise ValueError("a storage without class or name")
    if type(size) is not int or size < 0:
        raise WeightsFileError(f"the storage {short(name)} has the size {short(size)}")
    if kind.path in _UNTYPED:
        return Storage(name, None, size)
    dtype = _TORCH_STORAGES.get(kind.path, kind.path)
    # A dtype that is not known is a fault only of the tensors that are asked for.
    return Storage(name, dtype, size * ITEM_SIZES.get(dtype, 1))


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> object:
    if isinstance(storage, Foreign):  # such as a file of torch.save inside of a plain pickle
        return storage
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without storage")
    return PickledTensor(storage, offset, shape, strides, storage.dtype or "unknown")


def _tensor_of_dtype(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> object:
    path = dtype.path if isinstance(dtype, Name) else "unknown"
    tensor = _tensor(storage, offset, shape, strides)
    is_tensor = isinstance(tensor, PickledTensor)
    return tensor._replace(dtype=path.removeprefix("torch.")) if is_tensor else tensor


def _parameter(data: object, *_: object) -> object:
    return data


def _tensor_with_attributes(function: Any, kind: Any, arguments: Any, *_: Any) -> object:
    if isinstance(function, Name) and function.path in _TENSORS and type(arguments) is tuple:
        return _TENSORS[function.path](*arguments)
    return Foreign(kind.path if isinstance(kind, Name) else "a tensor of an unknown class")


def _ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    set_items(result, pairs)
    return result


def _dtype(code: Any, *_: Any) -> PickledDtype:
    if isinstance(code, Name):  # ml_dtypes.bfloat16
        return PickledDtype(code.path.removeprefix("ml_dtypes."))
    code = str.lstrip(code, "<>|=")
    return PickledDtype("object" if code.startswith("O") else str(NUMPY_NAMES.get(code, code)))


def _array_of_buffer(data: Any, dtype: Any, shape: Any, order: Any = "C") -> PickledArray:
    return PickledArray(shape, dtype, order == "F", data)


def _encode(text: Any, encoding: Any = "utf-8") -> object:
    if encoding not in ("latin1", "latin-1"):
        return Foreign("_codecs.encode")
    return text.encode("latin-1")


def _plain(kind: type) -> Callable[..., object]:
    """A container that is empty, or as it was given: Paddle writes `tuple((name, array))`."""

    def meaning(*arguments: Any) -> object:
        if not arguments:
            return kind()
        is_same = len(arguments) == 1 and type(arguments[0]) is kind
        return arguments[0] if is_same else Foreign(f"builtins.{kind.__name__}")

    return meaning


_TENSORS: dict[str, Callable[..., object]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
MEANINGS: dict[str, Callable[..., object]] = {
    **_TENSORS,
    "torch._tensor._rebuild_from_type": _tensor_with_attributes,
    "torch._tensor._rebuild_from_type_v2": _tensor_with_attributes,
    "torch.tensor._rebuild_from_type": _tensor_with_attributes,
    "torch.Size": lambda sizes=(): sizes,
    "collections.OrderedDict": _ordered_dict,
    "collections.defaultdict": lambda *arguments: {},
    **{f"builtins.{kind.__name__}": _plain(kind) for kind in (dict, list, tuple, bytes)},
    "_codecs.encode": _encode,
    "numpy.dtype": _dtype,
    "numpy._core.multiarray._reconstruct": lambda *arguments: PickledArray(),
    "numpy._core.multiarray.scalar": lambda dtype, data: PickledArray((), dtype, False, data),
    "numpy._core.numeric._frombuffer": _array_of_buffer,
}
