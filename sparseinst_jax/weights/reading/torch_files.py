"""Files of `torch.save`: the zip of today and the legacy format, read without torch.

The pickle says which tensor lies where in which storage; the storages are runs of numbers beside
it. Nothing of a storage is read before a tensor in it is asked for.

Source: PyTorch's `torch/serialization.py` (`_save`, `_legacy_save`).
"""

from __future__ import annotations

import io
import struct
from typing import Any, BinaryIO

from sparseinst_jax.weights.reading.pickled_values import Storage, storage_of
from sparseinst_jax.weights.reading.pickles import Unpickler
from sparseinst_jax.weights.reading.plain_files import ZipEntries
from sparseinst_jax.weights.reading.stored_arrays import (
    ITEM_SIZES,
    DamagedFileError,
    Piece,
    WeightsFileError,
    short,
)

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_START = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number, behind the protocol
_PICKLE_NAME = "data.pkl"
_LEGACY_PROTOCOL = 1001


def is_torch_zip(entries: ZipEntries) -> bool:
    """Whether a zip is one of `torch.save` (or of TorchScript)."""
    return any(name.rpartition("/")[2] == _PICKLE_NAME for name in entries.names)


def read_torch_zip(entries: ZipEntries) -> Any:
    """What was saved, with `PickledTensor` for its tensors.

    Raises a WeightsFileError if it is damaged, or a TorchScript program.
    """
    pickles = [name for name in entries.names if name.rpartition("/")[2] == _PICKLE_NAME]
    folder = pickles[0].removesuffix(_PICKLE_NAME)
    if len(pickles) > 1:
        raise WeightsFileError(f"two checkpoints in one zip: {short(pickles)}, expected one")
    if any(name.startswith((f"{folder}code/", f"{folder}constants.pkl")) for name in entries.names):
        raise WeightsFileError(
            "it is a TorchScript program, expected a state dict; load it with torch.jit.load and "
            "save its state_dict() with torch.save"
        )
    is_big_endian = _byte_order(entries, f"{folder}byteorder") == b"big"
    storages: dict[str, Storage] = {}

    def storage(identity: Any) -> Storage:
        kind, name, size, _ = _identified(identity)
        if name not in storages:
            entry = f"{folder}data/{name}"
            if entry not in entries:
                raise WeightsFileError(f"the zip has no entry {short(entry)}, which a tensor needs")
            new = storage_of(kind, name, size)
            new.piece, new.is_big_endian = entries.piece(entry), is_big_endian
            _check_size(new, new.piece.size)
            storages[name] = new
        return storages[name]

    piece = entries.piece(pickles[0])
    file, start = piece.file, piece.start
    file = io.BytesIO(file) if isinstance(file, bytes) else file
    file.seek(start)
    return Unpickler(file, start + piece.size, storage).load()


def _byte_order(entries: ZipEntries, name: str) -> bytes:
    """The content of the small entry, which old files lack: they are little-endian."""
    if name not in entries:
        return b"little"
    order = entries.piece(name).read().tobytes()[:8]
    if order not in (b"little", b"big"):
        raise WeightsFileError(f"the byte order {order!r}, expected little or big")
    return order


def _identified(identity: Any) -> tuple[Any, str, Any, Any]:
    """What a persistent id says of a storage: class, name, size in numbers, part of another."""
    if type(identity) is not tuple or len(identity) not in (5, 6) or identity[0] != "storage":
        raise WeightsFileError(
            f"the pickle refers to something that is no storage ({type(identity).__name__})"
        )
    _, kind, name, _, size, *view = identity
    if not isinstance(name, str):
        raise WeightsFileError("the pickle refers to a storage without a name")
    return kind, name, size, view[0] if view else None


def _check_size(storage: Storage, num_bytes: int) -> None:
    if num_bytes < storage.num_bytes:
        what = f"the storage {short(storage.name)} claims {storage.num_bytes} bytes"
        raise DamagedFileError(f"{what}, but the file has {num_bytes} for it")


def read_torch_legacy(file: BinaryIO, size: int) -> Any:
    """What was saved, with `PickledTensor` for its tensors; a WeightsFileError if it is damaged."""
    storages: dict[str, Storage] = {}
    views: dict[tuple[str, int, int], Storage] = {}

    def storage(identity: Any) -> object:
        if type(identity) is tuple and len(identity) > 1 and identity[0] == "module":
            return identity[1]  # a class with its source, of which only the name is of use
        kind, name, num_numbers, part = _identified(identity)
        if name not in storages:
            storages[name] = storage_of(kind, name, num_numbers)
        root = storages[name]
        if part is None:
            return root
        _, start, length = part
        if type(start) is not int or type(length) is not int or min(start, length) < 0:
            raise WeightsFileError(f"a view of the storage {short(root.name)} has no whole place")
        item = ITEM_SIZES.get(root.dtype or "", 1)
        view = Storage(root.name, root.dtype, length * item)
        return views.setdefault((name, start, length), view)

    unpickler = Unpickler(file, size, storage)
    if unpickler.load() != LEGACY_MAGIC or unpickler.load() != _LEGACY_PROTOCOL:
        raise WeightsFileError("a PyTorch file of an unknown version, expected protocol 1001")
    system = unpickler.load()
    is_little_endian = not isinstance(system, dict) or system.get("little_endian") is not False
    content = unpickler.load()
    _place(file, size, unpickler.load(), storages, not is_little_endian)
    for (name, start, length), view in views.items():
        root = storages[name].piece
        assert root is not None
        offset = start * ITEM_SIZES.get(view.dtype or "", 1)
        if offset + view.num_bytes > root.size:
            what = f"a view of the storage {short(name)} claims {length} numbers from {start}"
            raise DamagedFileError(f"{what}, more than the storage has")
        view.piece = Piece(root.file, root.start + offset, view.num_bytes)
        view.is_big_endian = not is_little_endian
    return content


def _place(
    file: BinaryIO, size: int, names: Any, storages: dict[str, Storage], is_big_endian: bool
) -> None:
    """Says where each storage lies: they follow the pickles, each behind a count of numbers."""
    if type(names) is not list or not all(isinstance(name, str) for name in names):
        raise DamagedFileError("the list of storages is no list of names")
    if len(names) != len(storages) or set(names) != storages.keys():
        raise DamagedFileError("the list of storages is another one than that of the tensors")
    for name in names:
        storage = storages[name]
        start = file.tell() + 8
        count = struct.unpack(">q" if is_big_endian else "<q", file.read(8))[0]
        if storage.dtype not in ITEM_SIZES:
            raise WeightsFileError(
                f"the storage {short(name)} is a {short(storage.dtype)}, expected one of "
                f"{', '.join(ITEM_SIZES)}"
            )
        item = ITEM_SIZES[storage.dtype]
        if count * item != storage.num_bytes:
            what = f"the storage {short(name)} has {count} numbers"
            raise DamagedFileError(f"{what}, but its tensors expect {storage.num_bytes // item}")
        _check_size(storage, size - start)
        storage.piece = Piece(file, start, storage.num_bytes)
        storage.is_big_endian = is_big_endian
        file.seek(start + storage.num_bytes)
