"""Write files whole or not at all, and refuse folders that cannot be written, with a cure."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sparseinst_jax.runtime.messages import listed
from sparseinst_jax.runtime.pages import page

_LOCK = "run.lock"


class FolderInUseError(ValueError):
    """Another process writes in the folder."""

    exit_code = 73  # EX_CANTCREAT of sysexits.h


class FolderLock:
    """Keep other processes from writing in a folder while this one does; readers need no lock.

    It is `flock` on a file in the folder, which says who holds it: the system releases the lock
    when the process ends, however that happens. Network drives pass it on to other machines where
    their server knows locks (NFS does). Where there are none a line says so.

    Args:
        folder: must exist.
        option: what the user gave it by, for the message.

    Raises:
        FolderInUseError: names the host, the process and its start.
    """

    def __init__(self, folder: Path, option: str):
        self._path = folder / _LOCK
        while True:
            self._file = self._path.open("a+")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._file.seek(0)
                holder = self._file.read(300).strip() or "it has not said which"
                self._file.close()
                raise FolderInUseError(
                    f"another process trains in {folder} ({holder}). End it or wait for it, or"
                    f" give another {option}; {self._path} says who it is, and needs no cleaning"
                    f" {page('in-use')}"
                ) from None
            except OSError as error:
                print(
                    f"WARNING: {folder} cannot be locked ({error.strerror}): a second start on it"
                    " would not be noticed",
                    file=sys.stderr,
                )
            with contextlib.suppress(FileNotFoundError):  # its last holder has just removed it
                if os.path.samestat(os.fstat(self._file.fileno()), self._path.stat()):
                    break
            self._file.close()
        now = datetime.datetime.now(datetime.UTC).isoformat(" ", "seconds")
        with contextlib.suppress(OSError):  # a full disk: the lock holds without the words
            self._file.truncate(0)
            self._file.write(f"host {socket.gethostname()}, process {os.getpid()}, since {now}\n")
            self._file.flush()

    def release(self) -> None:
        """Remove the file and let others in."""
        self._path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._file.close()


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a temporary path beside another, whose folder is made if missing.

    The file or folder that is written there takes the place of the other when the block ends well,
    and is removed otherwise. A file is on the disk before: after a power cut it is the old or the
    new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if temporary.is_file():
            sync(temporary)
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def replace_file(path: str | os.PathLike, content: bytes) -> None:
    """Write a file whole or not at all; its folder is made if missing.

    Where the system has files without a name, as Linux does, a process that is killed while it
    writes leaves nothing behind.
    """
    with written_whole(Path(path)) as temporary:
        if not _written_unnamed(temporary, content):
            temporary.write_bytes(content)


def _written_unnamed(path: Path, content: bytes) -> bool:
    """Write a file that gets its name when it is whole; False where the system has no such."""
    try:
        number = os.open(path.parent, os.O_TMPFILE | os.O_WRONLY, 0o666)
    except (AttributeError, OSError):  # not on Linux; not on this file system
        return False
    with os.fdopen(number, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(number)
        try:
            os.link(f"/proc/self/fd/{number}", path, follow_symlinks=True)
        except OSError:  # no /proc
            return False
    return True


def keep_beside(path: Path, faults: Sequence[str]) -> None:
    """Copy a file that holds what cannot be read, before it is written anew, and say why."""
    copy = unreadable_name(path)
    shutil.copy2(path, copy)
    print(
        f"WARNING: {path}: {listed(faults, 3, '; ')}. The other rows are kept; the file as it was"
        f" is now {copy.name}",
        file=sys.stderr,
        flush=True,
    )


def unreadable_name(path: Path) -> Path:
    """A free name beside a file or folder that cannot be read, to keep it under."""
    names = (path.with_name(f"{path.name}.unreadable{end}") for end in ("", *range(1, 1000)))
    return next(name for name in names if not name.exists())


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk, where the file system can say so."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:  # some network drives cannot; others report here what they lost
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(number)


def sha256_of(path: str | os.PathLike) -> str:
    """The sha256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: str | os.PathLike, value: Any, indent: int | None = None) -> None:
    """Write a json file whole or not at all."""
    replace_file(path, (json.dumps(value, indent=indent) + "\n").encode())


def read_json(path: str | os.PathLike, what: str, cure: str) -> Any:
    """Read a json file.

    Args:
        path: of the file.
        what: what a message calls it, such as "annotations file".
        cure: what a message proposes.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is a folder, empty, cut off or no json.
    """
    path = Path(path)
    check_json_file(path, what, cure)
    content = path.read_bytes()
    if not content.strip():
        raise ValueError(f"{what} {path} is empty ({len(content)} bytes); {cure}")
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        is_cut = error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated")
        place = f"line {error.lineno}, column {error.colno}"
        raise ValueError(broken_json(path, what, cure, error.msg, place, is_cut)) from error
    except RecursionError:
        reason = "lists or objects are nested too deeply"
        raise ValueError(broken_json(path, what, cure, reason)) from None
    except ValueError as error:  # text that cannot be decoded, an integer of too many digits
        raise ValueError(broken_json(path, what, cure, str(error))) from error


def check_json_file(path: Path, what: str, cure: str) -> None:
    """Refuse a path that leads to no file; see `read_json`."""
    if path.is_dir():
        raise ValueError(f"{what} {path} is a folder; {cure}")
    if path.exists() and not path.is_file():
        raise ValueError(f"{what} {path} is a device or a pipe, expected a file; {cure}")
    if not path.is_file():
        raise FileNotFoundError(f"{what} {path} does not exist; {cure}")


def broken_json(
    path: Path, what: str, cure: str, reason: str, place: str = "", is_cut: bool = False
) -> str:
    """Describe what is wrong with the text of a json file.

    Args:
        path: of the file.
        what: see `read_json`.
        cure: see `read_json`.
        reason: of Python's parser.
        place: line and column; "" where the text cannot even be decoded.
        is_cut: the text ends before the value does.
    """
    if not place:
        return f"{what} {path} is not a json: {reason}; {cure}"
    if is_cut:
        reason, cure = f"it ends in the middle, after {place}", f"copy it again, or {cure}"
    else:
        reason = f"{reason} at {place}"
    return f"{what} {path} is not a whole json: {reason}; {cure}"


def cache_folder(name: str) -> Path | None:
    """The folder for files that can be made again, `~/.cache/sparseinst_jax/NAME`; may not exist.

    None where nothing can be kept: the user has no home (in a container, nor an entry among the
    system's users), or it may not be written.
    """
    try:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(root) / "sparseinst_jax" / name
        check_writable(folder, "XDG_CACHE_HOME")
    except (RuntimeError, ValueError):
        return None
    return folder


def check_writable(folder: str | os.PathLike, option: str) -> None:
    """Refuse a folder that files could not be written into; nothing is made or left behind.

    Args:
        folder: need not exist; then its nearest existing parent is asked.
        option: what the user gave it by, for the message.

    Raises:
        ValueError: it, or a parent, is a file or may not be written.
    """
    folder = Path(folder)
    place = Path(os.path.abspath(folder))
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        reason, cure = f"{place} is a file, not a folder", "move the file away"
    elif not os.access(place, os.W_OK | os.X_OK):
        reason, cure = f"no permission to write in {place}", "change the permissions"
    else:
        return
    raise ValueError(
        f"the folder {folder} cannot be written: {reason}. Give another one by {option}, or {cure}."
    )


def check_output(path: Path, suffix: str) -> None:
    """Refuse an `--output` that is no file of a kind, or whose folder cannot be written.

    Raises:
        ValueError: says what is wrong.
    """
    if path.suffix.lower() != suffix or path.is_dir():
        raise ValueError(f"--output must be a {suffix} file, got {path}")
    check_writable(path.parent, "--output")


def make_folder(folder: Path, option: str) -> list[Path]:
    """Make a folder and those above it; returns what was made, the deepest first.

    Raises:
        ValueError: see `check_writable`.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    check_writable(folder, option)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # such as a file system that takes no folders
        raise ValueError(
            f"the folder {folder} cannot be made: {error.strerror}. Give another one by {option}."
        ) from error
    return missing


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders that are empty, in this order; the others stay."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def unique_names(paths: Sequence[str | Path]) -> list[str]:
    """Name each file by its stem; the second of the same stem gets `_2`, and so on."""
    taken: set[str] = set()
    names = []
    for path in paths:
        stem = Path(path).stem
        name, number = stem, 1
        while name in taken:
            number += 1
            name = f"{stem}_{number}"
        taken.add(name)
        names.append(name)
    return names
