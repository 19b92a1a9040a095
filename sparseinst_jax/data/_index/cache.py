"""Cache the index of a large json on disk, so that the next run opens it instead of building it.

Small jsons are read each time. Of a large one the columns go to a folder that is named by the
hash of the json's bytes, so a json that was changed is another one, and a copy of it is the same.
Other rules have folders of their own. A folder is written under another name and renamed when it
is whole and on the disk; one that is not byte for byte what was written is built again.
"""

import contextlib
import os
import re
import shutil
import sys
import tempfile
import time
import weakref
from pathlib import Path

from sparseinst_jax.data._index.columns import FORMAT, CocoIndex, open_index
from sparseinst_jax.data._index.reader import build_index
from sparseinst_jax.runtime.files import cache_folder, sha256_of, sync

# Raise it when another index comes of the same json: a rule, a fault, a message. A test reminds.
RULES = 2
VARIABLE = "SPARSEINST_INDEX_CACHE"  # a folder; "off" keeps nothing
MIN_SIZE = 8 << 20  # bytes of a json that takes about half a second
MAX_SIZE = 20 << 30  # bytes of all folders together
MIN_AGE = 7 * 24 * 3600  # seconds since the last use; younger ones are never removed
_NEW = ".sparseinst-new-"  # being written
# All that is ever removed.
_OURS = re.compile(r"[0-9a-f]{32}-[0-9a-f]{8}|\.sparseinst-(new|old)-\w+")


def read_index(path: Path) -> CocoIndex:
    """Read the index of an existing json, from the cache if it is there.

    When a large json is read, lines on standard error tell the user.

    Raises:
        ValueError: it is no COCO json.
    """
    size = path.stat().st_size
    if size < MIN_SIZE:
        return build_index(path, None)
    root = _root()
    folder = None if root is None else root / _key(path)
    if folder is not None:
        if (found := _open(folder)) is not None:
            return found
        if folder.exists():
            _print(f"the index of {path} kept in {folder} is damaged; it is built again")
    _print(f"indexing {path} ({size / 1e6:.0f} MB) ...")
    start = time.monotonic()
    index = _build(path, folder)
    is_kept = folder is not None and index.folder == str(folder)
    _print(
        f"indexed {len(index.columns['image_ids'])} images, "
        f"{len(index.columns['annotation_ids'])} annotations in {time.monotonic() - start:.1f} s"
        + f"; kept in {folder}"
        * is_kept
    )
    return index


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _root() -> Path | None:
    """The folder of the cache; None if nothing is to be cached."""
    chosen = os.environ.get(VARIABLE, "")
    if chosen.lower() in ("off", "0"):
        return None
    return Path(chosen) if chosen else cache_folder("index")


def _key(path: Path) -> str:
    """Name the folder of an index by the bytes of its json, the format and the rules."""
    return f"{sha256_of(path)[:32]}-{FORMAT:04x}{RULES:04x}"


def _open(folder: Path) -> CocoIndex | None:
    """Open a cached index; None if it is missing or damaged."""
    try:
        index = open_index(folder)
    except (ValueError, KeyError, TypeError, OSError):
        return None
    with contextlib.suppress(OSError):  # a cache that may only be read serves as well
        os.utime(folder)
    return index


def _build(path: Path, folder: Path | None) -> CocoIndex:
    """Build an index in its folder of the cache, or in a temporary one, or in memory."""
    if folder is not None:
        try:
            return _build_kept(path, folder)
        except OSError as error:
            reason = error.strerror or error
            _print(
                f"the index cannot be kept in {folder.parent} ({reason}): a temporary folder "
                f"holds it. {VARIABLE}=FOLDER names another place, {VARIABLE}=off none"
            )
    try:
        return _build_temporary(path)
    except OSError:  # no room there either
        return build_index(path, None)


def _build_temporary(path: Path) -> CocoIndex:
    """Build an index in a folder that is removed with the process."""
    folder = tempfile.mkdtemp(prefix="sparseinst-index-")
    try:
        index = build_index(path, Path(folder))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    # When the columns are no longer used, or the process ends.
    weakref.finalize(index.columns["image_ids"], shutil.rmtree, folder, ignore_errors=True)
    return index


def _build_kept(path: Path, folder: Path) -> CocoIndex:
    root = folder.parent
    root.mkdir(parents=True, exist_ok=True)
    _prune(root)
    temporary = Path(tempfile.mkdtemp(prefix=_NEW, dir=root))
    try:
        build_index(path, temporary)
        if folder.name != _key(path):
            raise OSError(f"{path} has changed meanwhile")
        for written in (*temporary.iterdir(), temporary):
            sync(written)
        if _open(folder) is None:  # else another process was faster
            shutil.rmtree(folder, ignore_errors=True)  # damaged; who has it mapped reads on
            with contextlib.suppress(OSError):  # now another process was
                os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    index = _open(folder)
    if index is None:
        raise OSError(f"{folder} cannot be read again")
    return index


def _prune(root: Path) -> None:
    """Remove what was not used for long, the oldest first, until the rest is small enough.

    What a process has mapped stays readable to it.
    """
    with contextlib.suppress(OSError):
        kept = sorted(
            (folder.stat().st_mtime, folder, sum(file.stat().st_size for file in folder.iterdir()))
            for folder in root.iterdir()
            if _OURS.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink()
        )
        total = sum(size for *_, size in kept)
        for used, folder, size in kept:
            is_left_over = folder.name.startswith(".")
            if time.time() - used > MIN_AGE and (total > MAX_SIZE or is_left_over):
                shutil.rmtree(folder, ignore_errors=True)
                total -= size
