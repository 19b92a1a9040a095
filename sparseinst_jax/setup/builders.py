"""From a configuration to objects: the one place where names become classes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparseinst_jax.models.families import BACKBONES, FAMILIES
from sparseinst_jax.models.family import Family

# A configuration of each backbone, for users who set only its name.
_EXAMPLES = {
    "resnet": "giam_r50",
    "cspdarknet": "giam_cspdarknet53",
    "pvt": "giam_pvt_b1",
    "efficientnet_lite": "giam_lite0",
}
DTYPES = ("float32", "bfloat16")
_REST = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
# What constructors are given by `build_model`, not by the options of a configuration.
_GIVEN = ("self", "backbone", "num_classes", "frozen_stages", "dtype", "rng")


def check_model(model_config: Any) -> None:
    """Refuse invalid values of `config.model`.

    Raises:
      ValueError: all faults in one message.
    """
    options = dict(model_config)
    family, dtype, backbone = (options.pop(key) for key in ("family", "dtype", "backbone"))
    faults = [
        f"{key} must be one of {', '.join(known)}, got {value!r}"
        for key, value, known in (("family", family, FAMILIES), ("dtype", dtype, DTYPES))
        if value not in known
    ]
    if family in FAMILIES:
        faults += _option_faults("family", family, FAMILIES[family], options)
    faults += [f"backbone.{fault}" for fault in _backbone_faults(**backbone)]
    if faults:
        raise ValueError(
            "this network cannot be built:\n  " + "\n  ".join(f"model.{fault}" for fault in faults)
        )


def _backbone_faults(name: str, **options: Any) -> list[str]:
    if name not in BACKBONES:
        return [f"name must be one of {', '.join(BACKBONES)}, got {name!r}"]
    example = f"that backbone, such as {_EXAMPLES[name]}" if name in _EXAMPLES else "that backbone"
    return _option_faults("name", name, BACKBONES[name], options, example)


def _option_faults(
    key: str, name: str, kind: Any, options: Mapping[str, Any], example: str = "that family"
) -> list[str]:
    """List options that a family or backbone does not have, or what is wrong with them."""
    arguments = _arguments(kind.model if isinstance(kind, Family) else kind)
    known = [option for option in arguments if option not in _GIVEN]
    unknown = [option for option in options if option not in known]
    if unknown:
        return [
            f"{key} is {name!r}, which has no {', '.join(unknown)}; it has {', '.join(known)}."
            f" Start from a configuration of {example}"
        ]
    missing = [o for o in known if arguments[o].default is inspect.Parameter.empty]
    if missing := [option for option in missing if option not in options]:
        return [f"{key} is {name!r}, which needs a value of {', '.join(missing)}"]
    faults = getattr(kind, "faults", None)  # a backbone from elsewhere may have none
    defaults = {option: arguments[option].default for option in known}
    return faults(**defaults | dict(options)) if faults else []


def _arguments(maker: Any) -> dict[str, inspect.Parameter]:
    """Arguments by name; where a constructor takes `**options`, those of its base class too."""
    makers = [maker]
    if isinstance(maker, type):
        makers = [base.__init__ for base in maker.__mro__ if "__init__" in vars(base)]
    found: dict[str, inspect.Parameter] = {}
    for make in makers:
        arguments = inspect.signature(make).parameters
        found = {name: each for name, each in arguments.items() if each.kind not in _REST} | found
        if not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in arguments.values()):
            break
    return found


# Weights that come from elsewhere need shapes alone. `nnx.eval_shape` would not save the drawing,
# which is NumPy's and is not traced: it takes 1.0 s and 130 MB for a ResNet-50, this 0.1 s.


class _NoNumbers(np.ndarray):
    """Zeros of any shape in four bytes; what is computed from them is such an array again."""

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **_: Any) -> np.ndarray:
        return _no_numbers(np.broadcast_shapes(*map(np.shape, inputs)))


def _no_numbers(shape: tuple[int, ...], _: Any = None) -> np.ndarray:
    return np.broadcast_to(np.float32(0), shape).view(_NoNumbers)


class _NoDraws(np.random.Generator):
    """A random generator that does not draw weights as `models.layers` does; else as any other."""

    random = standard_normal = staticmethod(_no_numbers)  # type: ignore[assignment]


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
    bits = np.random.PCG64(seed or 0)
    rng: Any = _NoDraws(bits) if seed is None else np.random.default_rng(seed)
    options = dict(model_config)
    make = FAMILIES[options.pop("family")].model
    dtype = jnp.dtype(options.pop("dtype"))
    backbone_options = dict(options.pop("backbone"))
    backbone_class = BACKBONES[backbone_options.pop("name")]
    if frozen_stages:  # a backbone from elsewhere may know no stages
        backbone_options["frozen_stages"] = frozen_stages
    backbone = backbone_class(**backbone_options, dtype=dtype, rng=rng)
    return make(backbone, num_classes=num_classes, **options, dtype=dtype, rng=rng)


def build_objective(config: Any, apply: Any) -> Any:
    """Build the training objective of `config` around a model's pure function."""
    family = FAMILIES[config.model.family]
    return family.objective(apply, model_options(config.model), **dict(config.objective))


def model_options(model_config: Any) -> dict[str, Any]:
    """The part of `config.model` that belongs to the family."""
    return {
        key: value
        for key, value in dict(model_config).items()
        if key not in ("family", "backbone", "dtype")
    }


def num_masks(config: Any) -> int:
    """The most objects that the network finds in a photo, in its parts together if it has such."""
    masks = FAMILIES[config.model.family].num_masks(model_options(config.model))
    return round(masks * config.eval.get("zoom", 1.0) ** 2)
