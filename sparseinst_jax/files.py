"""Write files whole or not at all, and refuse folders that cannot be written, with a cure."""

from __future__ import annotations

import os
from pathlib import Path


def replace_file(path: str | os.PathLike, content: bytes) -> None:
    """Write a file under a temporary name in its folder (made if missing), then rename it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
        what = "is a file" if place.is_file() else "is no folder"
        reason = f"{place} {what}" if place != folder else f"it {what}"
    elif not os.access(place, os.W_OK | os.X_OK):
        reason = f"no permission to write in {place}"
    else:
        return
    raise ValueError(
        f"the folder {folder} cannot be written: {reason}. Give another one by {option}, or change "
        "the permissions."
    )
