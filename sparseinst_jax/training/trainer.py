"""The training loop: batches in, checkpoints and metrics out. It knows no model family."""

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from sparseinst_jax.checkpoints.state import TrainState
from sparseinst_jax.checkpoints.store import Checkpoints, SaveError
from sparseinst_jax.data.batch import Batch
from sparseinst_jax.runtime import hosts
from sparseinst_jax.runtime.messages import in_percent
from sparseinst_jax.runtime.pages import page
from sparseinst_jax.runtime.stop_signals import EXIT_CODES, StopSignals
from sparseinst_jax.training.early_stopping import EarlyStopping
from sparseinst_jax.training.nonfinite import NonFiniteLossError, NonFiniteSteps
from sparseinst_jax.training.progress import Progress, RowWriter
from sparseinst_jax.training.step import STOP, TrainStep

SAVE_SECONDS = 180.0  # without a save; then one is due whatever the intervals say


@dataclass(frozen=True)
class Intervals:
    """When things happen, in steps; 0 is never (the last step is always logged and saved).

    A save is also due three minutes after the last one, and before the first evaluation.
    """

    num_steps: int
    log_every: int
    checkpoint_every: int
    eval_every: int

    def is_due(self, every: int, step: int) -> bool:
        """Whether an action with this interval is due after `step`."""
        return every > 0 and (step % every == 0 or step == self.num_steps)


class Trainer:
    """Runs a training step until the last step, a stop signal or a non-finite loss.

    Args:
      step: the compiled step.
      checkpoints: where states are saved.
      meta: stored with each checkpoint (config, class_names, category_ids, code_version).
      learning_rate: of a 0-based step, for the metrics.
      steps_per_epoch: for the metrics.
      intervals: when to log, save and evaluate.
      evaluate: takes a host state's params and statistics, returns metrics with `AP`.
      early_stopping: may end the run after an evaluation.
      writers: take one row per step.
      nonfinite: counts the steps that the step skips; by default it skips none.
      progress: shows the run.
    """

    def __init__(
        self,
        *,
        step: TrainStep,
        checkpoints: Checkpoints,
        meta: Mapping[str, Any],
        learning_rate: Callable[[int], Any],
        steps_per_epoch: float,
        intervals: Intervals,
        evaluate: Callable[[Any, Any], Mapping[str, float]],
        early_stopping: EarlyStopping,
        writers: Sequence[RowWriter],
        progress: Progress,
        nonfinite: NonFiniteSteps | None = None,
    ):
        self._step, self._checkpoints, self._meta = step, checkpoints, meta
        self._learning_rate, self._steps_per_epoch = learning_rate, steps_per_epoch
        self._intervals, self._evaluate = intervals, evaluate
        self._early_stopping = early_stopping
        self._writers, self._progress = writers, progress
        self._nonfinite = nonfinite or NonFiniteSteps(0)
        # Steps whose metrics are still on the device, and the images of each.
        self._pending: list[tuple[int, Mapping[str, Any], list[int]]] = []
        # Several collectives in flight can hang on virtual CPU devices; there is nothing to gain
        # from running ahead on a CPU anyway.
        self._must_block = step.devices[0].platform == "cpu"
        self._num_hosts = jax.process_count()

    def run(self, state: TrainState, batches: Iterator[Batch]) -> int:
        """Train from a host state to the last step.

        Args:
          state: with NumPy leaves; its `step` says how many steps are done.
          batches: this host's batches, the first one for step `state.step`.

        Returns:
          The exit code: 0 when the last step is done or there is no progress any more, one of
          `EXIT_CODES` after a signal (the state is saved first; see `StopSignals`).

        Raises:
          ValueError: an image cannot be read, or (SaveError) a checkpoint not be written.
          NonFiniteLossError: see `_collect`.
        """
        first = done = int(state.step)
        self._saved_step, self._saved_at = first, time.monotonic()
        # On several hosts a signal to one stops all after the same step, and a save by time is due
        # on all: each sends its flag with its step, and reads those of the step before.
        before = agreed = 0
        placed = self._step.place(state)
        del state
        with StopSignals() as stop, closing(self._progress):
            while done < self._intervals.num_steps:
                started = time.monotonic()
                try:
                    hosts.report(f"waiting for the images of step {done + 1}")
                    batch = next(batches)
                except Exception as error:
                    # An image cannot be read, or a signal went to the whole group and ended the
                    # processes that read images: the steps done are not lost. One of several
                    # hosts cannot save: the others are in their next step, and are asked to stop.
                    if done == first or self._num_hosts > 1:
                        raise
                    self._save_after(error, done, placed)
                    if stop.received is not None:
                        return self._stopped(done, stop.received)
                    self._print_stopped(done, "an error")
                    raise
                waited = time.monotonic() - started
                hosts.report(f"training, step {done + 1}")
                with self._progress.stepping(batch, waited):
                    placed, metrics = self._step(placed, batch, self._flag(stop.received))
                    if self._must_block:
                        jax.block_until_ready((placed, metrics))
                done += 1
                before, agreed = agreed, metrics.pop(STOP, 0)
                self._pending.append((done, metrics, np.asarray(batch.image_id).tolist()))
                flag = self._flag(stop.received) if self._num_hosts == 1 else int(_to_float(before))
                received = signal.Signals(flag >> 1) if flag > 1 else None
                self._after(done, placed, received is not None, is_late=bool(flag & 1))
                if received is not None and done < self._intervals.num_steps:
                    return self._stopped(done, received)
                if self._early_stopping.is_over and done < self._intervals.num_steps:
                    self._checkpoints.wait()
                    best = self._checkpoints.best_step
                    self._progress.print_line(self._early_stopping.explain(done, best))
                    return 0
        self._checkpoints.wait()
        return 0

    def _save_after(self, error: Exception, done: int, placed: TrainState) -> None:
        """Save the steps done before an error; if that fails too, the first error is raised."""
        try:
            if done != self._checkpoints.latest_step:
                self._after(done, placed, stopping=True)
            self._checkpoints.wait()
        except SaveError as lost:
            self._progress.print_line(f"WARNING: {lost}")
            raise error from None

    def _flag(self, received: signal.Signals | None) -> int:
        """A host's wishes as one number, of which the largest counts: a signal, or a save."""
        return 2 * (received or 0) + (time.monotonic() - self._saved_at > SAVE_SECONDS)

    def _after(self, done: int, placed: TrainState, stopping: bool, is_late: bool = False) -> None:
        """Log, evaluate and save what is due after a step; if `is_late`, a save is."""
        every, is_last = self._intervals, done == self._intervals.num_steps
        wants_eval = every.is_due(every.eval_every, done) and (is_last or not stopping)
        wants_save = is_last or stopping or wants_eval or every.is_due(every.checkpoint_every, done)
        # The flags of several hosts lag: those sent before a save are still to come.
        wants_save |= is_late and done > self._saved_step + 2
        wants_save |= self._saved_step == 0 and every.is_due(every.eval_every, done + 1)
        wants_log = is_last or every.is_due(every.log_every, done)
        if not (wants_log or wants_save):
            return
        self._checkpoints.check()
        rows = self._collect()
        if rows:
            rows[-1].update(self._progress.rates())
            self._progress.add(rows)
        state = self._step.fetch(placed) if wants_save else None
        scores, fault = None, None
        if wants_eval and state is not None:
            try:
                scores = self._score(done, state)
            except (ValueError, OSError) as error:  # an image, mostly: the steps done are not lost
                if self._num_hosts > 1:
                    raise
                fault = error
        if scores is not None:
            rows[-1].update(scores)
            self._early_stopping.add(scores["AP"])
        for writer in self._writers:
            writer.write(rows)
        if state is not None:
            started = time.monotonic()
            self._checkpoints.save(state, self._meta, scores)
            self._saved_step, self._saved_at = done, time.monotonic()
            self._progress.paused(time.monotonic() - started)
        if rows and wants_log:
            self._progress.report()
        if fault is not None:
            self._print_stopped(done, "an error in the evaluation")
            raise fault

    def _collect(self) -> list[dict[str, float | int]]:
        """Fetch the metrics of the pending steps, one row each.

        Raises:
          NonFiniteLossError: more steps in a row than may be skipped; with the range of steps, the
            images of the batch and the last good checkpoint. The rows before are written first.
        """
        pending, self._pending = self._pending, []
        rows: list[dict[str, float | int]] = []
        for step, metrics, image_ids in pending:
            # Compiled functions sort the names; the total reads best in front.
            names = sorted(metrics, key=lambda name: (name != "loss/total", "/" not in name, name))
            values = {name: _to_float(metrics[name]) for name in names}
            kept, bad, is_over = self._nonfinite.judge(values)
            if bad:
                became = ", ".join(f"{name} became {values[name]}" for name in bad)
                what = f"{became} at step {step}"
                folder = self._checkpoints.directory.parent
                look = f"sparseinst debug-batch --workdir {folder} --step {step - 1}"
                if is_over:
                    for writer in self._writers:
                        writer.write(rows)
                    checked = f"{pending[0][0]} to {pending[-1][0]}"
                    raise self._nonfinite_error(what, checked, image_ids, look)
                self._progress.print_line(
                    f"WARNING: {what}: the step is skipped. Its batch: {look}"
                )
            rows.append(
                {
                    "step": step,
                    **kept,
                    "learning_rate": float(self._learning_rate(step - 1)),
                    "epoch": step / self._steps_per_epoch,
                }
            )
        return rows

    def _nonfinite_error(
        self, what: str, checked: str, image_ids: Sequence[int], look: str
    ) -> NonFiniteLossError:
        self._checkpoints.wait()
        last = self._checkpoints.latest_step
        place = "none yet" if last is None else f"{self._checkpoints.directory / str(last)}"
        skipped = self._nonfinite.in_a_row - 1
        before = f", the {skipped} steps before were skipped" if skipped else ""
        return NonFiniteLossError(
            f"{what}, checked for steps {checked}{before}. Image ids of the batch: {image_ids}."
            f" Last good checkpoint: {place}. Look at the batch ({look}), lower"
            " train.learning_rate, or lengthen the warm-up (train.warmup_steps); bfloat16 users:"
            " try model.dtype=float32. --config.train.skip_nonfinite=N skips up to N such steps"
            f" in a row {page('not-finite')}"
        )

    def _score(self, done: int, state: TrainState) -> dict[str, float]:
        started = time.monotonic()
        self._progress.print_line(f"evaluating step {done}")
        scores = dict(self._evaluate(*state.to_use))
        seconds = time.monotonic() - started
        self._progress.paused(seconds)
        shown = "  ".join(f"{name} {in_percent(value)} %" for name, value in scores.items())
        self._progress.print_line(f"step {done}: {shown}  ({seconds:.0f} s)")
        return scores

    def _stopped(self, done: int, received: signal.Signals) -> int:
        self._print_stopped(done, received.name)
        return EXIT_CODES[received]

    def _print_stopped(self, done: int, reason: str) -> None:
        self._checkpoints.wait()
        self._progress.print_line(
            f"stopped by {reason} after step {done}; saved in"
            f" {self._checkpoints.directory / str(done)}. The same command continues."
        )


def _to_float(value: Any) -> float:
    """Read a metric that is equal on all devices; across hosts only local parts can be read."""
    if isinstance(value, jax.Array):
        value = value.addressable_data(0)
    return float(np.asarray(value).ravel()[0])
