"""Networks to export: the published ones, made narrow, with weights that find objects."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sparseinst_jax.export.writer import write_onnx
from sparseinst_jax.inference.predictor import Predictor
from sparseinst_jax.models.families import FAMILIES
from sparseinst_jax.models.trees import functional
from sparseinst_jax.setup.builders import build_model
from sparseinst_jax.setup.config import load_config
from sparseinst_jax.setup.loading import build_predictor
from sparseinst_jax.weights.convert import original_shapes, original_to_ours
from tests.parity import golden_weights

ROOT = Path(__file__).parents[1]
NUM_CLASSES = 5
SIZE = (96, 128)  # short and long side of resized photos
_SPARSEINST = dict(encoder_channels=16, decoder_channels=16, decoder_convs=2, kernel_dim=8)
_SPARSEINST |= dict(num_masks=12)
_FASTINST = dict(channels=16, num_queries=9, num_auxiliary=3, num_heads=2, ffn_width=24)


def narrow(name: str, **changes: Any) -> Any:
    """A published configuration with few channels; `norm` changes the backbone's."""
    config = load_config(name)
    with config.unlocked():
        model, backbone = config.model, config.model.backbone
        model.update(_FASTINST if model.family == "fastinst" else _SPARSEINST)
        model.dtype = "float32"
        if backbone.name == "pvt":
            backbone.update(embed_dims=(8, 8, 20, 16), stage_depths=(1, 1, 1, 1))
        elif backbone.name == "efficientnet_lite":
            backbone.update(stage_channels=(8, 8, 8, 8, 12, 12, 16), stage_depths=(1, 2) + (1,) * 5)
        else:
            backbone.update(width=8, stage_depths=(1,) * len(backbone.stage_depths))
        if norm := changes.pop("norm", None):
            backbone.norm = norm
        model.update(changes)
        config.data.eval_size = SIZE
    return config


def published(load: Callable[[str], Any] = narrow) -> list[str]:
    """Names of configurations, one for each different network, as `load` makes them."""
    found: dict[str, str] = {}
    for path in sorted((ROOT / "configs").glob("*.py")):
        if path.stem.startswith(("__init__", "shapes", "tiny", "finetune")) or "base" in path.stem:
            continue
        model = load(path.stem).model.to_dict()
        found.setdefault(str(model | {"dtype": "float32"}), path.stem)
    return list(found.values())


def predictor_of(config: Any) -> Predictor:
    """A predictor with weights drawn by the rules of the golden checks."""
    names = FAMILIES[config.model.family].weights
    apply, *trees = functional(build_model(config.model, NUM_CLASSES, seed=0))
    drawn = golden_weights.make(original_shapes(*trees, names), 7)
    params, statistics = original_to_ours(drawn, *trees, names, source="drawn")
    words = [f"class {i}" for i in range(NUM_CLASSES)]
    return build_predictor(config, apply, params, statistics, words, range(1, NUM_CLASSES + 1))


def written(config: Any, size: Any = None) -> Any:
    """The ONNX model of a narrow network."""
    source = predictor_of(config).exportable(size)
    return write_onnx(source.module, source.options, source.metadata(), size)


@functools.cache
def photos() -> list[np.ndarray]:
    """Three photos, padded to different sizes: wide, high, and a square one of odd sides."""
    return [golden_weights.image(*size, 3) for size in ((120, 160), (160, 121), (97, 97))]
