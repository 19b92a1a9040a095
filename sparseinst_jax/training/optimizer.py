"""AdamW with the original's parameter groups, and its learning rate schedule."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

# The original exempts a parameter from weight decay by a word in its name, and nothing else:
# biases of convolutions and linear layers do decay.
_NO_DECAY_WORDS = ("norm", "patch_embed", "cls_token")


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


def decay_mask(params: Mapping[str, Any], frozen: Sequence[str] = ()) -> dict[str, Any]:
    """Tell which parameters decay: True unless the path holds one of the original's words.

    Paths mirror the original's names (`backbone/res2/0/conv1/norm/scale`), so that its rule
    applies to them as it stands. Nor does anything decay below the paths in `frozen`.
    """
    branches = tuple(f"{path}/" for path in frozen)

    def visit(node: Mapping[str, Any], path: str) -> dict[str, Any]:
        return {
            key: visit(value, f"{path}{key}/")
            if isinstance(value, Mapping)
            else not (path.startswith(branches) or any(w in path + key for w in _NO_DECAY_WORDS))
            for key, value in node.items()
        }

    return visit(params, "")


def make_optimizer(
    params: Mapping[str, Any],
    learning_rate: Callable[[jax.typing.ArrayLike], jax.Array] | float,
    weight_decay: float,
    gradient_clip_norm: float = 0.0,
    frozen: Sequence[str] = (),
) -> optax.GradientTransformation:
    """Make PyTorch's AdamW (betas 0.9 and 0.999, epsilon 1e-8) with the original's groups.

    p <- p - lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * p), the last term only where
    `decay_mask` says so.

    Args:
      params: nested dict of arrays; only its names are used.
      learning_rate: a number, or a function of the 0-based step.
      weight_decay: per unit of learning rate.
      gradient_clip_norm: a gradient with a longer norm over all parameters is scaled down to it
        before it reaches the moments; 0 (the original's recipes) clips nothing.
      frozen: paths, such as "backbone/stem", below which every gradient is zero; with no weight
        decay there, their parameters stay as they are.
    """
    adamw = optax.adamw(
        learning_rate,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=weight_decay,
        mask=decay_mask(params, frozen),
    )
    if gradient_clip_norm == 0:
        return adamw
    return optax.chain(optax.clip_by_global_norm(gradient_clip_norm), adamw)
