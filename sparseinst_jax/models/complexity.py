"""What a network holds and costs: parameters and multiply-accumulates, without computing anything.

A multiply-accumulate (MAC) is one product and one sum: two floating point operations. The
original's counter and most papers say FLOPs where they count MACs.

Counted is what the traced program does as convolution or matrix product. Activations, norms, sums
and gathers (bilinear resizing, the taps of a deformable convolution) count nothing.

Differs from the reference: the original's counter adds four MACs for each value of a bilinear
resize, two for each of a trained batch norm, five of a layer norm, and one for each input of the
linear attention's pooling, which is a matrix product here. tests/contract/test_zoo.py adds it up.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sparseinst_jax.models.layers import FrozenStatistic


class Parameters(NamedTuple):
    """How many numbers a network holds.

    Attributes:
      trained: what the original counts as parameters.
      frozen_affine: scales and biases of frozen norms, which the original keeps as buffers, and
        other implementations as parameters.
      statistics: means and variances of batch norms, frozen or running.
    """

    trained: int
    frozen_affine: int
    statistics: int


def count_parameters(model: nnx.Module) -> Parameters:
    """Count the numbers that a network holds; it may hold shapes in place of arrays."""
    _, trained, frozen, running, _ = nnx.split(
        model, nnx.Param, FrozenStatistic, nnx.BatchStat, ...
    )

    def sizes(state: nnx.State) -> list[tuple[Any, int]]:
        leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(state))
        return [(path[-1].key, math.prod(leaf.shape)) for path, leaf in leaves]

    affine = sum(size for name, size in sizes(frozen) if name in ("scale", "bias"))
    statistics = sum(size for _, size in sizes(frozen) + sizes(running)) - affine
    return Parameters(sum(size for _, size in sizes(trained)), affine, statistics)


def count_macs(model: nnx.Module, height: int, width: int) -> dict[str, int]:
    """Count the multiply-accumulates of one image, module by module.

    Args:
      model: maps float [1, height, width, 3] to anything; shapes can stand for its arrays.
      height: of the padded image in pixels, a multiple of the model's stride.
      width: the same.

    Returns:
      Path of each module ("backbone/res2/0/conv1"; "" is the whole model) to the MACs in it and in
      the modules inside it, in the order of the computation.
    """
    graphdef, state = nnx.split(model)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)

    def forward(state: nnx.State, images: jax.Array) -> Any:
        merged = nnx.merge(graphdef, state)
        with _named_calls(merged):
            return merged(images)

    return trace_macs(forward, abstract, jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32))


def trace_macs(function: Callable[..., Any], *arguments: Any) -> dict[str, int]:
    """Count the multiply-accumulates of a function; see `count_macs`.

    Args:
      function: what `jax.make_jaxpr` can trace.
      *arguments: trees of arrays or of their shapes.

    Raises:
      ValueError: the function holds a loop of unknown length.
    """
    own: Counter[str] = Counter()
    _count(jax.make_jaxpr(function)(*arguments).jaxpr, "", 1, own)
    total: dict[str, int] = {"": 0}
    for path, macs in own.items():
        parts = path.split("/") if path else []
        for end in range(len(parts) + 1):
            name = "/".join(parts[:end])
            total[name] = total.get(name, 0) + macs
    return total


@contextmanager
def _named_calls(model: nnx.Module) -> Iterator[None]:
    """While open, every call of a module in `model` writes its path into the traced equations."""
    modules = [(path, node) for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Module)]
    # A scope's name must not hold "/", which parts the scopes of a stack.
    names = {id(node): _MARK + ".".join(map(str, path)) for path, node in modules}
    owners = {owner for _, node in modules for owner in type(node).__mro__[:-1]}
    originals = {owner: vars(owner)["__call__"] for owner in owners if "__call__" in vars(owner)}

    def named(original: Any) -> Any:
        @functools.wraps(original)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            with jax.named_scope(names.get(id(self), "")):
                return original(self, *args, **kwargs)

        return call

    try:
        for owner, original in originals.items():
            owner.__call__ = named(original)
        yield
    finally:
        for owner, original in originals.items():
            owner.__call__ = original


_MARK = "module:"


def _count(jaxpr: Any, inside: str, times: int, macs: Counter[str]) -> None:
    """Add the MACs of a traced program, `times` over, to the innermost module of each equation."""
    for equation in jaxpr.eqns:
        scopes = str(equation.source_info.name_stack).split("/")
        marked = [scope for scope in scopes if scope.startswith(_MARK)]
        path = marked[-1].removeprefix(_MARK).replace(".", "/") if marked else inside
        name, params = equation.primitive.name, equation.params
        if name in _MACS:
            macs[path] += times * _MACS[name](equation)
        elif name == "while":
            raise ValueError("a loop of unknown length cannot be counted; use scan or map.")
        elif name == "cond" and params.get("branches_platforms"):
            # Forms for platforms; the last is the plain one, what the definition takes.
            _count(params["branches"][-1].jaxpr, path, times, macs)
        elif name == "cond":  # the most expensive branch
            branches = [Counter() for _ in params["branches"]]
            for branch, counter in zip(params["branches"], branches, strict=True):
                _count(branch.jaxpr, path, times, counter)
            macs.update(max(branches, key=lambda counter: counter.total()))
        else:
            repeats = params["length"] if name == "scan" else 1
            for inner in jax.tree.leaves(list(params.values()), is_leaf=_is_jaxpr):
                if _is_jaxpr(inner):
                    _count(getattr(inner, "jaxpr", inner), path, times * repeats, macs)


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "jaxpr") or hasattr(value, "eqns")


def _product_macs(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)


def _convolution_macs(equation: Any) -> int:
    kernel = equation.invars[1].aval
    _, kernel_axes, _ = equation.params["dimension_numbers"]  # [out, in / groups, taps...]
    return equation.outvars[0].aval.size * kernel.size // kernel.shape[kernel_axes[0]]


_MACS = {"dot_general": _product_macs, "conv_general_dilated": _convolution_macs}
