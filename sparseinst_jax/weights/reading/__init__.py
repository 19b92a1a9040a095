"""Weight files of every ecosystem, recognised by content and not by name.

Neither torch nor paddle is needed, and nothing in a file is run: pickles are read by
`pickles`, which knows no way to call anything. Sizes are compared with the file before memory is
allocated, so what is refused is refused at once.
"""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import numpy as np

from sparseinst_jax.runtime.messages import listed
from sparseinst_jax.weights.reading.pickled_values import (
    Foreign,
    Name,
    PickledArray,
    PickledTensor,
)
from sparseinst_jax.weights.reading.pickles import Unpickler
from sparseinst_jax.weights.reading.plain_files import (
    INFLATED_BYTES,
    INFLATED_RATIO,
    ZipEntries,
    read_npz,
    read_safetensors,
)
from sparseinst_jax.weights.reading.stored_arrays import StoredArray, WeightsFileError, short
from sparseinst_jax.weights.reading.torch_files import (
    LEGACY_START,
    is_torch_zip,
    read_torch_legacy,
    read_torch_zip,
)

KINDS = ".pth and .pkl of PyTorch or detectron2, .pdparams of Paddle, .npz, .safetensors"
_HEAD_BYTES = 512
# The first byte of a pickle: a protocol, or in protocols 0 and 1 a dict, a mark or a name.
_PICKLE_STARTS = (b"\x80", b"}", b"(", b"c")
_STRANGERS = {
    b"\x1f\x8b": "compressed by gzip: unpack it first",
    b"<": "a web page: the download did not give the file",
    b"version https://git-lfs": "a pointer of git-lfs: fetch the file with git lfs pull",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a single .npy array",
    b"BZh": "compressed by bzip2: unpack it first",
    b"\xfd7zXZ": "compressed by xz: unpack it first",
}

# Under which names trainers keep the weights, most usual first: detectron2, everybody, D2Go and
# fvcore, Lightning-like, Caffe2's Detectron.
WRAPPERS = ("model", "state_dict", "model_state", "model_state_dict", "blobs")
# The same for the exponential moving average of the weights.
EMA_WRAPPERS = ("model_ema", "ema_state_dict", "state_dict_ema", "ema_state", "ema_model", "ema")
_INNER_WRAPPERS = ("module", *WRAPPERS)
_PREFIX = "module."  # of torch's DistributedDataParallel
PADDLE_NAMES = "StructuredToParameterName@@"
PADDLE_SLICES = "UnpackBigParamInfor@@"


class WeightsFile(NamedTuple):
    """What a weights file holds.

    Attributes:
      arrays: as named in the file, after unwrapping; native byte order, bfloat16 widened.
      kind: of file, such as "PyTorch zip" or "safetensors".
      notes: what was unwrapped, left out or looks wrong (not a number), for people.
      sha256: of the whole file, in hexadecimal digits.
    """

    arrays: dict[str, np.ndarray]
    kind: str
    notes: list[str]
    sha256: str


class _Weights(NamedTuple):
    """The weights of a checkpoint.

    Attributes:
      arrays: by name, not read yet.
      slices: name -> (shape, names of the slices) of arrays that Paddle cut.
      notes: what was chosen, left out and renamed.
    """

    arrays: dict[str, StoredArray]
    slices: dict[str, tuple[tuple[int, ...], list[str]]]
    notes: list[str]


def read_weights_file(path: str | Path, prefer_ema: bool = False) -> WeightsFile:
    """Reads the arrays of a weights file; its kind is decided by its content.

    Args:
      path: the file.
      prefer_ema: take the moving average of the weights where a checkpoint holds both.

    Raises:
      FileNotFoundError: if there is no such file.
      WeightsFileError: if it is of no known kind, damaged, or asks for more than to be read.
    """
    path = Path(path)
    if path.is_dir():
        raise WeightsFileError(f"{path} is a folder; give a weights file ({KINDS})")
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}; give a file ({KINDS})")
    with path.open("rb") as file:
        try:
            kind, content = _open(file, path.stat().st_size)
            weights = content if isinstance(content, _Weights) else _unwrap(content, prefer_ema)
            arrays = _join(_read(weights.arrays, path.stat().st_size), weights.slices)
        except WeightsFileError as error:
            raise WeightsFileError(f"{path} cannot be read as weights: {error}") from error
        except (struct.error, zlib.error, UnicodeError, EOFError) as error:
            raise WeightsFileError(f"{path} is damaged: {error}; download it again") from error
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    notes = [*weights.notes, *_warnings(weights.arrays, arrays)]
    return WeightsFile(arrays, kind, notes, sha256)


def _open(file: BinaryIO, size: int) -> tuple[str, Any]:
    """The kind of a file, and its arrays or what its pickle holds; arrays stay in the file."""
    head = file.read(_HEAD_BYTES)
    file.seek(0)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        entries = ZipEntries(file, size)
        if is_torch_zip(entries):
            return "PyTorch zip", read_torch_zip(entries)
        return "npz", _Weights(read_npz(entries), {}, [])
    if head[:1] == b"\x80" and LEGACY_START in head[:32]:
        return "PyTorch legacy", read_torch_legacy(file, size)
    if head[4:9] == b"\0\0\0\0{":  # a header of less than 4 GB, which is a json
        return "safetensors", _Weights(read_safetensors(file, size), {}, [])
    for start, what in _STRANGERS.items():
        if head.startswith(start):
            raise WeightsFileError(f"it is {what}; expected one of: {KINDS}")
    if head[257:262] == b"ustar":
        raise WeightsFileError(
            "it is a tar file, as PyTorch wrote before version 0.1.10; load it with a PyTorch of "
            "today and save it again with torch.save"
        )
    if not head:
        raise WeightsFileError(f"it is empty; expected one of: {KINDS}")
    if head[:1] not in _PICKLE_STARTS:
        raise WeightsFileError(f"it starts with {head[:8]!r}; expected one of: {KINDS}")
    content = Unpickler(file, size).load()
    # Paddle's are flat, where detectron2's have wrappers.
    is_wrapped = isinstance(content, dict) and any(
        isinstance(content.get(name), dict) for name in WRAPPERS
    )
    return "Paddle" if isinstance(
        content, dict
    ) and not is_wrapped else "detectron2 pickle", content


def _read(stored: dict[str, StoredArray], file_size: int) -> dict[str, np.ndarray]:
    """Reads all arrays, after all of them were checked."""
    if not stored:
        raise WeightsFileError("it holds no arrays; give the file with the weights")
    faults = [
        f"{short(name)} has {fault}" for name, array in stored.items() if (fault := array.fault())
    ]
    if faults:
        raise WeightsFileError(
            f"arrays that are damaged or of no use: {listed(faults, between='; ')}"
        )
    total = sum(array.num_bytes for array in stored.values())
    most = max(INFLATED_BYTES, INFLATED_RATIO * file_size)
    if total > most:  # arrays may share their bytes, but not without end
        raise WeightsFileError(
            f"its arrays take {total} bytes, expected at most {most} of a file of {file_size}: "
            "they all share the same bytes, which no checkpoint does"
        )
    return {name: array.read() for name, array in stored.items()}


def _join(
    arrays: dict[str, np.ndarray], slices: dict[str, tuple[tuple[int, ...], list[str]]]
) -> dict[str, np.ndarray]:
    """Puts together the arrays that Paddle cut."""
    for name, (shape, parts) in slices.items():
        missing = [part for part in parts if part not in arrays]
        if missing or name in arrays:
            raise WeightsFileError(
                f"the slices of {short(name)} are not all there, or it is there twice: "
                f"{listed(map(short, missing))}"
            )
        flat = np.concatenate([arrays.pop(part).reshape(-1) for part in parts])
        if flat.size != math.prod(shape):
            raise WeightsFileError(
                f"the slices of {short(name)} have {flat.size} numbers, expected shape {shape}"
            )
        arrays[name] = flat.reshape(shape)
    return arrays


def _warnings(stored: dict[str, StoredArray], arrays: dict[str, np.ndarray]) -> list[str]:
    notes = []
    wide = [name for name, array in stored.items() if array.dtype == "bfloat16"]
    if wide:
        names = listed(map(short, wide), 3)
        notes.append(f"{len(wide)} arrays of bfloat16 widened to float32: {names}")
    odd = [
        name
        for name, array in arrays.items()
        if array.dtype.kind == "f" and not np.isfinite(array).all()
    ]
    if odd:
        notes.append(f"WARNING: {len(odd)} arrays hold NaN or infinity: {listed(map(short, odd))}")
    return notes


def _unwrap(content: Any, prefer_ema: bool) -> _Weights:
    """Finds the weights in what a pickle holds.

    The first of `WRAPPERS` that holds arrays is taken, else the first of `EMA_WRAPPERS`, else the
    content itself; with `prefer_ema` the averaged weights come first.

    Raises:
      WeightsFileError: if there are none, or objects of a foreign class among them.
    """
    if not isinstance(content, dict):
        raise WeightsFileError(
            f"it holds {_kind_of(content)}, expected a dict of arrays; save the state dict of the "
            "model (torch.save(model.state_dict(), FILE)) and give that"
        )
    weights, notes = _choose(content, prefer_ema)
    slices = _slices(weights.pop(PADDLE_SLICES, None))
    if isinstance(weights.pop(PADDLE_NAMES, None), dict):
        notes.append(f"left out {PADDLE_NAMES}, Paddle's table of internal names")
    arrays: dict[str, StoredArray] = {}
    foreign, others = [], []
    for name, value in weights.items():
        array = _array(value)
        if isinstance(name, str) and array is not None:
            arrays[name] = array.stored()
        else:
            rows = foreign if isinstance(value, Foreign | Name) else others
            rows.append(f"{_label(name)} ({_kind_of(value)})")
    if foreign:
        raise WeightsFileError(
            f"among the weights are objects that are no arrays: {listed(foreign, between='; ')}; "
            "nothing of them was run; expected a state dict of arrays"
        )
    if others:
        notes.append(f"left out {len(others)} entries that are no arrays: {listed(others)}")
    if arrays and all(name.startswith(_PREFIX) for name in arrays):
        arrays = {name.removeprefix(_PREFIX): array for name, array in arrays.items()}
        notes.append(f"stripped the prefix {_PREFIX} from all names")
    return _Weights(arrays, slices, notes)


def _choose(content: dict[Any, Any], prefer_ema: bool) -> tuple[dict[Any, Any], list[str]]:
    wrapped = {name: _inner(content.get(name)) for name in (*WRAPPERS, *EMA_WRAPPERS)}
    found = [name for name in (*WRAPPERS, *EMA_WRAPPERS) if wrapped[name] is not None]
    averaged = [name for name in found if name in EMA_WRAPPERS]
    if not found:
        if _has_arrays(content):
            return dict(content), []
        _refuse_without_arrays(content)
    taken = averaged[0] if prefer_ema and averaged else found[0]
    notes = [f"took the weights under {taken}"]
    if taken in averaged:
        notes[0] += ", a moving average"
    elif averaged:
        notes.append(
            f"left out the moving average under {averaged[0]}, though it may be what was evaluated"
            if "message_hub" not in content
            else f"left out {averaged[0]}: mmengine keeps the average under state_dict and the "
            "last weights there"
        )
    beside = [name for name in content if name != taken and name not in averaged]
    if beside:
        notes.append(f"not read, beside the weights: {listed(map(_label, beside))}")
    weights = wrapped[taken]
    assert weights is not None
    return dict(weights), notes


def _refuse_without_arrays(content: dict[Any, Any]) -> NoReturn:
    wrapped = [content.get(name) for name in (*WRAPPERS, *EMA_WRAPPERS)]
    objects = [
        f"{_label(name)} ({_kind_of(value)})"
        for part in (content, *wrapped)
        if isinstance(part, dict)
        for name, value in part.items()
        if isinstance(value, Foreign)
    ]
    keys = [short(name) for name in content if isinstance(name, str)]
    cure = "; if a whole model was saved, save its state_dict() and give that" if objects else ""
    raise WeightsFileError(
        "no arrays were found in it, expected them at the top or under one of "
        f"{', '.join((*WRAPPERS, *EMA_WRAPPERS))}; it has: "
        f"{listed(objects or keys) or 'nothing'}{cure}"
    )


def _inner(value: Any) -> dict[Any, Any] | None:
    """The dict of arrays that a wrapper holds, perhaps under one more."""
    for _ in range(2):
        if _has_arrays(value):
            return value
        if not isinstance(value, dict):
            return None
        value = next((value[name] for name in _INNER_WRAPPERS if name in value), None)
    return value if _has_arrays(value) else None


def _has_arrays(value: Any) -> bool:
    return isinstance(value, dict) and any(
        isinstance(name, str) and _array(entry) is not None for name, entry in value.items()
    )


def _array(value: Any) -> PickledTensor | PickledArray | None:
    """The array of a value; Paddle has some as (internal name, array)."""
    is_array = isinstance(value, PickledTensor | PickledArray)
    if not is_array and type(value) in (tuple, list) and len(value) == 2:
        value = value[1] if isinstance(value[0], str) else None
    return value if isinstance(value, PickledTensor | PickledArray) else None


def _slices(table: Any) -> dict[str, tuple[tuple[int, ...], list[str]]]:
    """Paddle's table of arrays above 1 GB, which it cuts into flat slices."""
    if table is None:
        return {}
    try:
        plan = {
            name: (tuple(entry["OriginShape"]), list(entry["slices"]))
            for name, entry in table.items()
        }
        is_whole = all(
            isinstance(name, str)
            and all(type(size) is int and size >= 0 for size in shape)
            and parts
            and all(isinstance(part, str) for part in parts)
            for name, (shape, parts) in plan.items()
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        is_whole, plan = False, {}
    if not is_whole:
        raise WeightsFileError(f"{PADDLE_SLICES}, Paddle's table of slices, is damaged")
    return plan


def _label(name: Any) -> str:
    return short(name) if isinstance(name, str) else _kind_of(name)


def _kind_of(value: Any) -> str:
    if isinstance(value, Foreign | Name):
        return f"an object of {short(value.path)}"
    if isinstance(value, PickledTensor | PickledArray):
        return "a single array"
    return type(value).__name__
