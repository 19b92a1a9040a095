"""What a network holds, computes and keeps in memory, part by part; nothing is computed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sparseinst_jax.cli.measuring import machine
from sparseinst_jax.models import layers
from sparseinst_jax.models.complexity import Parameters, count_macs, count_parameters

PARTS = (
    "backbone",
    "encoder",
    "decoder/inst_branch",
    "decoder/mask_branch",
    "decoder",
)


class Part(NamedTuple):
    """A module of the network.

    Attributes:
      name: its path; "" is the whole network.
      parameters: see `complexity.Parameters`.
      gmacs: billions of multiply-accumulates of one image.
    """

    name: str
    parameters: Parameters
    gmacs: float


def parts(model: nnx.Module, size: tuple[int, int]) -> list[Part]:
    """Count what each part holds and computes; the whole comes last.

    Args:
      model: a SparseInst; shapes can stand for its arrays.
      size: (height, width) of the padded image, multiples of 32.
    """
    macs = count_macs(model, *size)
    modules = {
        "/".join(map(str, path)): node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Module)
    }
    stages = [path for path in macs if path.startswith("backbone/") and path.count("/") == 1]
    names = [name for name in (*stages, *PARTS, "") if name in macs]
    return [
        Part(name, _parameters(modules.get(name), model, name), macs[name] / 1e9) for name in names
    ]


def _parameters(module: nnx.Module | None, model: nnx.Module, path: str) -> Parameters:
    if module is not None:
        return count_parameters(module)
    node: Any = model
    for name in path.split("/"):  # a stage is a list of blocks
        node = getattr(node, name)
    counts = [count_parameters(block) for block in node]
    return Parameters(*map(sum, zip(*counts, strict=True)))


class Tensor(NamedTuple):
    """A tensor on the way through the network, in the order of the computation."""

    name: str
    shape: tuple[int, ...]
    mib: float


def activations(
    apply: Callable[..., Any], params: Any, statistics: Any, images: jax.ShapeDtypeStruct
) -> list[Tensor]:
    """List the named tensors of a forward pass and its outputs, with their sizes.

    Args:
      apply: the network's pure function, from `layers.functional`.
      params: its parameters, or their shapes.
      statistics: likewise.
      images: shape and type of the normalised images [B, H, W, 3].
    """

    def forward(params: Any, statistics: Any, x: jax.Array) -> dict[str, jax.Array]:
        named: dict[str, jax.Array] = {}
        outputs, _ = apply(params, statistics, x, train=False, intermediates=named)
        return {**named, **outputs._asdict()}

    found = jax.eval_shape(forward, params, statistics, images)
    order = _order_of_filling(apply, params, statistics, images)
    return [
        Tensor(name, found[name].shape, _mib(found[name]))
        for name in sorted(found, key=lambda name: order.get(name, len(order)))
    ]


def _order_of_filling(apply: Callable[..., Any], *given: Any) -> dict[str, int]:
    """Position of each named tensor: results of `eval_shape` come sorted by name."""
    order: dict[str, int] = {}

    def forward(params: Any, statistics: Any, x: jax.Array) -> None:
        named: dict[str, jax.Array] = {}
        apply(params, statistics, x, train=False, intermediates=named)
        order.update({name: position for position, name in enumerate(named)})

    jax.eval_shape(forward, *given)
    return order


def residual_mib(
    apply: Callable[..., Any], params: Any, statistics: Any, images: jax.ShapeDtypeStruct
) -> float:
    """Return what training keeps between its two halves, without the parameters, in MiB."""

    def first_half(params: Any, statistics: Any, x: jax.Array) -> Any:
        forward = functools.partial(_outputs, apply, statistics, x)
        return jax.vjp(forward, params)[1]

    kept = jax.eval_shape(first_half, params, statistics, images)
    own = sum(_mib(leaf) for leaf in jax.tree.leaves((params, statistics)))
    return max(sum(_mib(leaf) for leaf in jax.tree.leaves(kept)) - own, 0.0)


def _outputs(apply: Callable[..., Any], statistics: Any, x: jax.Array, params: Any) -> Any:
    return apply(params, statistics, x, train=True)[0]


def _mib(leaf: Any) -> float:
    return math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize / machine.MIB


def compiled_facts(
    apply: Callable[..., Any], params: Any, statistics: Any, images: jax.ShapeDtypeStruct
) -> dict[str, Any]:
    """Compile the forward pass; XLA's own count of operations (billions) and memory (MiB)."""
    forward = jax.jit(lambda p, s, x: apply(p, s, x, train=False)[0])
    executable = forward.lower(params, statistics, images).compile()
    return {"gflops": machine.compiled_gflops(executable), **machine.compiled_memory(executable)}


def describe(model: nnx.Module, size: tuple[int, int], batch: int) -> dict[str, Any]:
    """Everything about a network at one size, as plain values.

    Args:
      model: a SparseInst; its arrays need no numbers.
      size: (height, width) of the padded image.
      batch: images that go through together.
    """
    apply, params, statistics = layers.functional(model)
    images = jax.ShapeDtypeStruct((batch, *size, 3), jnp.float32)
    given = apply, params, statistics, images
    listed = parts(model, size)
    return {
        "size": size,
        "batch": batch,
        "parts": [
            {"name": part.name or "all", **part.parameters._asdict(), "gmacs": part.gmacs}
            for part in listed
        ],
        "gflops_analytic": 2 * listed[-1].gmacs * batch,
        "xla": compiled_facts(*given),
        "activations": [tensor._asdict() for tensor in activations(*given)],
        "training_residual_mib": residual_mib(*given),
    }
