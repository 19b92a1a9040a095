"""The training step: two compiled halves with the matching between them on the host.

Half one (`forward`) runs the model under `jax.vjp` and gives the outputs, the match scores and the
vjp function, which is a pytree of residuals, without those that are parameters. The host solves the
assignment. Half two (`accumulate`, or `finish` for the last micro-batch) takes the loss, pulls its
gradient through the vjp, sums over devices and micro-batches, and updates the parameters. A host
callback inside one compiled step would hang when it raises, and would keep the step out of the
compilation cache.

The per-device functions are pure and know nothing of `pmap`; only `TrainStep` maps them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparseinst_jax import matching
from sparseinst_jax.checkpoints.state import TrainState
from sparseinst_jax.data.batch import Batch
from sparseinst_jax.models.layers import DEVICE_AXIS, Tree
from sparseinst_jax.training.optimizer import moving_average

STOP = "stop"  # the one of the metrics that says whether a host was asked to stop


class Objective(Protocol):
    """What a model family gives to be trained; see `sparseinst.objective`."""

    def forward(self, params: Tree, statistics: Tree, batch: Batch) -> tuple[Any, Tree]:
        """Run the model: outputs and new statistics."""
        ...

    def count(self, batch: Batch) -> Any:
        """Count on the host what this part adds to the loss divisors."""
        ...

    def match_score(self, outputs: Any, batch: Batch) -> jax.Array:
        """Score [B, N, M] of each prediction for each target, larger is better."""
        ...

    def loss(
        self, outputs: Any, batch: Batch, query_index: jax.Array, counts: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return this part's share of the loss and of its terms."""
        ...


class TrainStep:
    """A data-parallel training step over the local devices (and all hosts).

    Args:
      objective: the model family's.
      optimizer: an optax transformation.
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
        micro_batches: int = 1,
        ema_decay: float = 0.0,
        skips_nonfinite: bool = False,
        devices: Sequence[Any] | None = None,
    ):
        self.objective, self.optimizer = objective, optimizer
        self.micro_batches, self.ema_decay = micro_batches, ema_decay
        self.skips_nonfinite = skips_nonfinite
        self.devices = list(devices or jax.local_devices())

        def mapped(function, **options):
            return jax.pmap(function, axis_name=DEVICE_AXIS, devices=devices, **options)

        # The state is the same on all devices and has no axis of them: with one, XLA:CPU would copy
        # the optimizer's moments, twice the parameters, before it replaces them.
        self._replicate = mapped(lambda _, state: state, in_axes=(0, None), out_axes=None)
        self._forward = mapped(
            self._forward_on_device, in_axes=(None, None, 0), out_axes=(0, 0, None, 0)
        )
        self._accumulate = mapped(self._accumulate_on_device, in_axes=(0, None, 0, 0, 0, 0, 0))
        # Only what is replaced is donated: a donated vjp frees nothing and warns.
        self._finish = mapped(
            self._finish_on_device,
            in_axes=(None, 0, 0, 0, 0, None, 0, 0, 0),
            out_axes=(None, 0),
            donate_argnums=(0,),
        )

    # What one device computes.

    def _forward_on_device(self, params, statistics, batch):
        outputs, pull_back, statistics = jax.vjp(
            lambda p: self.objective.forward(p, statistics, batch), params, has_aux=True
        )
        pull_back = _without(params, pull_back)
        return outputs, pull_back, statistics, self.objective.match_score(outputs, batch)

    def _accumulate_on_device(self, sums, params, outputs, pull_back, batch, query_index, counts):
        counts = jax.tree.map(lambda n: jnp.maximum(jax.lax.psum(n, DEVICE_AXIS), 1.0), counts)

        def loss(outputs):
            return self.objective.loss(outputs, batch, query_index, counts)

        (total, terms), cotangent = jax.value_and_grad(loss, has_aux=True)(outputs)
        (gradients,) = pull_back(params)(cotangent)
        part = gradients, {"total": total, **terms}
        return part if sums is None else jax.tree.map(jnp.add, sums, part)

    def _finish_on_device(
        self, state, stop, sums, outputs, pull_back, statistics, batch, query_index, counts
    ):
        sums = self._accumulate_on_device(
            sums, state.params, outputs, pull_back, batch, query_index, counts
        )
        # Sums, not means: each device's loss is its share of the global batch's.
        gradients, terms = jax.lax.psum(sums, DEVICE_AXIS)
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {f"loss/{name}": value for name, value in terms.items()}
        metrics["grad_norm"] = optax.tree.norm(gradients)
        metrics["num_targets"] = jax.lax.psum(counts.targets, DEVICE_AXIS)
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

    # What the host does.

    def place(self, state: TrainState) -> TrainState:
        """Copy a host state to every device.

        By `pmap` under the step's own axis name: placed otherwise, the second half would compile
        again for the second step.
        """
        return self._replicate(np.arange(len(self.devices)), state)

    def fetch(self, state: TrainState) -> TrainState:
        """Return the state as NumPy arrays, from the first local device."""
        return jax.tree.map(_first_device, state)

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

    def counts(self, parts: Sequence[Batch]) -> Any:
        """Return each device's contribution [devices] to the divisors, over all micro-batches."""
        per_device = [
            sum_trees([self.objective.count(jax.tree.map(lambda x, d=d: x[d], p)) for p in parts])
            for d in range(len(self.devices))
        ]
        return jax.tree.map(lambda *n: np.stack(n), *per_device)

    def __call__(
        self, state: TrainState, batch: Batch, stop: int = 0
    ) -> tuple[TrainState, dict[str, Any]]:
        """Run one step on this host's batch of NumPy arrays.

        Args:
          state: placed by `place` or returned by the step before; it is consumed.
          batch: [B, ...] of this host, in the order of the plan.
          stop: what this host tells the others; above 0 if it was asked to stop.

        Returns:
          The new state, and metrics as device arrays [devices], equal on all: `loss/total`, each
          `loss/<term>`, `grad_norm`, `num_targets`, and `STOP`, the largest `stop` of all hosts.
        """
        parts = self.split(batch)
        counts = self.counts(parts)
        sums, statistics = None, state.statistics
        for number, part in enumerate(parts):
            part = part._replace(image_id=None)  # 64 bits wide and of no use on the device
            outputs, pull_back, statistics, score = self._forward(state.params, statistics, part)
            query_index = matching.match(np.asarray(score), part.is_target)
            arguments = outputs, pull_back, part, query_index, counts
            if number + 1 < len(parts):
                sums = self._accumulate(sums, state.params, *arguments)
                del outputs, pull_back, arguments  # residuals: free them before the next half one
        metrics: dict[str, Any]
        stops = np.full(len(self.devices), stop, np.int32)
        state, metrics = self._finish(
            state, stops, sums, outputs, pull_back, statistics, *arguments[2:]
        )
        return state, metrics


def _without(params: Tree, pull_back: Any) -> Any:
    """Take the parameters out of a vjp function, to be given back to it: `result(params)`.

    What a compiled function returns is a copy, so that every kernel would be there twice.
    """
    numbers = {id(leaf): number for number, leaf in enumerate(jax.tree.leaves(params))}
    leaves, structure = jax.tree.flatten(pull_back)
    places = [numbers.get(id(leaf)) for leaf in leaves]

    def give_back(kept: Sequence[Any], params: Tree) -> Any:
        given, others = jax.tree.leaves(params), iter(kept)
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


def sum_trees(trees: Sequence[Any]) -> Any:
    """Return the leafwise sum of equal-shaped trees."""
    return jax.tree.map(lambda *leaves: np.sum(leaves, axis=0), *trees)


def _first_device(leaf: jax.Array) -> np.ndarray:
    return np.asarray(leaf.addressable_data(0))
