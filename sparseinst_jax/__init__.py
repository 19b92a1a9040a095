"""SparseInst in JAX and Flax: real-time instance segmentation without boxes or NMS.

`sparseinst_jax.load(RUN)` gives a predictor; see README.md. Importing this package starts neither
JAX nor a device: what it gives is loaded when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparseinst_jax.inference.prediction import Prediction
    from sparseinst_jax.inference.predictor import Predictor
    from sparseinst_jax.setup.loading import load

__all__ = ["Prediction", "Predictor", "load"]

_HOMES = {
    "Prediction": "sparseinst_jax.inference.prediction",
    "Predictor": "sparseinst_jax.inference.predictor",
    "load": "sparseinst_jax.setup.loading",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module, with the process prepared for JAX."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module("sparseinst_jax.runtime.process").prepare()
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
