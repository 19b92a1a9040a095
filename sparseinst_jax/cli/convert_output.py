"""Write converted weights: a checkpoint, or a file of arrays; whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparseinst_jax.checkpoints.state import TrainState
from sparseinst_jax.checkpoints.store import Checkpoints
from sparseinst_jax.models.functional import Tree
from sparseinst_jax.runtime.files import check_writable
from sparseinst_jax.weights.convert import named_arrays

OURS, ORIGINAL = "ours", "original"
# A folder may have a dot in its name, but who gives one of these means a file.
_OTHER_FILES = (".npz", ".pth", ".pt", ".pkl", ".pdparams", ".ckpt", ".bin", ".h5", ".json")
_KINDS = {
    OURS: "a folder for a checkpoint, or a .safetensors file",
    ORIGINAL: "a .safetensors or .npz file",
}


def check_output(output: Path, form: str) -> None:
    """Refuse an output that exists, that cannot be written or that is of no known kind.

    Raises:
      ValueError: says which.
    """
    if output.exists():
        raise ValueError(f"--output {output} exists: give another one, or move it away.")
    if form == OURS:
        is_known = output.suffix not in _OTHER_FILES
    else:
        is_known = output.suffix in (".safetensors", ".npz")
    if not is_known:
        raise ValueError(
            f"--output must be {_KINDS[form]} where weights are written with --to {form}, got "
            f"{output}."
        )
    check_writable(output.parent, "--output")


def write_checkpoint(output: Path, params: Tree, statistics: Tree, meta: Mapping[str, Any]) -> None:
    """Write a run folder with one checkpoint, of step 0, that holds weights and no optimizer."""

    def write(temporary: Path) -> None:
        with Checkpoints(temporary) as checkpoints:
            checkpoints.save(TrainState(np.int32(0), params, statistics, None), meta)

    _write_whole(output, write)


def write_arrays(
    output: Path, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any] | None = None
) -> None:
    """Write a `.safetensors` file, with facts as json in its header, or a `.npz` file."""
    plain = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    texts = {key: json.dumps(value) for key, value in (facts or {}).items()}

    def write(temporary: Path) -> None:
        if output.suffix == ".npz":
            with temporary.open("wb") as file:
                np.savez(file, **plain)  # type: ignore[arg-type]
        else:
            from safetensors.numpy import save_file

            save_file(plain, temporary, metadata=texts)

    _write_whole(output, write)


def write_ours(output: Path, params: Tree, statistics: Tree, meta: Mapping[str, Any]) -> None:
    """Write weights under our names: a checkpoint or, by its suffix, a `.safetensors` file."""
    if output.suffix == ".safetensors":
        write_arrays(output, named_arrays(params, statistics), meta)
    else:
        write_checkpoint(output, params, statistics, meta)


def _write_whole(output: Path, write: Callable[[Path], None]) -> None:
    """Write under a temporary name beside the output, then rename."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.rename(temporary, output)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)
