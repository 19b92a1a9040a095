"""Loss terms as pure functions of logits and targets, elementwise or one value per mask.

All are float32. None divides by a count: the objective does, by counts of the global batch.
`counted` (bool, in the shape of the masks or broadcast to it) leaves pixels out of a mask's terms;
without it every pixel counts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

DICE_EPSILON = 1e-4
IOU_EPSILON = 1e-6


def binary_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Return -t log σ(x) - (1 - t) log(1 - σ(x)), elementwise and stable; targets may be soft."""
    return jnp.maximum(logits, 0) - logits * targets + jnp.log1p(jnp.exp(-jnp.abs(logits)))


def focal_loss(
    logits: jax.Array, targets: jax.Array, alpha: float = 0.25, gamma: float = 2.0
) -> jax.Array:
    """Return α_t (1 - p_t)^γ BCE, elementwise.

    Source: Lin et al., arXiv:1708.02002, Eq. 5, with the sigmoid form's α_t = α t + (1-α)(1-t).
    """
    probs = jax.nn.sigmoid(logits)
    p_t = probs * targets + (1 - probs) * (1 - targets)
    alpha_t = alpha * targets + (1 - alpha) * (1 - targets)
    return alpha_t * (1 - p_t) ** gamma * binary_cross_entropy(logits, targets)


def _only(values: jax.Array, counted: jax.Array | None) -> jax.Array:
    """Return the values, 0 where they do not count; no gradient passes there."""
    return values if counted is None else jnp.where(counted, values, jnp.zeros_like(values))


def dice_loss(
    mask_logits: jax.Array, targets: jax.Array, counted: jax.Array | None = None
) -> jax.Array:
    """Return 1 - 2<p,t> / (<p,p> + <t,t> + 1e-4) for each mask.

    Source: SparseInst, the dice coefficient of the matching score; squares in the denominator.

    Args:
      mask_logits: [..., H, W].
      targets: [..., H, W], 0..1.
      counted: pixels that count.

    Returns:
      [...], 0 for equal masks, near 1 for disjoint ones.
    """
    probs = _only(jax.nn.sigmoid(mask_logits), counted)
    targets = _only(targets, counted)
    overlap = (probs * targets).sum((-2, -1))
    squares = jnp.square(probs).sum((-2, -1)) + jnp.square(targets).sum((-2, -1))
    return 1 - 2 * overlap / (squares + DICE_EPSILON)


def mask_cross_entropy(
    mask_logits: jax.Array, targets: jax.Array, counted: jax.Array | None = None
) -> jax.Array:
    """Return each mask's binary cross entropy, the mean of the pixels that count: [...]."""
    pixels = binary_cross_entropy(mask_logits, targets)
    if counted is None:
        return pixels.mean((-2, -1))
    number = jnp.broadcast_to(counted, pixels.shape).sum((-2, -1))
    return _only(pixels, counted).sum((-2, -1)) / jnp.maximum(number, 1)


def dice_matrix(
    mask_logits: jax.Array, targets: jax.Array, counted: jax.Array | None = None
) -> jax.Array:
    """Return the dice coefficient of every prediction with every target, [B, N, M].

    Args:
      mask_logits: [B, N, H, W].
      targets: [B, M, H, W], 0..1.
      counted: [B, 1, H, W], pixels that count.
    """
    probs = _only(jax.nn.sigmoid(mask_logits), counted)
    targets = _only(targets, counted)
    overlap = jnp.einsum("bnhw,bmhw->bnm", probs, targets, precision="highest")
    predicted, wanted = jnp.square(probs).sum((2, 3)), jnp.square(targets).sum((2, 3))
    return 2 * overlap / (predicted[:, :, None] + wanted[:, None, :] + DICE_EPSILON)


def mask_iou(
    mask_logits: jax.Array,
    targets: jax.Array,
    threshold: float = 0.4,
    counted: jax.Array | None = None,
) -> jax.Array:
    """Return the IoU of each mask cut at `threshold` with its target cut at 0.5, no gradient.

    The threshold of training (0.4) is not that of inference (0.45), as in the reference.

    Args:
      mask_logits: [..., H, W].
      targets: [..., H, W], 0..1.
      threshold: probability from which on a pixel belongs to the predicted mask.
      counted: pixels that count.
    """
    predicted = _only(jax.nn.sigmoid(mask_logits) >= threshold, counted)
    wanted = _only(targets > 0.5, counted)
    intersection = (predicted & wanted).sum((-2, -1)).astype(jnp.float32)
    union = (predicted | wanted).sum((-2, -1)).astype(jnp.float32)
    return jax.lax.stop_gradient(intersection / (union + IOU_EPSILON))
