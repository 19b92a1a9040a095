"""The training step: two compiled halves with the matching between them on the host.

Half one runs the model under `jax.vjp` and gives the outputs, the match scores and the vjp
function, which is a pytree of residuals, without those that are parameters. The host solves the
assignments. Half two takes the loss, pulls its gradient through the vjp and sums over the
micro-batches; after the last one it sums over devices and updates the parameters. A host callback
inside one compiled step would hang when it raises, and would keep the step out of the compilation
cache.

The per-device functions are pure and know nothing of `pmap`; only `TrainStep` maps them.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparseinst_jax import matching
from sparseinst_jax.checkpoints.state import TrainState
from sparseinst_jax.data.batch import DEVICE_AXIS, Batch
from sparseinst_jax.training.optimizer import moving_average

Tree = Any  # nested dicts of arrays

STOP = "stop"  # the one of the metrics that says whether a host was asked to stop


class Objective(Protocol):
    """What a model family gives to be trained; see `models.sparseinst.objective`.

    `keys` are B random keys, one for each image. They are a function of the seed, the step and the
    place of the image in the global batch: what is drawn does not depend on how many devices, hosts
    or micro-batches there are, nor on whether a run was continued. Both halves of a step get the
    same; `jax.random.fold_in` separates uses.

    Attributes:
      minimised: names of the matchings whose scores are costs; of the others the sum is maximised.
      loss_takes_params: whether `loss` has a gradient of its own to the parameters, as an objective
        has that runs parts of the model again; else it is given None in their place.
    """

    minimised: Collection[str]
    loss_takes_params: bool

    def forward(self, params: Tree, statistics: Tree, batch: Batch) -> tuple[Any, Tree]:
        """Run the model: outputs, a tree of arrays, and new statistics."""
        ...

    def count(self, batch: Batch) -> Any:
        """Count on the host what this part adds to the divisors of the loss: a tree of numbers."""
        ...

    def match_scores(self, outputs: Any, batch: Batch, keys: jax.Array) -> dict[str, jax.Array]:
        """Score predictions for targets: [B, N, M] for each matching, N its own."""
        ...

    def loss(
        self,
        params: Tree | None,
        statistics: Tree,
        outputs: Any,
        batch: Batch,
        matches: Mapping[str, jax.Array],
        counts: Any,
        keys: jax.Array,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return this part's share of the loss and of each of its terms.

        Args:
          params: None unless `loss_takes_params`.
          statistics: the new ones of `forward`.
          outputs: of `forward`.
          batch: the targets.
          matches: int32 [B, M] for each matching, the prediction of each target or -1.
          counts: of the global batch, each at least 1.
          keys: one for each image.
        """
        ...


class TrainStep:
    """A data-parallel training step over the local devices (and all hosts).

    Args:
      objective: the model family's.
      optimizer: an optax transformation.
      seed: of what the objective draws.
      micro_batches: parts a global batch is cut into, one after the other; the gradient is that of
        the whole batch (except under trainable batch norm, see `layers.BatchNorm`).
      ema_decay: of the averages, in states that have some; see `optimizer.moving_average`.
      skips_nonfinite: a step whose loss or gradient is NaN or infinite changes nothing but the
        number of the step and the place in the learning rate's schedule.
      devices: local devices to use; all by default.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: optax.GradientTransformation,
        *,
        seed: int = 0,
        micro_batches: int = 1,
        ema_decay: float = 0.0,
        skips_nonfinite: bool = False,
        devices: Sequence[Any] | None = None,
    ):
        self.objective, self.optimizer, self.seed = objective, optimizer, seed
        self.micro_batches, self.ema_decay = micro_batches, ema_decay
        self.skips_nonfinite = skips_nonfinite
        self.devices = list(devices or jax.local_devices())

        def mapped(function, **options):
            return jax.pmap(function, axis_name=DEVICE_AXIS, devices=devices, **options)

        # The state is the same on all devices and has no axis of them: with one, XLA:CPU would copy
        # the optimizer's moments, twice the parameters, before it replaces them.
        self._replicate = mapped(lambda _, state: state, in_axes=(0, None), out_axes=None)
        self._forward = mapped(
            self._first_half, in_axes=(None, None, None, 0, 0), out_axes=(0, 0, None, 0)
        )
        second = dict(in_axes=(None, 0, 0, 0, 0, None, 0, 0, 0, 0))
        self._accumulate = mapped(functools.partial(self._second_half, is_last=False), **second)
        # Only what is replaced is donated: a donated vjp frees nothing and warns.
        self._finish = mapped(
            functools.partial(self._second_half, is_last=True),
            **second,
            out_axes=(None, 0),
            donate_argnums=(0,),
        )

    # What one device computes.

    def _first_half(self, params, statistics, step, places, batch):
        outputs, pull_back, new = jax.vjp(
            lambda p: self.objective.forward(p, statistics, batch), params, has_aux=True
        )
        changed = _changed(new, statistics)
        pull_back = _without((params, _unchanged(changed, statistics)), pull_back)
        scores = self.objective.match_scores(outputs, batch, self._keys(step, places))
        return outputs, pull_back, changed, scores

    def _second_half(
        self,
        state,
        stop,
        sums,
        outputs,
        pull_back,
        changed,
        batch,
        matches,
        counts,
        places,
        is_last,
    ):
        num_targets, divisors = jax.lax.psum(counts, DEVICE_AXIS)
        divisors = jax.tree.map(lambda n: jnp.maximum(n, 1.0), divisors)
        takes_params = self.objective.loss_takes_params
        statistics = with_changed(state.statistics, changed)
        (total, terms), found = jax.value_and_grad(
            # Whole numbers among the outputs get the empty gradient that `pull_back` asks for.
            self.objective.loss,
            (0, 2) if takes_params else (2,),
            has_aux=True,
            allow_int=True,
        )(
            state.params if takes_params else None,
            statistics,
            outputs,
            batch,
            matches,
            divisors,
            self._keys(state.step, places),
        )
        given = state.params, _unchanged(changed, state.statistics)
        (gradients,) = pull_back(given)(found[-1])
        if takes_params:
            gradients = jax.tree.map(jnp.add, gradients, found[0])
        part = gradients, {"total": total, **terms}
        sums = part if sums is None else jax.tree.map(jnp.add, sums, part)
        if not is_last:
            return sums
        # Sums, not means: each device's loss is its share of the global batch's.
        gradients, terms = jax.lax.psum(sums, DEVICE_AXIS)
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        metrics = {f"loss/{name}": value for name, value in terms.items()}
        metrics["grad_norm"] = optax.tree.norm(gradients)
        metrics["num_targets"] = num_targets
        metrics[STOP] = jax.lax.pmax(stop, DEVICE_AXIS)
        average = state.average
        if average is not None:
            average = moving_average(average, (params, statistics), self.ema_decay, state.step)
        new = TrainState(state.step + 1, params, statistics, opt_state, average)
        if self.skips_nonfinite:
            # Of sums over all devices: these decide alike.
            losses = [value for name, value in metrics.items() if name.startswith("loss/")]
            is_finite = jnp.isfinite(jnp.stack([*losses, metrics["grad_norm"]])).all()
            new = _choose(is_finite, new, state)
        return new, metrics

    def _keys(self, step: jax.Array, places: jax.Array) -> jax.Array:
        """Make the key of each image, see `Objective`."""
        key = jax.random.fold_in(jax.random.key(self.seed), step)
        return jax.vmap(jax.random.fold_in, (None, 0))(key, places)

    # What the host does.

    def place(self, state: TrainState) -> TrainState:
        """Copy a host state to every device.

        By `pmap` under the step's own axis name: placed otherwise, the second half would compile
        again for the second step.
        """
        return self._replicate(np.arange(len(self.devices)), state)

    def fetch(self, state: TrainState) -> TrainState:
        """Return the state as NumPy arrays, from the first local device."""
        return jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), state)

    def split(self, batch: Batch) -> list[Batch]:
        """Cut this host's batch [B, ...] into micro-batches [devices, B / micro / devices, ...].

        Raises:
          ValueError: if B is no multiple of micro-batches times devices.
        """
        size, parts = len(batch.images), self.micro_batches * len(self.devices)
        if size % parts:
            raise ValueError(
                f"a host's batch must be a multiple of micro_batches x local devices = "
                f"{self.micro_batches} x {len(self.devices)}, got {size}. Change train.batch_size "
                "or train.micro_batches."
            )
        shape = self.micro_batches, len(self.devices), size // parts
        cut = jax.tree.map(lambda x: np.reshape(x, shape + np.shape(x)[1:]), batch)
        return [jax.tree.map(lambda x, i=i: x[i], cut) for i in range(self.micro_batches)]

    def places(self, parts: Sequence[Batch]) -> list[np.ndarray]:
        """Return the places of each micro-batch's images in the global batch, [devices, B]."""
        size = sum(part.is_target.shape[0] * part.is_target.shape[1] for part in parts)
        own = jax.process_index() * size + np.arange(size, dtype=np.int32)
        return list(own.reshape(len(parts), len(self.devices), -1))

    def counts(self, parts: Sequence[Batch]) -> Any:
        """Return the number of targets, and the objective's counts, over all micro-batches.

        Each is what the devices contribute: float32 [devices].
        """

        def count(part: Batch) -> Any:
            return np.float32(np.asarray(part.is_target).sum()), self.objective.count(part)

        def total(device: int) -> Any:
            counted = [count(jax.tree.map(lambda x: x[device], part)) for part in parts]
            return jax.tree.map(lambda *n: np.sum(n, axis=0), *counted)

        return jax.tree.map(lambda *n: np.stack(n), *map(total, range(len(self.devices))))

    def match(self, scores: Mapping[str, jax.Array], part: Batch) -> dict[str, np.ndarray]:
        """Solve the assignments of a micro-batch: int32 [devices, B, M] for each matching."""
        return {
            name: matching.match(score, part.is_target, minimise=name in self.objective.minimised)
            for name, score in jax.device_get(dict(scores)).items()
        }

    def __call__(
        self, state: TrainState, batch: Batch, stop: int = 0
    ) -> tuple[TrainState, dict[str, Any]]:
        """Run one step on this host's batch of NumPy arrays.

        Args:
          state: placed by `place` or returned by the step before; it is consumed.
          batch: [B, ...] of this host, in the order of the plan.
          stop: this host's stop flag; above 0 if it was asked to stop.

        Returns:
          The new state, and metrics as device arrays [devices], equal on all: `loss/total`, each
          `loss/<term>`, `grad_norm`, `num_targets`, and `STOP`, the largest `stop` of all hosts.
        """
        parts = self.split(batch)
        counts, places = self.counts(parts), self.places(parts)
        sums, statistics = None, state.statistics
        # All that half two needs of the state before the parameters are updated.
        before = state._replace(opt_state=None, average=None)
        stops = np.full(len(self.devices), stop, np.int32)
        for number, part in enumerate(parts, start=1):
            part = part._replace(image_id=None)  # 64 bits wide and of no use on the device
            where = places[number - 1]
            outputs, pull_back, changed, scores = self._forward(
                state.params, statistics, state.step, where, part
            )
            matches = self.match(scores, part)
            rest = outputs, pull_back, changed, part, matches, counts, where
            del outputs, pull_back
            if number < len(parts):
                sums = self._accumulate(before, stops, sums, *rest)
                statistics = with_changed(statistics, changed)
                del rest  # residuals: free them before the next half one
        return self._finish(state, stops, sums, *rest)


def _changed(new: Tree, old: Tree) -> Tree:
    """Leave out what a function returns as it was given: None in the place of those leaves.

    What a compiled function returns is a copy: of a frozen norm's numbers there are hundreds, and
    on a GPU each copy is a launch.
    """
    return jax.tree.map(lambda a, b: None if a is b else a, new, old)


def with_changed(old: Tree, changed: Tree) -> Tree:
    """Return the tree of which `changed` holds what is not as in `old`, see `_changed`."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, changed, old, is_leaf=lambda a: a is None
    )


def _unchanged(changed: Tree, old: Tree) -> Tree:
    """Return what `_changed` left out: None in the place of what changed."""
    return jax.tree.map(
        lambda a, b: b if a is None else None, changed, old, is_leaf=lambda a: a is None
    )


def _without(arguments: Tree, pull_back: Any) -> Any:
    """Take the arguments out of a vjp function, to be given back to it: `result(arguments)`.

    What a compiled function returns is a copy, so that every kernel would be there twice.
    """
    numbers = {id(leaf): number for number, leaf in enumerate(jax.tree.leaves(arguments))}
    leaves, structure = jax.tree.flatten(pull_back)
    places = [numbers.get(id(leaf)) for leaf in leaves]

    def give_back(kept: Sequence[Any], arguments: Tree) -> Any:
        given, others = jax.tree.leaves(arguments), iter(kept)
        filled = [next(others) if place is None else given[place] for place in places]
        return jax.tree.unflatten(structure, filled)

    kept = [leaf for leaf, place in zip(leaves, places, strict=True) if place is None]
    return jax.tree_util.Partial(give_back, kept)


def _choose(is_finite: jax.Array, new: TrainState, old: TrainState) -> TrainState:
    """The new state, or the old one as the next step's."""

    def choose(a, b):
        # The schedule follows the steps, skipped or not, as the plan of batches does.
        if isinstance(a, optax.ScaleByScheduleState):
            return a
        return jnp.where(is_finite, a, b)

    def is_schedule(node):
        return isinstance(node, optax.ScaleByScheduleState)

    return jax.tree.map(choose, new, old, is_leaf=is_schedule)._replace(step=new.step)
