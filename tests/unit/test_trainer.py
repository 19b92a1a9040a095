"""The step and the loop with a network of one number, so that every value is computed by hand."""

import io
import os
import signal
import traceback
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparseinst_jax.checkpoints.state import TrainState
from sparseinst_jax.checkpoints.store import Checkpoints
from sparseinst_jax.data.batch import Batch
from sparseinst_jax.training import trainer
from sparseinst_jax.training.early_stopping import EarlyStopping
from sparseinst_jax.training.optimizer import moving_average
from sparseinst_jax.training.progress import Progress
from sparseinst_jax.training.step import STOP, TrainStep
from sparseinst_jax.training.trainer import Intervals, Trainer

META = {"config": {}, "class_names": ["a"], "category_ids": [1], "code_version": "0"}
PIXELS = (10, 20, 30, 40)  # the gradient of each step


class Counts(NamedTuple):
    targets: np.ndarray


class OneNumber:
    """y = w x, loss y; the running mean of x moves by a half."""

    minimised, loss_takes_params = (), False

    def forward(self, params, statistics, batch):
        x = jnp.asarray(batch.images, jnp.float32).mean()
        return params["w"] * x, {"mean": 0.5 * statistics["mean"] + 0.5 * x}

    def count(self, batch):
        return Counts(np.float32(1))

    def match_scores(self, outputs, batch, keys):
        return {"one": jnp.zeros((1, 1, 1))}

    def loss(self, params, statistics, outputs, batch, matches, counts, keys):
        return outputs, {"y": outputs}


def batches(start: int = 0):
    for step in range(start, len(PIXELS)):
        image = np.full((1, 1, 1, 1), PIXELS[step], np.uint8)
        one = np.ones((1, 1), bool)
        yield Batch(image, np.zeros((1, 2)), np.zeros((1, 1)), np.zeros(1), one, np.arange(1))


OPTIMIZER = optax.sgd(0.125, momentum=0.5)


def first_state(averages: bool) -> TrainState:
    params, statistics = {"w": np.float32(1)}, {"mean": np.float32(0)}
    average = (params, statistics) if averages else None
    return TrainState(np.int32(0), params, statistics, OPTIMIZER.init(params), average)


def run_steps(state: TrainState, ema_decay: float, number: int) -> TrainState:
    step = TrainStep(OneNumber(), OPTIMIZER, ema_decay=ema_decay)
    placed = step.place(state)
    for batch, _ in zip(batches(int(state.step)), range(number), strict=False):
        placed, _ = step(placed, batch)
    return step.fetch(placed)


def plain_trainer(objective, checkpoints: Checkpoints, num_steps: int) -> Trainer:
    """A trainer that neither evaluates nor writes."""
    return Trainer(
        step=TrainStep(objective, OPTIMIZER),
        checkpoints=checkpoints,
        meta=META,
        learning_rate=lambda step: 0.125,
        steps_per_epoch=1,
        intervals=Intervals(num_steps=num_steps, log_every=1, checkpoint_every=0, eval_every=0),
        evaluate=lambda *_: {},
        early_stopping=EarlyStopping(0, ()),
        writers=[],
        progress=Progress(num_steps, 1, 1, 0, io.StringIO()),
    )


def test_averages_follow_weights_and_statistics_as_computed_by_hand():
    # Momentum 0.5 of the gradients 10, 20, 30: velocities 10, 25, 42.5; rate 1/8.
    weights = [1 - 1.25, 1 - 1.25 - 3.125, 1 - 1.25 - 3.125 - 5.3125]
    means = [5.0, 12.5, 21.25]
    decays = [0.1, 2 / 11, 0.2]  # of the third step 3/12 is more than 0.2
    w, mean = 1.0, 0.0
    for d, new_w, new_mean in zip(decays, weights, means, strict=True):
        w, mean = d * w + (1 - d) * new_w, d * mean + (1 - d) * new_mean
    state = run_steps(first_state(True), 0.2, 3)
    assert state.params["w"] == weights[-1] and state.statistics["mean"] == means[-1]
    assert state.average[0]["w"] == pytest.approx(w, rel=1e-6)
    assert state.average[1]["mean"] == pytest.approx(mean, rel=1e-6)
    assert state.to_use == state.average
    plain = run_steps(first_state(False), 0.0, 3)
    assert plain.average is None and plain.to_use == (state.params, state.statistics)


def test_an_average_of_what_does_not_change_stays_exactly():
    number = np.float32(0.1)
    for step in range(50):
        number = moving_average(number, np.float32(0.1), 0.9998, step)
    assert number == np.float32(0.1)


def test_averages_are_what_a_checkpoint_gives_and_training_goes_on_from_the_weights(tmp_path):
    whole = run_steps(first_state(True), 0.2, 4)
    half = run_steps(first_state(True), 0.2, 2)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(half, META)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        params, statistics, _ = checkpoints.restore_model()
    assert (params, statistics) == half.average
    assert params["w"] != half.params["w"]
    with Checkpoints(tmp_path) as checkpoints:
        restored, _ = checkpoints.restore_state(first_state(True))
        with pytest.raises(ValueError, match=r"2 holds averages: set train\.ema_decay"):
            checkpoints.restore_state(first_state(False))
    assert restored.params == half.params and restored.average == half.average
    resumed = run_steps(restored, 0.2, 2)
    assert resumed == whole


def test_a_checkpoint_without_averages_holds_what_it_always_did(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(first_state(False)._replace(step=np.int32(1)), META)
    folders = {path.name for path in (tmp_path / "checkpoints" / "1").iterdir() if path.is_dir()}
    assert folders == {"model", "optimizer", "meta"}


def run_trainer(folder, scores, patience=0, rows=(), start=0, averages=False):
    """Train to step 4 with an evaluation after each; gives the exit code, text and steps."""
    seen, text = [], io.StringIO()

    def evaluate(params, statistics):
        seen.append((params["w"].item(), statistics["mean"].item()))
        return {"AP": scores[start + len(seen) - 1]}

    with Checkpoints(folder) as checkpoints:
        state = first_state(averages)
        if start:
            state, _ = checkpoints.restore_state(state)
        trainer = Trainer(
            step=TrainStep(OneNumber(), OPTIMIZER, ema_decay=0.2),
            checkpoints=checkpoints,
            meta=META,
            learning_rate=lambda step: 0.125,
            steps_per_epoch=1,
            intervals=Intervals(num_steps=4, log_every=1, checkpoint_every=0, eval_every=1),
            evaluate=evaluate,
            early_stopping=EarlyStopping(patience, rows),
            writers=[],
            progress=Progress(4, 1, 1, start, text),
        )
        code = trainer.run(state, batches(start))
        return code, text.getvalue(), checkpoints.steps, seen


def test_with_averages_it_is_they_that_are_evaluated(tmp_path):
    *_, plain = run_trainer(tmp_path / "plain", [0.1] * 4)
    assert [w for w, _ in plain] == [-0.25, -3.375, -8.6875, 1 - 1.25 - 3.125 - 5.3125 - 7.65625]
    *_, averaged = run_trainer(tmp_path / "averaged", [0.1] * 4, averages=True)
    assert averaged[0] == pytest.approx((0.1 * 1 + 0.9 * -0.25, 0.9 * 5), rel=1e-6)


def test_a_run_ends_when_so_many_evaluations_were_no_better(tmp_path):
    # The third is as good as the first and not better: two without progress.
    code, text, steps, seen = run_trainer(tmp_path, [0.5, 0.4, 0.5, 0.9], patience=2)
    assert code == 0 and len(seen) == 3 and steps[-1] == 3
    assert "stopped early after step 3: no better AP in the last 2 evaluations" in text
    assert "AP 50.0 %: add --step best to `sparseinst eval`" in text
    assert "--config.train.early_stopping" in text


@pytest.mark.parametrize(("scores", "patience"), [([0.5, 0.4, 0.6, 0.5], 2), ([0.5] * 4, 0)])
def test_progress_in_time_or_no_patience_trains_to_the_end(tmp_path, scores, patience):
    code, text, steps, _ = run_trainer(tmp_path, scores, patience)
    assert code == 0 and steps[-1] == 4 and "stopped early" not in text


def test_a_continued_run_counts_the_evaluations_before(tmp_path):
    scores = [1 / 3, 0.1, 0.2, 0.9]
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(run_steps(first_state(False), 0.0, 2), META, {"AP": 0.1})
    rows = [{"step": 1, "AP": float(f"{1 / 3:.9g}")}, {"step": 2, "AP": 0.1}]
    assert not EarlyStopping(2, rows).is_over
    code, text, steps, _ = run_trainer(tmp_path, scores, 2, rows, start=2)
    assert code == 0 and steps[-1] == 3 and "stopped early after step 3" in text
    again = EarlyStopping(2, [*rows, {"step": 3, "AP": 0.2}])
    assert again.is_over and again.best == pytest.approx(1 / 3)
    assert not EarlyStopping(1, [{"step": 1, "AP": float(f"{1 / 3:.9g}")}]).is_over
    as_good = EarlyStopping(1, [{"step": 1, "AP": float(f"{1 / 3:.9g}")}])
    as_good.add(1 / 3)  # equal as far as it was stored
    assert as_good.is_over


@pytest.mark.parametrize("good_steps", [0, 2])
def test_an_image_that_cannot_be_read_stops_the_run_after_saving_the_steps_done(
    tmp_path, good_steps
):
    def until_broken():
        for _, batch in zip(range(good_steps), batches(), strict=False):
            yield batch
        raise ValueError("image a.jpg cannot be read")

    text = io.StringIO()
    with Checkpoints(tmp_path) as checkpoints:
        trainer = Trainer(
            step=TrainStep(OneNumber(), OPTIMIZER),
            checkpoints=checkpoints,
            meta=META,
            learning_rate=lambda step: 0.125,
            steps_per_epoch=1,
            intervals=Intervals(num_steps=4, log_every=1, checkpoint_every=0, eval_every=0),
            evaluate=lambda *_: {},
            early_stopping=EarlyStopping(0, ()),
            writers=[],
            progress=Progress(4, 1, 1, 0, text),
        )
        with pytest.raises(ValueError, match=r"a\.jpg cannot be read"):
            trainer.run(first_state(False), until_broken())
    if not good_steps:
        assert list(tmp_path.iterdir()) == []  # no empty folder is left of a run without a step
        return
    assert f"saved in {tmp_path}/checkpoints/2. The same command continues." in text.getvalue()
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        params, _, _ = checkpoints.restore_model()
    assert params["w"] == 1 - 1.25 - 3.125  # see the averages above


@pytest.mark.parametrize("own_signal", [signal.SIGTERM, None], ids=["told by us", "told to us"])
def test_several_hosts_stop_after_the_step_that_follows_the_telling(
    tmp_path, monkeypatch, own_signal
):
    """The host that is asked and the one that only hears of it end after the same step."""
    real, told = TrainStep.__call__, []

    def one_of_two_hosts(self, state, batch, stop=0):
        told.append(stop)
        state, metrics = real(self, state, batch, stop)
        if len(told) == 1 and own_signal is not None:
            os.kill(os.getpid(), own_signal)
        if len(told) == 2 and own_signal is None:  # the other host's
            metrics[STOP] = np.int32(2 * signal.SIGTERM)
        return state, metrics

    monkeypatch.setattr(TrainStep, "__call__", one_of_two_hosts)
    with Checkpoints(tmp_path) as checkpoints:
        trainer = plain_trainer(OneNumber(), checkpoints, 4)
        trainer._num_hosts = 2
        assert trainer.run(first_state(False), batches()) == 143
        assert checkpoints.steps == (3,)
    assert told == [0, *[2 * int(own_signal or 0)] * 2]


def test_from_the_loop_to_the_loss_there_are_four_functions(tmp_path):
    """What who reads a step has to follow: the loop, the step, its second half, the loss."""
    seen = []

    class Looks(OneNumber):
        def loss(self, *arguments):
            frames = [
                frame for frame in traceback.extract_stack() if "sparseinst_jax" in frame.filename
            ]
            seen.append([frame.name for frame in frames])
            return super().loss(*arguments)

    with Checkpoints(tmp_path) as checkpoints:
        trainer = plain_trainer(Looks(), checkpoints, 1)
        trainer.run(first_state(False), batches())
    assert seen == [["run", "__call__", "_second_half"]]


def test_a_save_is_due_by_time_too_on_one_host_and_on_several(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "SAVE_SECONDS", -1.0)
    for number, steps in ((1, (3, 4)), (2, (3, 4))):
        with Checkpoints(tmp_path / str(number)) as checkpoints:
            ours = plain_trainer(OneNumber(), checkpoints, 4)
            ours._num_hosts = number
            assert ours.run(first_state(False), batches()) == 0
            assert checkpoints.steps == steps


def test_a_run_without_a_checkpoint_saves_before_its_first_evaluation(tmp_path):
    seen = []
    with Checkpoints(tmp_path) as checkpoints:
        ours = plain_trainer(OneNumber(), checkpoints, 4)
        ours._intervals = Intervals(num_steps=4, log_every=1, checkpoint_every=0, eval_every=2)

        def evaluate(*_):
            checkpoints.wait()
            seen.append(checkpoints.steps)
            return {"AP": 0.5}

        ours._evaluate = evaluate
        assert ours.run(first_state(False), batches()) == 0
    assert seen == [(1,), (1, 2)]
