"""From a config to objects: the one place where names become classes."""

from __future__ import annotations

import inspect
from typing import Any, get_args

import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparseinst_jax.models.backbones.cspdarknet import CSPDarkNet
from sparseinst_jax.models.backbones.pvt import PyramidVisionTransformer
from sparseinst_jax.models.backbones.resnet import ResNet
from sparseinst_jax.models.sparseinst.model import Normalizer, SparseInst
from sparseinst_jax.models.sparseinst.objective import SparseInstObjective
from sparseinst_jax.runtime.messages import brief

BACKBONES = {"resnet": ResNet, "cspdarknet": CSPDarkNet, "pvt": PyramidVisionTransformer}
FAMILIES = {"sparseinst": (SparseInst, SparseInstObjective)}

# A configuration of each backbone, for who set its name alone.
_EXAMPLES = {"resnet": "giam_r50", "cspdarknet": "giam_cspdarknet53", "pvt": "giam_pvt_b1"}
DTYPES = ("float32", "bfloat16")
SIZES = (
    "encoder_channels",
    "decoder_channels",
    "decoder_convs",
    "num_masks",
    "num_groups",
    "kernel_dim",
)


# Nobody needs these; a configuration that came with a checkpoint may hold any number.
MAX_SIZE, MAX_CONVS = 1 << 16, 1 << 8


def check_model(model_config: Any) -> None:
    """Refuse values of `config.model` that no network can have.

    Raises:
      ValueError: all faults in one message.
    """
    choices = {
        "family": (model_config.family, FAMILIES),
        "normalizer": (model_config.normalizer, get_args(Normalizer)),
        "dtype": (model_config.dtype, DTYPES),
    }
    faults = [
        f"model.{key} must be one of {', '.join(known)}, got {value!r}"
        for key, (value, known) in choices.items()
        if value not in known
    ]
    for key in SIZES:
        value, most = model_config[key], MAX_CONVS if key == "decoder_convs" else MAX_SIZE
        if type(value) is not int:
            faults.append(f"model.{key} must be an integer, got {brief(value)}")
        elif not 1 <= value <= most:
            limit = "at least 1" if value < 1 else f"at most {most}"
            faults.append(f"model.{key} must be {limit}, got {brief(value)}")
    faults += [f"model.backbone.{fault}" for fault in _backbone_faults(**model_config.backbone)]
    if faults:
        raise ValueError("this network cannot be built:\n  " + "\n  ".join(faults))


def _backbone_faults(name: str, **options: Any) -> list[str]:
    if name not in BACKBONES:
        return [f"name must be one of {', '.join(BACKBONES)}, got {name!r}"]
    arguments = inspect.signature(BACKBONES[name].__init__).parameters
    known = [key for key in arguments if key not in ("self", "frozen_stages", "dtype", "rng")]
    unknown = [key for key in options if key not in known]
    if unknown:
        return [
            f"name is {name!r}, which has no {', '.join(unknown)}; it has {', '.join(known)}. Start"
            f" from a configuration of that backbone, such as configs/{_EXAMPLES[name]}.py"
        ]
    return BACKBONES[name].faults(**{key: arguments[key].default for key in known} | options)


class _NoNumbers(np.ndarray):
    """Zeros of any shape in four bytes; what is computed from them is such an array again."""

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **_: Any) -> np.ndarray:
        return _no_numbers(np.broadcast_shapes(*map(np.shape, inputs)))


def _no_numbers(shape: tuple[int, ...], _: Any = None) -> np.ndarray:
    return np.broadcast_to(np.float32(0), shape).view(_NoNumbers)


class _NoDraws:
    """In the place of a random generator where only the shapes of weights matter."""

    random = standard_normal = staticmethod(_no_numbers)


def build_model(
    model_config: Any, num_classes: int, seed: int | None, frozen_stages: int = 0
) -> nnx.Module:
    """Build the model of `config.model` with fresh weights.

    Args:
      model_config: `config.model`; every key but the names is a constructor's argument.
      num_classes: K, from the data set or the checkpoint.
      seed: of the initial weights; None draws none: at once and without memory, for a model whose
        weights come from elsewhere.
      frozen_stages: of the backbone, for training.

    Raises:
      ValueError: see `check_model`.
    """
    check_model(model_config)
    rng: Any = _NoDraws() if seed is None else np.random.default_rng(seed)
    options = dict(model_config)
    model_class, _ = FAMILIES[options.pop("family")]
    dtype = jnp.dtype(options.pop("dtype"))
    backbone_options = dict(options.pop("backbone"))
    backbone_class = BACKBONES[backbone_options.pop("name")]
    backbone = backbone_class(**backbone_options, frozen_stages=frozen_stages, dtype=dtype, rng=rng)
    return model_class(backbone, num_classes=num_classes, **options, dtype=dtype, rng=rng)


def build_objective(config: Any, apply: Any) -> Any:
    """Build the training objective of `config` around a model's pure function."""
    _, objective_class = FAMILIES[config.model.family]
    return objective_class(apply, config.model.num_masks, **dict(config.objective))
