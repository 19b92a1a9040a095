"""Training steps of a recorded case, and the comparison of what they leave."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
from typing import Any

import jax
import numpy as np
import optax

from sparseinst_jax.checkpoints.state import TrainState
from sparseinst_jax.training.optimizer import ParameterRules, make_optimizer
from sparseinst_jax.training.step import TrainStep
from sparseinst_jax.weights.convert import ours_to_original
from tests.parity.cases import Case
from tests.parity.fastinst_points import Drawn, RecordedPoints

NUM_STEPS = 5
GRADIENT = 1e-2  # of the rms of a parameter's samples; a ReLU unit near 0 moves single entries
COSINE = 1e-5  # 1 - cosine of a parameter's gradient samples

Matches = dict[str, np.ndarray]


@dataclasses.dataclass
class Run:
    """What five steps left, in the original's names: one entry a step in the lists.

    Scores [B, N, M] and matches [B, M] are by the name of the matching.
    """

    scores: list[dict[str, np.ndarray]]
    matches: list[Matches]
    losses: list[dict[str, float]]
    gradient_norms: list[float]
    gradients: dict[str, np.ndarray]
    after: dict[int, dict[str, np.ndarray]]


def take(
    case: Case,
    objective: Any,
    learning_rate: float,
    rules: ParameterRules,
    points: RecordedPoints | None = None,
) -> Run:
    """Take five steps, and a sixth only for the losses after the fifth.

    `points` are what the objective is given in the place of random keys.
    """
    _, params, statistics = case.model()
    names, weight_decay = case.family.weights, case.config.train.weight_decay
    optimizer = optax.chain(
        keep_gradients(), make_optimizer(params, learning_rate, weight_decay, rules=rules)
    )
    run = Run([], [], [], [], {}, {})

    class WatchedStep(TrainStep):
        def places(self, parts):
            if points is None:
                return super().places(parts)
            self.drawn = _of_one_device(points.of_matching())
            return [self.drawn]

        def _keys(self, step, places):
            return super()._keys(step, places) if points is None else places

        def match(self, scores, part):
            found = super().match(scores, part)
            run.scores.append({key: np.asarray(score)[0] for key, score in scores.items()})
            run.matches.append({key: index[0] for key, index in found.items()})
            if points is not None:  # the second half is given the same dictionary
                self.drawn.clear()
                self.drawn.update(_of_one_device(points.of_losses(run.matches[-1])))
            return found

    step = WatchedStep(objective, optimizer, devices=jax.devices()[:1])
    state = step.place(TrainState(np.int32(0), params, statistics, optimizer.init(params)))
    for number in range(NUM_STEPS + 1):
        state, metrics = step(state, case.batch)
        metrics = {key: float(np.asarray(value).ravel()[0]) for key, value in metrics.items()}
        run.losses.append(metrics)
        run.gradient_norms.append(metrics["grad_norm"])
        if number + 1 in (1, NUM_STEPS):
            host = step.fetch(state)
            run.after[number + 1] = ours_to_original(host.params, {}, names)
            if number == 0:
                run.gradients = ours_to_original(host.opt_state[0], {}, names)
    return run


def _of_one_device(drawn: Drawn) -> Drawn:
    return {key: array[None] for key, array in drawn.items()}


def keep_gradients() -> optax.GradientTransformation:
    """Pass gradients on and keep the last ones as the state, where a test can read them."""
    return optax.GradientTransformation(lambda params: params, lambda g, state, p=None: (g, g))


def give_memory_back() -> None:
    """Free the gigabytes of a case before the next one."""
    jax.clear_caches()
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps what was freed
    if trim is not None:
        trim(0)


def compare_gradient(errors, case, key, gradient, chosen=slice(None)) -> None:
    """Compare the recorded samples of a parameter's gradient; `chosen` picks some of them."""
    recorded = {part: case.tensors[f"param/{key}/{part}"] for part in ("idx", "grad", "grad_f64")}
    recorded = {part: x[chosen] for part, x in recorded.items()}
    got, want = gradient[recorded["idx"]].astype(np.float64), recorded["grad"].astype(np.float64)
    rms = np.sqrt(np.mean(want**2))
    error = distance(got, recorded["grad"], recorded["grad_f64"]).max() / rms
    errors.check("gradient entries", key.removeprefix("backbone."), error, GRADIENT)
    cosine = got @ want / (np.linalg.norm(got) * np.linalg.norm(want))
    errors.check("gradient cosine", key.removeprefix("backbone."), 1 - cosine, COSINE)


def distance(got, float32, float64) -> np.ndarray:
    """Distance to the nearer of the original's own float32 and float64 runs."""
    got = got.astype(np.float64)
    return np.minimum(np.abs(got - float32), np.abs(got - float64))
