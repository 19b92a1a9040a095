"""The workload of training: whole steps with real matching, and where their time goes."""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np
import optax

from sparseinst_jax.checkpoints.state import TrainState
from sparseinst_jax.cli.measuring.timing import Workload
from sparseinst_jax.data.batch import Batch
from sparseinst_jax.models.trees import Tree
from sparseinst_jax.training.step import Objective, TrainStep

LEVELS = 4  # of a target mask, see `Batch`
PARTED_STEPS = 3


class PartedStep(TrainStep):
    """A training step that can also be taken part by part, without micro-batches."""

    def parts(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, float]]:
        """Take a step and wait after each part; returns milliseconds of each.

        The parts add up to more than a step: nothing overlaps.
        """
        (part,), started, found = self.split(batch), time.perf_counter(), {}
        counts, (places,) = self.counts([part]), self.places([part])
        part = part._replace(image_id=None)

        def note(name: str, *computed: Any) -> None:
            nonlocal started
            jax.block_until_ready(computed)
            now = time.perf_counter()
            found[name], started = 1e3 * (now - started), now

        first = self._forward(state.params, state.statistics, state.step, places, part)
        note("first_half_ms", first)
        outputs, pull_back, changed, scores = first
        scores = jax.device_get(scores)
        note("score_to_host_ms")
        matches = self.match(scores, part)
        note("matching_ms")
        stops = np.zeros(len(self.devices), np.int32)
        del first
        rest = outputs, pull_back, changed, part, matches, counts, places
        state, metrics = self._finish(state, stops, None, *rest)
        note("second_half_ms", state, metrics)
        return state, found

    def compiled(self, state: TrainState, batch: Batch) -> dict[str, Any]:
        """Compile both halves for their memory."""
        (part,) = self.split(batch)
        counts, (places,) = self.counts([part]), self.places([part])
        part = part._replace(image_id=None)
        given = state.params, state.statistics, state.step, places, part
        outputs, pull_back, changed, scores = self._forward(*given)
        matches = {name: np.zeros(part.labels.shape, np.int32) for name in scores}
        rest = outputs, pull_back, changed, part, matches, counts, places
        second = self._finish.lower(state, np.zeros(len(self.devices), np.int32), None, *rest)
        return {
            "first half": self._forward.lower(*given).compile(),
            "second half": second.compile(),
        }


def step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    params: Tree,
    statistics: Tree,
    batch: Batch,
) -> Workload:
    """Whole steps on one batch, from the host's arrays to the new parameters, on one device."""
    trained = PartedStep(objective, optimizer, devices=jax.local_devices()[:1])
    opt_state = jax.tree.map(np.asarray, jax.jit(optimizer.init)(params))
    # A list: the state is consumed by every step.
    states = [trained.place(TrainState(np.int32(0), params, statistics, opt_state))]
    losses = []

    def run() -> None:
        states[0], metrics = trained(states[0], batch)
        losses.append(jax.block_until_ready((states, metrics["loss/total"]))[1])

    def details() -> dict[str, Any]:
        last, found = float(np.asarray(losses[-1]).mean()), []
        for _ in range(PARTED_STEPS):
            states[0], parts = trained.parts(states[0], batch)
            found.append(parts)
        medians = {name: float(np.median([p[name] for p in found])) for name in found[0]}
        listed = ", ".join(f"{name} {ms:.1f}" for name, ms in medians.items())
        note = f"each part by itself: {listed.replace('_ms', '').replace('_', ' ')} ms"
        return {"last_loss": last, "parts": medians, "note": note}

    number, height, width = batch.images.shape[:3]
    facts = {"size": (height, width), "batch": number, "objects_per_image": batch.labels.shape[1]}
    return Workload(run, number, facts, lambda: trained.compiled(states[0], batch), details)


def random_batch(
    number: int, size: tuple[int, int], num_objects: int, num_classes: int, seed: int = 0
) -> Batch:
    """Draw a batch of noise with boxes as objects.

    Args:
      number: B.
      size: (height, width) of the padded image, multiples of 32.
      num_objects: objects of every image, M.
      num_classes: K.
      seed: any integer.
    """
    rng = np.random.default_rng(seed)
    height, width = size[0] // 4, size[1] // 4
    masks = np.zeros((number, num_objects, height, width), np.uint8)
    for mask in masks.reshape(-1, height, width):
        top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
        rows, columns = rng.integers(2, height // 2 + 1), rng.integers(2, width // 2 + 1)
        mask[top : top + rows, left : left + columns] = LEVELS
    return Batch(
        images=rng.integers(0, 256, (number, *size, 3), np.uint8),
        valid_size=np.full((number, 2), size, np.int32),
        labels=rng.integers(0, num_classes, (number, num_objects)).astype(np.int32),
        masks=masks,
        is_target=np.ones((number, num_objects), bool),
        image_id=np.arange(number, dtype=np.int64),
    )
