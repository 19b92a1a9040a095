"""The plain-dict view of a module: a pure function, and its arrays in nested dicts."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.extend.random
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparseinst_jax.data.batch import DEVICE_AXIS

Tree = Any  # nested dicts of arrays

_FIXED = (bool, int, float, str, type(None))  # options that a compiled program is made for


def device_index() -> jax.Array | int:
    """Return this device's position on the mapped axis of a training step; outside of one, 0."""
    try:
        return jax.lax.axis_index(DEVICE_AXIS)
    except NameError:  # no such axis: a single-device call, as in a notebook
        return 0


class PureModel:
    """The structure of a module: a pure function of its arrays, which are plain nested dicts."""

    def __init__(self, module: nnx.Module):
        self._graphdef, *states = nnx.split(module, nnx.Param, ...)
        # Without the numbers, which would stay in memory as long as this.
        self._states = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), states
        )

    def __call__(
        self, params: Tree, statistics: Tree, *inputs: Any, method: str = "__call__", **options: Any
    ) -> tuple[Any, Tree]:
        """Call the module, or one of its methods: (outputs, new statistics); see `functional`.

        Inside a program that JAX traces (`jit`, `vjp`, `pmap`) it becomes a part of it; called with
        plain arrays, as in a notebook, it is compiled: one operation after the other would take
        tens of times as long.
        """
        if _is_traced((params, statistics, inputs)):
            return self._call(params, statistics, *inputs, method=method, **options)
        named = options.pop("intermediates", None)
        fixed = {key: value for key, value in options.items() if isinstance(value, _FIXED)}
        others = {key: value for key, value in options.items() if key not in fixed}
        fixed = (named is not None, ("method", method), *sorted(fixed.items()))
        outputs, new, found = self._compiled(fixed, params, statistics, inputs, others)
        if named is not None:
            named.update(found)
        return outputs, new

    @functools.cached_property
    def _compiled(self) -> Callable[..., Any]:
        def call(fixed, params, statistics, inputs, others):
            is_named, *pairs = fixed
            found = OrderedDict()  # keeps the order of the network
            options: dict[str, Any] = dict(pairs, **others)
            if is_named:
                options["intermediates"] = found
            return *self._call(params, statistics, *inputs, **options), found

        return jax.jit(call, static_argnums=0)

    def _call(
        self, params: Tree, statistics: Tree, *inputs: Any, method: str = "__call__", **options: Any
    ) -> tuple[Any, Tree]:
        number = len(inputs[0]) if options.get("train") else None
        module = self._restore(params, statistics, number)
        outputs = getattr(module, method)(*inputs, **options)
        return outputs, _trees(module)[1]

    def _restore(self, params: Tree, statistics: Tree, number: int | None = None) -> Any:
        params_state, statistics_state = self._states
        return nnx.merge(
            self._graphdef,
            _restore(params_state, params),
            _restore(statistics_state, statistics, number),
        )

    def module(self, params: Tree, statistics: Tree) -> Any:
        """Make a module with these arrays."""
        return self._restore(params, statistics)

    def for_inference(self) -> tuple[PureModel, Callable[[Tree, Tree], tuple[Tree, Tree]]]:
        """Make a form of the model with less to do for each image, and what makes its weights.

        Norms that are the same for all images go into the kernels before them (`fold_norm` of the
        modules), and weights get the type in which they are multiplied: once, not in every call.

        Returns:
          The model, not to be trained, and a pure function from (params, statistics) to its own.
        """

        def fold(params: Tree, statistics: Tree) -> nnx.Module:
            module = self._restore(params, statistics)
            nodes: list[Any] = [
                node for _, node in nnx.iter_graph(module) if isinstance(node, nnx.Module)
            ]
            for node in nodes:
                if hasattr(node, "fold_norm"):
                    node.fold_norm()
            for node in nodes:
                if hasattr(node, "dtype"):
                    for name in {"kernel", "bias"} & vars(node).keys():
                        weight = getattr(node, name)[...].astype(node.dtype)
                        setattr(node, name, nnx.Param(weight))
            return module

        found: list[PureModel] = []
        shapes = jax.eval_shape(lambda *states: tuple(map(_plain, states)), *self._states)
        jax.eval_shape(lambda *trees: found.append(PureModel(fold(*trees))), *shapes)
        return found[0], lambda params, statistics: _trees(fold(params, statistics))


def functional(model: nnx.Module) -> tuple[PureModel, Tree, Tree]:
    """Split a module into a pure function and plain nested dicts of arrays.

    The module's structure is closed over; only arrays pass through `jit`, `vjp` and checkpoints.
    Random keys of the module (`nnx.Rngs`, as in dropout) are among the statistics as uint32, with
    the counters that `nnx` keeps beside them: a run that continues draws on as if uninterrupted. In
    training an array that has a row for each image is drawn row by row, see `_keys_of_images`.

    Args:
      model: any module whose call takes (images, train=..., intermediates=...).

    Returns:
      apply: (params, statistics, images, train=False, intermediates=None) -> (outputs, statistics),
        compiled where it is called with arrays; `intermediates`, an empty dict, is filled with the
        named tensors on the way. With
        `method="name"` that method is called, with whatever else it is given, in the place of
        `__call__`: (params, statistics, *inputs, method="name", **options).
      params: what is trained, nested dicts with string keys (list positions are "0", "1", ...).
      statistics: everything else (frozen norms, running statistics, counters, random keys).
    """
    params, statistics = jax.tree.map(
        lambda x: np.asarray(x) if isinstance(x, jax.Array) else x, _trees(model)
    )
    return PureModel(model), params, statistics


def _is_traced(trees: Any) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


def _trees(module: nnx.Module) -> tuple[Tree, Tree]:
    """Return what is trained, and everything else."""
    _, params, statistics = nnx.split(module, nnx.Param, ...)
    return _plain(params), _plain(statistics)


def _plain(state: nnx.State) -> Tree:
    """Nested dicts with string keys, random keys as uint32."""

    def visit(node: Any) -> Any:
        if isinstance(node, dict):
            return {str(key): visit(value) for key, value in node.items()}
        if _is_key(node):
            return jax.random.key_data(node)[..., :_KEY_WORDS]
        return node

    return visit(nnx.to_pure_dict(state))


def _restore(state: nnx.State, tree: Tree, number: int | None = None) -> nnx.State:
    """Fill a state of shapes; random keys are those of images where their number is given."""

    def fill(like: Any, leaf: Any) -> Any:
        if not _is_key(like):
            # A module counts in place: never in the caller's own array.
            is_counter = jnp.issubdtype(like.dtype, jnp.integer)
            return jnp.asarray(leaf) if is_counter else leaf
        if number is None:
            return jax.random.wrap_key_data(leaf, impl=_IMPLEMENTATION)
        return _keys_of_images(leaf, number)

    filled = jax.tree.map(lambda leaf: leaf, state)  # a copy of the structure
    nnx.replace_by_pure_dict(filled, nnx.statelib.restore_int_paths(tree))
    return jax.tree.map(fill, state, filled)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


# Of every key that is stored, so that a run does not depend on jax's configuration.
_IMPLEMENTATION = "threefry2x32"
_KEY_WORDS = 2


def _keys_of_images(data: jax.Array, number: int) -> jax.Array:
    """Make keys that draw for this device's part of the batch, from data uint32 [..., 2].

    An array with `number` rows is drawn row by row, each from the key and the place of its image in
    the batch over all devices: the batch is treated the same on any number of devices. Any other
    array is the same on all of them.
    """
    first = jnp.asarray(device_index() * number, jnp.uint32)
    words = jnp.broadcast_to(first, (*data.shape[:-1], 1))
    return jax.random.wrap_key_data(
        jnp.concatenate([data, words], axis=-1), impl=_implementation_of_images(number)
    )


@functools.cache
def _implementation_of_images(number: int) -> Any:
    """Make the random number generator whose keys are a usual key and the place of an image."""

    def usual(data: jax.Array) -> jax.Array:
        return jax.random.wrap_key_data(data[:_KEY_WORDS], impl=_IMPLEMENTATION)

    def with_place(keys: jax.Array, place: jax.Array) -> jax.Array:
        data = jax.random.key_data(keys)
        return jnp.concatenate([data, jnp.broadcast_to(place, (*data.shape[:-1], 1))], axis=-1)

    def random_bits(data: jax.Array, width: int, shape: tuple[int, ...]) -> jax.Array:
        key, kind = usual(data), jnp.dtype(f"uint{width}")
        if not shape or shape[0] != number:
            return jax.random.bits(key, shape, kind)
        places = data[_KEY_WORDS] + jnp.arange(number, dtype=jnp.uint32)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, places)
        return jax.vmap(lambda key: jax.random.bits(key, shape[1:], kind))(keys)

    return jax.extend.random.define_prng_impl(
        key_shape=(_KEY_WORDS + 1,),
        seed=lambda seed: with_place(jax.random.key(seed, impl=_IMPLEMENTATION), jnp.uint32(0)),
        split=lambda data, shape: with_place(jax.random.split(usual(data), shape), data[-1]),
        fold_in=lambda data, msg: with_place(jax.random.fold_in(usual(data), msg), data[-1]),
        random_bits=random_bits,
        name=f"images_{number}",
    )
