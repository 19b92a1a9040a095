"""The runtimes that compute an exported graph, by name."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]


Source = Path | bytes


def open_onnxruntime(source: Source) -> Run:
    """Open a file, or its content, with onnxruntime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # warnings are about our constants, which it folds itself
    session = onnxruntime.InferenceSession(
        _given(source), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]

    def run(images: np.ndarray, valid_size: np.ndarray) -> dict[str, np.ndarray]:
        given = {"images": images, "valid_size": valid_size}
        found: Any = session.run(None, given)
        return dict(zip(names, found, strict=True))

    return run


def _given(source: Source) -> str | bytes:
    return source if isinstance(source, bytes) else os.fspath(source)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Import OpenVINO as if its telemetry were not installed: the import alone would send a line.

    It forks for that, too, which a process with threads does not survive well.
    """
    name = "openvino_telemetry"
    is_ours = name not in sys.modules
    if is_ours:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if is_ours:
            del sys.modules[name]


def open_openvino(source: Source, precision: str = "f32") -> Run:
    """Open a file, or its content, with OpenVINO, on the CPU.

    Args:
      source: path or bytes.
      precision: of computation. OpenVINO's own default is bf16 on CPUs that have it: twice as fast,
        but other masks; here it is never a default.
    """
    with _silent():
        import openvino

    core = openvino.Core()
    hints = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    model = core.compile_model(core.read_model(_given(source)), "CPU", hints)
    names = [output.any_name for output in model.outputs]

    def run(images: np.ndarray, valid_size: np.ndarray) -> dict[str, np.ndarray]:
        found: Any = model({"images": images, "valid_size": valid_size}, share_inputs=True)
        return {name: np.array(found[name]) for name in names}

    return run


RUNTIMES: dict[str, Callable[[Source], Run]] = {
    "onnxruntime": open_onnxruntime,
    "openvino": open_openvino,
    "openvino_bf16": lambda source: open_openvino(source, "bf16"),
}


def open_session(source: Source, runtime: str) -> Run:
    """Open a checked file.

    Raises:
      ValueError: there is no such runtime, it is not installed, or it cannot open the file.
    """
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime must be one of {', '.join(RUNTIMES)}, got {runtime!r}")
    try:
        return RUNTIMES[runtime](source)
    except ImportError as error:
        package = runtime.partition("_")[0]
        raise ValueError(
            f"the runtime {package} is not installed ({error}): pip install {package}, or"
            f" `pip install 'sparseinst_jax[export]'` for all of them"
        ) from error
    except Exception as error:  # each runtime has its own types, for what is wrong with a file
        reason = str(error).strip().splitlines()
        name = "the content" if isinstance(source, bytes) else source
        raise ValueError(
            f"{runtime} cannot open {name}: {' '.join(reason)[:500] if reason else error!r}; export"
            " it again, or try another runtime"
        ) from error
