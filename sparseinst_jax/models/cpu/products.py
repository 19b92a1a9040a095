"""Products of two matrices, as XLA:CPU is fast at them in either compute type."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return a @ b [M, N] in float32, for operands of one type.

    With a float32 result XLA:CPU multiplies bfloat16 by the processor's own instructions; with a
    bfloat16 result it does not. [8208, 512] @ [512, 256], milliseconds of one core of a Xeon with
    AMX, jax 0.10.2: 22.8 in float32, 29.8 in bfloat16, 4.5 in bfloat16 with this result.
    """
    return jnp.dot(a, b, preferred_element_type=jnp.float32)
