"""`sparseinst_jax.load`: a predictor of whatever a path leads to; JAX only where it is needed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseinst_jax.runner.file_predictor import DEFAULT_RUNTIME, FilePredictor
from sparseinst_jax.runner.onnx_file import SUFFIX

if TYPE_CHECKING:
    from sparseinst_jax.inference.predictor import Predictor


def load(
    path: str | os.PathLike,
    step: int | str | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    config: str | os.PathLike | None = None,
    runtime: str | None = None,
    model: Any = None,
) -> Predictor | FilePredictor:
    """Load a predictor from a run, whose configuration and classes are stored with it.

    Or by the name of a published model, such as "giam_r50_aug", whose weights are downloaded the
    first time (`setup.published`); from a file that `sparseinst export` wrote, which needs no JAX;
    or from a weights file of any implementation, with `config`: see
    `setup.loading.load_weights_file`.

    Args:
        path: a run folder, its `checkpoints` folder, the folder of one step, a name of
            `sparseinst download --list`, an exported `.onnx` file, or a weights file.
        step: a step, "best" (highest AP in training) or None for the last.
        overrides: dotted key to a value or its text, such as `{"data.eval_size": (320, 427)}`.
        config: of a weights file: the configuration that describes its network, such as "giam_r50".
        model: of a run that trained a module given to `fit`: such a module; its weights do not
            matter.
        runtime: of an exported file: "onnxruntime", the default, "openvino" or "openvino_bf16".

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: the checkpoint or file cannot be read, an override is not valid, or it asks for
            another network than the checkpoint's.
    """
    file = Path(path).expanduser()
    if file.suffix.lower() == SUFFIX:
        if step is not None or config is not None or overrides:
            raise ValueError(
                f"{file} holds its configuration and one state: leave out step, config and"
                " overrides, or export it again with them"
            )
        return FilePredictor(file, runtime or DEFAULT_RUNTIME)
    if runtime is not None:
        raise ValueError(
            f"{path} is computed by JAX: runtime={runtime!r} is for a {SUFFIX} file, see"
            " `sparseinst export`"
        )
    from sparseinst_jax.setup.loading import load_checkpoint

    return load_checkpoint(path, step, overrides, config=config, model=model)
