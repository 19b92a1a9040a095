"""Folders of checkpoints: where they are, which are complete, and renaming of unreadable ones."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from sparseinst_jax.runtime.files import unreadable_name


def locate(path: str | Path) -> tuple[Path, int | None]:
    """Find the checkpoints below a run folder, a `checkpoints` folder or one step's folder.

    Returns:
      The folder that holds the steps, and the step if the path names one.

    Raises:
      FileNotFoundError: the path holds no checkpoint.
    """
    path = Path(path).resolve()
    if path.name.isdigit() and (path / "model").is_dir():
        return path.parent, int(path.name)
    for folder in (path / "checkpoints", path):
        if folder.is_dir() and any(is_step(child) for child in folder.iterdir()):
            return folder, None
    raise FileNotFoundError(
        f"no checkpoint in {path}: expected a run folder with checkpoints/<step>/, that folder,"
        " or one step's folder. Train first, or give the right path."
    )


def is_step(path: Path) -> bool:
    """Whether a folder has the name of a step's folder."""
    return path.name.isdigit() and path.is_dir()


def whole_steps(directory: Path) -> list[int]:
    """Steps on disk; a folder gets its name when everything in it is written."""
    try:
        return sorted(int(path.name) for path in directory.iterdir() if is_step(path))
    except OSError:  # the folder itself is gone
        return []


def has_bad_metrics(folder: Path) -> bool:
    """Whether the metrics of a step, which Orbax reads when it opens, are unreadable."""
    file = folder / "metrics" / "metrics"
    try:
        json.loads(file.read_text() if file.exists() else "{}")
    except (ValueError, OSError):
        return True
    return False


def set_aside(folders: Sequence[Path]) -> None:
    """Rename unreadable checkpoints, so that the continued run can save those steps again."""
    if folders and jax.process_count() > 1:
        raise ValueError(
            f"{[str(folder) for folder in folders]} cannot be read. Several hosts cannot agree to"
            " rename them: remove them, then start again."
        )
    for folder in folders:
        target = unreadable_name(folder)
        folder.rename(target)
        print(f"{folder} cannot be read and is now {target.name}", file=sys.stderr)
