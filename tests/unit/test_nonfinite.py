"""Steps that are not finite change nothing, are counted, and end the run when they do not stop."""

import io
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparseinst_jax.checkpoints.state import TrainState
from sparseinst_jax.checkpoints.store import Checkpoints
from sparseinst_jax.training.early_stopping import EarlyStopping
from sparseinst_jax.training.nonfinite import NonFiniteLossError, NonFiniteSteps
from sparseinst_jax.training.progress import MetricsFile, Progress, read_metrics
from sparseinst_jax.training.step import TrainStep
from sparseinst_jax.training.trainer import Intervals, Trainer
from tests.unit.test_trainer import META, PIXELS, OneNumber, batches

BAD = 20  # the pixel of the second step


class BreaksAtOneImage(OneNumber):
    """The loss, or the gradient alone, is not finite for one image."""

    def __init__(self, pixels=(BAD,), in_gradient=False):
        self.pixels, self.in_gradient = pixels, in_gradient
        self.num_traces = 0

    def forward(self, params, statistics, batch):
        x = jnp.asarray(batch.images, jnp.float32).mean()
        is_bad = jnp.isin(x, jnp.asarray(self.pixels, jnp.float32))
        if self.in_gradient:  # the square root has none at 0; at 1 it is a half, which is undone
            zero, one = (
                params["w"] - jax.lax.stop_gradient(params["w"]),
                jnp.where(is_bad, 0.0, 1.0),
            )
            y = params["w"] * x + jnp.sqrt(zero + one) - one - 0.5 * zero
        else:
            y = params["w"] * x + jnp.where(is_bad, jnp.nan, 0.0)
        return y, {"mean": 0.5 * statistics["mean"] + 0.5 * x}

    def loss(self, params, statistics, outputs, batch, matches, counts, keys):
        self.num_traces += 1
        return super().loss(params, statistics, outputs, batch, matches, counts, keys)


def rate(step):
    return jnp.asarray([0.125, 0.25, 0.5, 1.0])[step]


OPTIMIZER = optax.sgd(rate, momentum=0.5)


def first_state(averages=True):
    params, statistics = {"w": np.float32(1)}, {"mean": np.float32(0)}
    average = (params, statistics) if averages else None
    return TrainState(np.int32(0), params, statistics, OPTIMIZER.init(params), average)


@pytest.mark.parametrize("in_gradient", [False, True])
def test_a_step_that_is_not_finite_changes_nothing_but_its_number(in_gradient):
    step = TrainStep(
        BreaksAtOneImage(in_gradient=in_gradient), OPTIMIZER, ema_decay=0.2, skips_nonfinite=True
    )
    placed, states, metrics = step.place(first_state()), [], []
    for batch in batches():
        placed, values = step(placed, batch)
        states.append(step.fetch(placed))
        metrics.append({name: float(np.ravel(value)[0]) for name, value in values.items()})
    before, after = states[:2]
    assert np.isfinite(metrics[1]["loss/total"]) == in_gradient
    assert np.isfinite(metrics[1]["grad_norm"]) != in_gradient
    assert (before.step, after.step) == (1, 2)
    assert after.params == before.params == {"w": 1 - 1.25}
    assert after.statistics == before.statistics == {"mean": 5.0}
    assert after.average == before.average
    trace = [np.asarray(leaf).item() for leaf in jax.tree.leaves(after.opt_state)]
    assert trace == [10.0, 2]  # the momentum of before; the schedule goes on with the steps
    # Velocities 10, 0.5 * 10 + 30, 0.5 * 35 + 40; the rates are those of steps 0, 2 and 3.
    assert states[3].params["w"] == 1 - 10 / 8 - 35 / 2 - 57.5
    assert step.objective.num_traces == 1  # compiled once


def test_without_a_fault_skipping_changes_no_number():
    results = []
    for skips in (False, True):
        step = TrainStep(OneNumber(), OPTIMIZER, ema_decay=0.2, skips_nonfinite=skips)
        placed = step.place(first_state())
        for batch in batches():
            placed, _ = step(placed, batch)
        results.append(step.fetch(placed))
    assert results[0] == results[1]


def run(folder, limit, pixels, start=0, num_steps=4):
    rows = [r for r in read_metrics(folder / "metrics.csv") if r["step"] <= start]
    text = io.StringIO()
    with Checkpoints(folder) as checkpoints:
        state = first_state(False)
        if start:
            state, _ = checkpoints.restore_state(state)
        trainer = Trainer(
            step=TrainStep(BreaksAtOneImage(pixels), OPTIMIZER, skips_nonfinite=limit > 0),
            checkpoints=checkpoints,
            meta=META,
            learning_rate=rate,
            steps_per_epoch=1,
            intervals=Intervals(num_steps, log_every=1, checkpoint_every=1, eval_every=0),
            evaluate=lambda *_: {},
            early_stopping=EarlyStopping(0, ()),
            writers=[MetricsFile(folder / "metrics.csv", start)],
            progress=Progress(num_steps, 1, 1, start, text),
            nonfinite=NonFiniteSteps(limit, rows),
        )
        trainer.run(state, batches(start))
    return text.getvalue()


def column(folder):
    return [row.get("nonfinite_steps") for row in read_metrics(folder / "metrics.csv")]


def test_skipped_steps_are_counted_and_name_the_command_that_shows_their_batch(tmp_path):
    text = run(tmp_path, 1, (PIXELS[1], PIXELS[3]))
    assert column(tmp_path) == [0, 1, 1, 2]
    assert [row.get("loss/total") is None for row in read_metrics(tmp_path / "metrics.csv")] == [
        False,
        True,
        False,
        True,
    ]
    assert "loss/total became nan, loss/y became nan, grad_norm became nan at step 2" not in text
    assert "at step 2: the step is skipped." in text
    assert f"sparseinst debug-batch --workdir {tmp_path} --step 1\n" in text


def test_more_in_a_row_than_allowed_end_the_run_also_over_a_restart(tmp_path):
    bad = (PIXELS[1], PIXELS[2])
    with pytest.raises(NonFiniteLossError, match=r"at step 3.*the 1 steps before were skipped"):
        run(tmp_path / "whole", 1, bad)
    assert column(tmp_path / "whole") == [0, 1]
    run(tmp_path / "parts", 1, bad, num_steps=2)
    with pytest.raises(NonFiniteLossError, match=r"at step 3.*Last good checkpoint: .*/2\."):
        run(tmp_path / "parts", 1, bad, start=2)
    assert "skipped" in run(tmp_path / "two", 2, bad)


def test_by_default_the_first_one_ends_the_run_and_there_is_no_counter(tmp_path):
    with pytest.raises(NonFiniteLossError, match=r"nan at step 2.*skip_nonfinite=N") as caught:
        run(tmp_path, 0, (BAD,))
    assert "steps before" not in str(caught.value)
    assert column(tmp_path) == [None]


SIGNALS = """
import os, signal, sys, time
from sparseinst_jax.runtime.stop_signals import StopSignals
with StopSignals() as stop:
    os.kill(os.getpid(), signal.{first})
    os.kill(os.getpid(), signal.{first})  # as `timeout` does: to the process and to its group
    time.sleep(0.2)
    assert stop.received == signal.{first}
    print("noted", flush=True)
    if {in_python}:
        time.sleep(30)
    else:
        import numpy as np
        while True:
            np.sort(np.random.default_rng(0).random(20_000_000))  # compiled code
"""


@pytest.mark.parametrize(
    ("first", "second", "code", "in_python"),
    [("SIGTERM", "SIGTERM", 143, True), ("SIGTERM", "SIGINT", 130, False)],
)
def test_a_second_signal_ends_the_process_at_once(first, second, code, in_python):
    text = SIGNALS.format(first=first, in_python=in_python)
    process = subprocess.Popen(
        [sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "noted\n"
    time.sleep(0.8)
    started = time.monotonic()
    process.send_signal(getattr(signal, second))
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert time.monotonic() - started < 5
    assert f"{first}: finishing the step and saving; a second signal stops at once" in said
    assert f"stopped at once by a second {second}" in said
