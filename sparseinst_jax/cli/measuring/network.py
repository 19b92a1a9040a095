"""What a network holds, computes and keeps in memory, part by part; nothing is computed."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sparseinst_jax.cli.measuring import machine
from sparseinst_jax.models.complexity import Parameters, count_macs, count_parameters
from sparseinst_jax.models.trees import functional


def describe(model: nnx.Module, size: tuple[int, int], batch: int) -> dict[str, Any]:
    """Everything about a network at one size, as plain values.

    Args:
      model: of any family; its arrays need no numbers.
      size: (height, width) of the padded image, multiples of 32.
      batch: images that go through together.
    """
    apply, params, statistics = functional(model)
    images = jax.ShapeDtypeStruct((batch, *size, 3), jnp.float32)
    given = params, statistics, images
    forward = jax.jit(lambda p, s, x: apply(p, s, x, train=False)[0])
    executable = forward.lower(*given).compile()
    counted = {"gflops": machine.compiled_gflops(executable)}
    listed = parts(model, size)
    return {
        "size": size,
        "batch": batch,
        "parts": listed,
        "gflops_analytic": 2 * listed[-1]["gmacs"] * batch,
        "xla": counted | machine.compiled_memory(executable),
        "activations": activations(apply, *given),
        "training_residual_mib": residual_mib(apply, *given),
    }


def parts(model: nnx.Module, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Count what each part holds and computes: stages of the backbone, branches, the whole.

    Returns:
      For each `name` ("all" is the whole and comes last), the numbers of `complexity.Parameters`
      and `gmacs`, billions of multiply-accumulates of one image.
    """
    macs = count_macs(model, *size)
    stages = [path for path in macs if path.startswith("backbone/") and path.count("/") == 1]
    branches = [path for path in macs if path.startswith("decoder/") and path.count("/") == 1]
    names = [n for n in (*stages, "backbone", "encoder", *branches, "decoder", "") if n in macs]
    listed = []
    for name in names:
        node: Any = model
        for step in filter(None, name.split("/")):
            node = getattr(node, step)
        blocks = [node] if isinstance(node, nnx.Module) else list(node)  # a stage is a list
        counts = zip(*map(count_parameters, blocks), strict=True)
        held = Parameters(*map(sum, counts))._asdict()
        listed.append({"name": name or "all", **held, "gmacs": macs[name] / 1e9})
    return listed


def activations(apply: Any, params: Any, statistics: Any, images: Any) -> list[dict[str, Any]]:
    """List the named tensors of a forward pass in its order, then its outputs, with their sizes.

    Args:
      apply: the network's pure function, from `models.trees.functional`.
      params: its parameters, or their shapes.
      statistics: the same.
      images: shape and type of the normalised images [B, H, W, 3].
    """
    found: dict[str, Any] = {}

    def forward(params: Any, statistics: Any, x: jax.Array) -> None:
        outputs, _ = apply(params, statistics, x, train=False, intermediates=found)
        found.update(outputs._asdict())

    jax.eval_shape(forward, params, statistics, images)  # tracing fills `found`
    return [
        {"name": name, "shape": leaf.shape, "mib": _mib(leaf)}
        for name, leaf in found.items()
        if leaf is not None
    ]


def residual_mib(apply: Any, params: Any, statistics: Any, images: Any) -> float:
    """Return what training keeps between its two halves, without the parameters, in MiB."""

    def first_half(params: Any, statistics: Any, x: jax.Array) -> Any:
        return jax.vjp(lambda p: apply(p, statistics, x, train=True)[0], params)[1]

    kept = jax.eval_shape(first_half, params, statistics, images)
    own = sum(map(_mib, jax.tree.leaves((params, statistics))))
    return max(sum(map(_mib, jax.tree.leaves(kept))) - own, 0.0)


def _mib(leaf: Any) -> float:
    return math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize / machine.MIB
