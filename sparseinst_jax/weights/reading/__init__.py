"""Weight files of every ecosystem, recognised by content and not by name.

Neither torch nor paddle is needed, and nothing in a file is run: pickles are read by
`pickles`, which knows no way to call anything. Sizes are compared with the file before memory is
allocated, so what is refused is refused at once.
"""

from __future__ import annotations

import math
import struct
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from sparseinst_jax.runtime.files import sha256_of
from sparseinst_jax.runtime.messages import listed
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
from sparseinst_jax.weights.reading.trainer_content import (
    FileClasses,
    TrainerContent,
    find_classes,
    find_weights,
    has_wrapper,
)

KINDS = ".pth and .pkl of PyTorch or detectron2, .pdparams of Paddle, .npz, .safetensors"
# The one kind that only the name tells: its content is that of a .pdparams.
LAST_OF_PADDLE = ".pdema"
_LAST_OF_PADDLE_IS = (
    "the last weights of a training with a moving average: PaddleDetection writes the average, "
    "which it evaluates and publishes, to the .pdparams beside it"
)
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


class WeightsFile(NamedTuple):
    """What a weights file holds.

    Attributes:
      arrays: as named in the file, after unwrapping; native byte order, bfloat16 widened.
      kind: of file, such as "PyTorch zip" or "safetensors".
      notes: what was unwrapped, left out or looks wrong (not a number), for people.
      sha256: of the whole file, in hexadecimal digits.
      classes: that the file names; None where it does not.
    """

    arrays: dict[str, np.ndarray]
    kind: str
    notes: list[str]
    sha256: str
    classes: FileClasses | None = None


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
    if prefer_ema and path.suffix == LAST_OF_PADDLE:
        raise WeightsFileError(f"{path} is no moving average, but {_LAST_OF_PADDLE_IS}")
    with path.open("rb") as file:
        try:
            kind, content = _open(file, path.stat().st_size)
            weights = content
            if not isinstance(content, TrainerContent):
                weights = find_weights(content, prefer_ema, is_paddle=kind == "Paddle")
            arrays = _join(_read(weights.arrays, path.stat().st_size), weights.slices)
        except WeightsFileError as error:
            raise WeightsFileError(f"{path} cannot be read as weights: {error}") from error
        except (struct.error, zlib.error, UnicodeError, EOFError) as error:
            raise WeightsFileError(f"{path} is damaged: {error}; download it again") from error
    notes = [*weights.notes, *_warnings(weights.arrays, arrays)]
    if path.suffix == LAST_OF_PADDLE:
        notes.append(f"a {LAST_OF_PADDLE}, {_LAST_OF_PADDLE_IS}")
    return WeightsFile(arrays, kind, notes, sha256_of(path), weights.classes)


def _open(file: BinaryIO, size: int) -> tuple[str, Any]:
    """The kind of a file, and its arrays or what its pickle holds; arrays stay in the file."""
    head = file.read(_HEAD_BYTES)
    file.seek(0)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        entries = ZipEntries(file, size)
        if is_torch_zip(entries):
            return "PyTorch zip", read_torch_zip(entries)
        return "npz", TrainerContent(read_npz(entries), {}, [])
    if head[:1] == b"\x80" and LEGACY_START in head[:32]:
        return "PyTorch legacy", read_torch_legacy(file, size)
    if head[4:9] == b"\0\0\0\0{":  # a header of less than 4 GB, which is a json
        arrays, facts = read_safetensors(file, size)
        return "safetensors", TrainerContent(arrays, {}, [], find_classes(facts))
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
    is_flat = isinstance(content, dict) and not has_wrapper(content)
    return "Paddle" if is_flat else "detectron2 pickle", content


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
