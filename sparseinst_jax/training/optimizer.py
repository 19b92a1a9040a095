"""AdamW with the parameter groups that a model asks for, and the learning rate schedule."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import path_aware_map


class ParameterRules(NamedTuple):
    """Which parameters of a model are trained differently from the rest.

    Paths mirror the original's names: `backbone/res2/0/conv1/norm/scale`.

    Attributes:
      frozen: paths, such as "backbone/stem", below which every gradient is zero; with no weight
        decay there, their parameters stay as they are.
      undecayed: words; a parameter whose path holds one has no weight decay.
      rate_factors: pairs of a path, such as "backbone", and what the learning rate of every
        parameter below it is multiplied by; of several that fit, the product.
    """

    frozen: tuple[str, ...] = ()
    undecayed: tuple[str, ...] = ()
    rate_factors: tuple[tuple[str, float], ...] = ()


def rules_of(model: Any, backbone_rate: float = 1.0, class_rate: float = 1.0) -> ParameterRules:
    """Get a model's rules; see `models.family.Family.model` for what it may say.

    Args:
      model: the network.
      backbone_rate: one more factor of the learning rate in the backbone.
      class_rate: the same for the class layers.

    Raises:
      ValueError: the model does not say which its class layers are, and they are to have a rate.
    """
    factors = tuple(getattr(model, "learning_rate_factors", ()))
    if backbone_rate != 1:
        factors += (("backbone", backbone_rate),)
    if class_rate != 1:
        if not (layers := getattr(model, "class_layers", ())):
            raise ValueError(
                f"train.class_rate={class_rate} needs a model that says which parameters these are"
                f" by `class_layers`, which {type(model).__name__} does not: set it to 1"
            )
        factors += tuple((layer, class_rate) for layer in layers)
    backbone = getattr(model, "backbone", None)
    return ParameterRules(
        tuple(f"backbone/{name}" for name in getattr(backbone, "frozen_names", ())),
        tuple(getattr(model, "undecayed", ())),
        factors,
    )


def make_schedule(
    learning_rate: float,
    warmup_steps: int,
    warmup_factor: float,
    milestones: Sequence[int],
    lr_decay: float,
) -> Callable[[jax.typing.ArrayLike], jax.Array]:
    """Make the learning rate as a function of the 0-based step; it can be compiled.

    lr(i) = learning_rate * warmup(i) * lr_decay^(number of milestones <= i), where
    warmup(i) = warmup_factor * (1 - i / warmup_steps) + i / warmup_steps for i < warmup_steps.

    Source: detectron2 `WarmupMultiStepLR` with linear warm-up, which the original trains with.

    Args:
      learning_rate: after the warm-up, before the first milestone.
      warmup_steps: length of the warm-up in steps; 0 for none.
      warmup_factor: fraction of the learning rate at step 0.
      milestones: increasing steps from which on the rate is multiplied by `lr_decay` once more.
      lr_decay: factor at each milestone.

    Returns:
      A function from an integer step to a float32 scalar.

    Raises:
      ValueError: the milestones do not increase.
    """
    if list(milestones) != sorted(set(milestones)):
        raise ValueError(f"train.milestones must be increasing steps, got {tuple(milestones)}.")
    rates = [learning_rate * lr_decay**k for k in range(len(milestones) + 1)]

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step)
        passed = jnp.sum(step >= jnp.asarray(milestones, jnp.int32)) if milestones else 0
        rate = jnp.asarray(rates, jnp.float32)[passed]
        if warmup_steps == 0:
            return rate
        alpha = jnp.minimum(step.astype(jnp.float32) / warmup_steps, 1.0)
        return rate * (warmup_factor * (1.0 - alpha) + alpha)

    return schedule


def moving_average(average: Any, new: Any, decay: float, step: jax.typing.ArrayLike) -> Any:
    """Move an exponential average of weights towards those after a step.

    average <- d * average + (1 - d) * new with d = min(decay, (1 + t) / (10 + t)): in the first
    steps the average follows the weights closely.

    Source: PaddleDetection's `ModelEMA`, which its recipes with EMA use.
    Differs from the reference: the average starts at the first weights and not at zero, so that
    nothing is to be corrected when it is used.

    Args:
      average: tree of float32 arrays; whole numbers in it are taken from `new`.
      new: tree of the same form.
      decay: d after the first steps.
      step: t, the 0-based step that made `new`.
    """
    step = jnp.asarray(step, jnp.float32)
    share = 1.0 - jnp.minimum(decay, (1.0 + step) / (10.0 + step))

    def move(a, b):
        if not jnp.issubdtype(jnp.result_type(b), jnp.floating):
            return b  # a counter among the statistics
        return a + share * (b - a)  # a difference, so that what stays does not drift by rounding

    return jax.tree.map(move, average, new)


def decay_mask(params: Mapping[str, Any], rules: ParameterRules) -> Mapping[str, Any]:
    """Mark the parameters that decay: True unless undecayed or frozen."""

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        is_undecayed = any(word in "/".join(path) for word in rules.undecayed)
        return not is_undecayed and not any(_is_below(path, parent) for parent in rules.frozen)

    return path_aware_map(decays, params)


def _is_below(path: tuple[Any, ...], parent: str) -> bool:
    return "/".join(path).startswith(f"{parent}/")


def make_optimizer(
    params: Mapping[str, Any],
    learning_rate: Callable[[jax.typing.ArrayLike], jax.Array] | float,
    weight_decay: float,
    gradient_clip_norm: float = 0.0,
    rules: ParameterRules | None = None,
) -> optax.GradientTransformation:
    """Make PyTorch's AdamW (betas 0.9 and 0.999, epsilon 1e-8) with a model's parameter groups.

    p <- p - f * lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * p), the last term only where
    `decay_mask` says so; f is the parameter's rate factor, mostly 1.

    Args:
      params: nested dict of arrays; only its names are used.
      learning_rate: a number, or a function of the 0-based step.
      weight_decay: per unit of learning rate.
      gradient_clip_norm: a gradient with a longer norm over all parameters is scaled down to it
        before it reaches the moments; 0 (the original's recipes) clips nothing.
      rules: of the model; by default every parameter is trained alike.
    """
    rules = rules or ParameterRules()
    parts: list[optax.GradientTransformation] = [
        optax.adamw(
            learning_rate,
            b1=0.9,
            b2=0.999,
            eps=1e-8,
            weight_decay=weight_decay,
            mask=decay_mask(params, rules),
        )
    ]
    if gradient_clip_norm > 0:
        parts.insert(0, optax.clip_by_global_norm(gradient_clip_norm))
    if rules.rate_factors:
        parts.append(_scale_updates(params, rules.rate_factors))
    return parts[0] if len(parts) == 1 else optax.chain(*parts)


def _scale_updates(
    params: Mapping[str, Any], rate_factors: Sequence[tuple[str, float]]
) -> optax.GradientTransformation:
    def factor(path: tuple[Any, ...], _: Any) -> float:
        return math.prod(value for parent, value in rate_factors if _is_below(path, parent))

    factors = path_aware_map(factor, params)
    return optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, factors))
