"""The rule of `file_name`: a path inside the image folder, and a regular file there.

A json is often somebody else's. What it names is opened, decoded and drawn, so it must not lead to
other files of the machine, nor to a device or a pipe that never ends.
"""

import os
import re
import stat
from pathlib import PureWindowsPath

from sparseinst_jax.runtime.messages import acting_character, brief

MAX_NAME = 4096  # letters of a file_name: no path may be longer on Linux
_SUSPECT = re.compile(r"^$|^[/\\]|^[A-Za-z]:|://|(?:^|[/\\])\.\.(?:[/\\]|$)")
_CURE = "move the images into the image folder, and name them relative to it in the json"


class PathError(ValueError):
    """An image file that may not be opened."""


def name_fault(name: str) -> str | None:
    """Say why a `file_name` cannot lie in the image folder; None where it can.

    No file is looked at.
    """
    letter = acting_character(name)
    if letter is None and len(name) <= MAX_NAME and not _SUSPECT.search(name):
        return None
    if len(name) > MAX_NAME:
        return f"file_name has {len(name)} letters, a path has at most {MAX_NAME}: {brief(name)}"
    if letter is not None:
        return f"file_name {brief(name)} holds the control character {letter!r}; rename the file"
    windows = PureWindowsPath(name)
    if not name:
        reason = "is empty"
    elif "://" in name:
        reason = "is an address, not a file: nothing is downloaded"
    elif name[0] in "/\\" or windows.is_absolute():
        reason = "is an absolute path"
    elif ".." in windows.parts:
        reason = "leads upwards by '..'"
    elif windows.drive:
        reason = "names a drive"
    else:
        return None
    return f"file_name {brief(name)} {reason}; {_CURE}"


def refuse_outside(folder: str, path: str) -> None:
    """Make sure that a path below a folder does not leave it by a symbolic link.

    The folder itself may be reached by links. A file that does not exist passes.

    Raises:
        PathError: it leaves the folder.
    """
    root, target = os.path.realpath(folder), os.path.realpath(path)
    if target != root and not target.startswith(os.path.join(root, "")):
        raise PathError(
            f"image {path} leads by a symbolic link to {target}, out of the image folder {folder}; "
            "copy the file into the folder, or give as image folder the one that holds it"
        )


def refuse_no_regular_file(path: str | os.PathLike, name: object = None) -> None:
    """Refuse folders, devices, pipes and sockets before they are opened: a pipe would wait.

    Raises:
        PathError: says what it is.
        FileNotFoundError: there is nothing.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kinds = (
            (stat.S_ISDIR, "a folder"),
            (stat.S_ISFIFO, "a pipe"),
            (stat.S_ISSOCK, "a socket"),
        )
        kind = next((kind for is_kind, kind in kinds if is_kind(mode)), "a device")
        raise PathError(f"image {path if name is None else name} is {kind}; expected a file")


class FolderRule:
    """`refuse_outside` for the many files of one folder, asked fast."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._has_passed: set[str] = set()  # folders below it

    def state(self, path: str) -> tuple[bool, str | None]:
        """Whether there is a regular file, and why it may not be opened all the same."""
        try:
            mode = os.lstat(path).st_mode
            parent = os.path.dirname(path)
            if stat.S_ISLNK(mode) or parent not in self._has_passed:
                refuse_outside(self._folder, path)
                if not stat.S_ISLNK(mode):
                    self._has_passed.add(parent)
            refuse_no_regular_file(path)
        except PathError as error:
            return True, str(error)
        except (OSError, ValueError):  # ValueError: a zero byte in the path
            return False, None
        return True, None
