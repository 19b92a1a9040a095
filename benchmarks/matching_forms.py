"""Training steps that match in different places: on the host, in a callback, on the device.

host        two compiled halves, SciPy between them, as `train.py` does; `--micro-batches` parts
overlapped  the same, but every part's forward pass is handed to the device before the first is
            matched: the host matches one part while the device computes the next; all residuals
            are kept at once
callback    one compiled step with SciPy in `jax.pure_callback`
device      one compiled step with `optax.assignment.hungarian_algorithm`
none        one compiled step in which target i is given to prediction i: what a step would take if
            matching took nothing

    python benchmarks/matching_forms.py --batch 16 --size 640 864 --dtype bfloat16

Every form runs in turn, round after round, on the same batch. A form that fails (callbacks need a
backend that has them) is told and left out.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparseinst_jax import matching
from sparseinst_jax.checkpoints.state import TrainState
from sparseinst_jax.cli.measuring import machine, training
from sparseinst_jax.cli.measuring.timing import table, times
from sparseinst_jax.data.batch import Batch
from sparseinst_jax.models.functional import functional
from sparseinst_jax.runtime import process
from sparseinst_jax.runtime.files import replace_file
from sparseinst_jax.setup.builders import build_model, build_objective
from sparseinst_jax.setup.config import load_config
from sparseinst_jax.training import optimizer
from sparseinst_jax.training.step import STOP, TrainStep

CLASSES = 80
FORMS = ("none", "host", "overlapped", "callback", "device")


class OverlappedStep(TrainStep):
    """A step that hands every part's first half to the device before it matches any."""

    def __call__(
        self, state: TrainState, batch: Batch, stop: int = 0
    ) -> tuple[TrainState, dict[str, Any]]:
        """See `TrainStep.__call__`."""
        parts = [part._replace(image_id=None) for part in self.split(batch)]
        counts, statistics, waiting = self.counts(parts), state.statistics, []
        for part, places in zip(parts, self.places(parts), strict=True):
            *first, scores = self._forward(state.params, statistics, state.step, places, part)
            statistics = first[2]
            waiting.append((first, scores, part, places))
        sums, before = None, state._replace(statistics=None, opt_state=None)
        stops = np.full(len(self.devices), stop, np.int32)
        while waiting:
            first, scores, part, places = waiting.pop(0)
            rest = *first, part, self.match(scores, part), counts, places
            if waiting:
                sums = self._accumulate(before, stops, sums, *rest)
        return self._finish(state, stops, sums, *rest)


def callback_match(score: jax.Array, is_target: jax.Array) -> jax.Array:
    """Match by SciPy from inside a compiled function: [B, N, M] to int32 [B, M]."""
    result = jax.ShapeDtypeStruct(is_target.shape, jnp.int32)
    return jax.pure_callback(
        lambda s, t: matching.match(np.asarray(s), np.asarray(t)), result, score, is_target
    )


def device_match(score: jax.Array, is_target: jax.Array) -> jax.Array:
    """Match on the device: [B, N, M] to int32 [B, M].

    A column of padding costs every prediction the same, so that it changes nothing.

    Raises:
      ValueError: more targets than predictions, which this form cannot do.
    """
    if score.shape[1] < score.shape[2]:
        raise ValueError(f"expected at least as many predictions as targets, got {score.shape}")

    def one(score: jax.Array, is_target: jax.Array) -> jax.Array:
        cost = jnp.where(is_target, -score, 0.0)
        rows, columns = optax.assignment.hungarian_algorithm(cost)
        found = jnp.zeros(is_target.shape, jnp.int32).at[columns].set(rows.astype(jnp.int32))
        return jnp.where(is_target, found, matching.UNMATCHED)

    return jax.vmap(one)(score, is_target)


def no_match(score: jax.Array, is_target: jax.Array) -> jax.Array:
    """Give target i to prediction i: [B, N, M] to int32 [B, M]."""
    index = jnp.broadcast_to(jnp.arange(is_target.shape[1], dtype=jnp.int32), is_target.shape)
    return jnp.where(is_target, index, matching.UNMATCHED)


def one_step(
    objective: Any, adamw: optax.GradientTransformation, match: Callable[..., jax.Array]
) -> Callable[[TrainState, Batch, Any], tuple[TrainState, jax.Array]]:
    """Make a step that is one compiled program, on one device."""

    def step(state: TrainState, batch: Batch, counts: Any) -> tuple[TrainState, jax.Array]:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            outputs, statistics = objective.forward(params, state.statistics, batch)
            score = jax.lax.stop_gradient(objective.match_scores(outputs, batch)["masks"])
            matches = {"masks": match(score, batch.is_target)}
            total, _ = objective.loss(None, None, outputs, batch, matches, counts)
            return total, statistics

        (total, statistics), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
        updates, opt_state = adamw.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, statistics, opt_state), total

    return jax.jit(step, donate_argnums=0)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description="Training steps that match in different places.")
    add = parser.add_argument
    add("--config", default="configs/giam_r50.py")
    add("--size", type=int, nargs=2, default=(512, 512))
    add("--batch", type=int, default=2)
    add("--micro-batches", type=int, default=2, help="of the forms on the host, beside 1")
    add("--objects", type=int, default=8)
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--forms", choices=FORMS, nargs="+", default=FORMS)
    add("--rounds", type=int, default=5)
    add("--output", metavar="FILE")
    arguments = parser.parse_args(argv)
    facts = machine.describe()
    runs = make_runs(arguments)
    rows, faults = measure(runs, arguments.rounds, arguments.batch)
    cells = [
        (r["name"], f"{r['p50_ms']:.1f}", f"{r['images_per_s']:.2f}", f"{r['loss']:.4f}")
        for r in rows
    ]
    print(table([("form", "ms a step", "images/s", "first loss"), *cells]))
    if arguments.output:
        settings = {k: v for k, v in vars(arguments).items() if k not in ("output", "config")}
        report = {"command": machine.command(), "settings": settings, "machine": facts}
        report |= {"rows": rows, "faults": faults}
        replace_file(arguments.output, (json.dumps(report, indent=1) + "\n").encode())


def make_runs(arguments: argparse.Namespace) -> dict[str, Callable[[], float]]:
    """Build each form's step with a state of its own; a run returns the loss."""
    config: Any = load_config(arguments.config, {"model.dtype": arguments.dtype})
    apply, params, statistics = functional(build_model(config.model, CLASSES, config.seed))
    adamw = optimizer.make_optimizer(params, config.train.learning_rate, config.train.weight_decay)
    objective = build_objective(config, apply)
    size = tuple(arguments.size)
    batch = training.random_batch(arguments.batch, size, arguments.objects, CLASSES)

    def fresh() -> TrainState:
        opt_state = jax.tree.map(np.asarray, adamw.init(params))
        return TrainState(np.int32(0), params, statistics, opt_state)

    def in_halves(kind: type[TrainStep], parts: int) -> Callable[[], float]:
        step = kind(objective, adamw, micro_batches=parts, devices=jax.local_devices()[:1])
        states = [step.place(fresh())]

        def run() -> float:
            states[0], metrics = step(states[0], batch)
            metrics.pop(STOP)
            jax.block_until_ready(states)
            return float(metrics["loss/total"][0])

        return run

    def in_one(match: Callable[..., jax.Array]) -> Callable[[], float]:
        step = one_step(objective, adamw, match)
        states = [jax.device_put(fresh())]
        counts = objective.count(batch)

        def run() -> float:
            states[0], total = step(states[0], batch._replace(image_id=None), counts)
            jax.block_until_ready(states)
            return float(total)

        return run

    parts = arguments.micro_batches
    makers = {
        "none": {"none": lambda: in_one(no_match)},
        "host": {
            "host": lambda: in_halves(TrainStep, 1),
            f"host, {parts} parts": lambda: in_halves(TrainStep, parts),
        },
        "overlapped": {f"overlapped, {parts} parts": lambda: in_halves(OverlappedStep, parts)},
        "callback": {"callback": lambda: in_one(callback_match)},
        "device": {"device": lambda: in_one(device_match)},
    }
    chosen = {name: make for form in arguments.forms for name, make in makers[form].items()}
    return {name: make() for name, make in chosen.items()}


def measure(
    runs: dict[str, Callable[[], float]], rounds: int, batch: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Run all in turn; one row for each that works, and what the others say."""
    losses, faults, samples = {}, {}, {name: [] for name in runs}
    for name, run in runs.items():
        try:
            losses[name] = run()
        except Exception as error:  # of the backend: whatever it raises
            faults[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"{name} does not work here: {faults[name]}", flush=True)
    for _ in range(rounds):
        for name in losses:
            start = time.perf_counter()
            runs[name]()
            samples[name].append(1e3 * (time.perf_counter() - start))
    rows = [
        {
            "name": name,
            "p50_ms": (found := times(samples[name])).p50,
            "p90_ms": found.p90,
            "images_per_s": 1e3 * batch / found.p50,
            "loss": loss,
        }
        for name, loss in losses.items()
    ]
    return rows, faults


if __name__ == "__main__":
    process.prepare_process()
    main()
