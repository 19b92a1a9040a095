"""Train from a configuration, or continue a run: what `sparseinst train` and a notebook call."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from ml_collections import ConfigDict

from sparseinst_jax.checkpoints.store import Checkpoints
from sparseinst_jax.data import loader
from sparseinst_jax.data.batch import Batch
from sparseinst_jax.data.failures import SkippedImages
from sparseinst_jax.drawing import charts
from sparseinst_jax.drawing.batches import save_first_batches
from sparseinst_jax.inference.predictor import Predictor
from sparseinst_jax.runtime import hosts
from sparseinst_jax.runtime.files import write_json
from sparseinst_jax.runtime.output import lost_output_noted
from sparseinst_jax.runtime.process import refuse_forked
from sparseinst_jax.setup import refusals
from sparseinst_jax.setup.config import default_workdir, diff, load_config
from sparseinst_jax.setup.datasets import draw_missing_data
from sparseinst_jax.setup.loading import load_checkpoint
from sparseinst_jax.setup.run import Run, make_run, resolve_schedule
from sparseinst_jax.training import progress
from sparseinst_jax.training.early_stopping import EarlyStopping
from sparseinst_jax.training.nonfinite import NonFiniteSteps
from sparseinst_jax.training.trainer import Intervals, Trainer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_METRICS_FILE = "metrics.csv"
Writer = Callable[[dict[str, Any]], Any]  # is called with each row of metrics


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """A run as `train` and `fit` leave it: its history, its predictors, and going on.

    Attributes:
      workdir: run folder, for `load` and `evaluate`.
      step: steps that are done.
      exit_code: 0 when finished or stopped early, 130, 143 or 129 when stopped by SIGINT (Ctrl-C,
        the stop button of a notebook), SIGTERM or SIGHUP after saving.
      model: the module that was given, if one was.
      writers: the functions that were given rows of metrics.
    """

    workdir: Path
    step: int
    exit_code: int
    model: Any = dataclasses.field(default=None, repr=False)
    writers: tuple[Writer, ...] = dataclasses.field(default=(), repr=False)

    @property
    def rows(self) -> list[dict[str, float | int]]:
        """The rows of `metrics.csv`: losses, rates and, where evaluated, `AP` of each step."""
        return progress.read_metrics(self.workdir / _METRICS_FILE)

    @property
    def history(self) -> dict[str, np.ndarray]:
        """The same as one array for each name, float64 [rows]; NaN where a row has no value."""
        rows = self.rows
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: np.array([row.get(name, np.nan) for row in rows], float) for name in names}

    @property
    def best(self) -> Predictor:
        """A predictor of the step with the highest AP; the last one's where none was evaluated."""
        return load_checkpoint(self.workdir, "best", model=self.model)

    @property
    def last(self) -> Predictor:
        """A predictor of the last step that was saved."""
        return load_checkpoint(self.workdir, model=self.model)

    def resume(self, num_steps: int | None = None) -> TrainResult:
        """Go on, by default to the end that the configuration says; see `train`."""
        overrides = None if num_steps is None else {"train.num_steps": num_steps}
        config = self.workdir / "config.json"
        return train(config, self.workdir, overrides, model=self.model, writers=self.writers)

    def plot(self) -> Figure:
        """Draw losses, AP and the learning rate over the steps."""
        return charts.training_curves(self.rows)


def train(
    config: str | Path | Mapping[str, Any] | ConfigDict,
    workdir: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    writers: Sequence[Writer] = (),
    model: Any = None,
) -> TrainResult:
    """Train as a configuration says, or continue the run in `workdir`; prints as it goes.

    Writes `config.json`, `metrics.csv`, `checkpoints/`, `curves.png` and pictures of the first
    batches into the folder. The first Ctrl-C ends the run after its step is saved; calling again
    goes on. On several hosts all of them call this, after `hosts.join()`. At the end what JAX has
    compiled in this process is let go of.

    Args:
      config: a name such as "finetune", a file, or a configuration. Its schedule is written for
        `train.base_batch_size` and translated to `train.batch_size`, see `resolve_schedule`; what
        comes out is stored.
      workdir: run folder, made if missing; by default `runs/<name of the configuration>`.
      overrides: dotted key to a value or its text, such as `{"train.batch_size": 8}`. These values
        are meant as they are and not translated.
      writers: functions that are called with each row of metrics, a dict such as {"step": 1,
        "loss/total": 3.2, ...}, with "AP" after an evaluation: for TensorBoard, wandb or MLflow.
        One that raises is not called again, and the run goes on.
      model: a module to train in place of the one that `config.model` describes, see `fit`.

    Raises:
      FileNotFoundError: data or initial weights are missing.
      FolderInUseError: another process trains in the folder.
      NonFiniteLossError: a loss or gradient became NaN or infinite.
      ValueError: the configuration cannot be trained, or differs from the run's.
    """
    refuse_forked()
    if workdir is None:
        if not isinstance(config, str | Path):
            raise ValueError("expected a workdir: only a configuration with a name has a default")
        workdir = default_workdir(config)
    name = Path(config).stem if isinstance(config, str | Path) else "given"
    preset, workdir = load_config(config), Path(workdir).expanduser()
    config = load_config(preset, overrides)
    is_first_host = jax.process_index() == 0
    print_line = functools.partial(print, flush=True) if is_first_host else lambda *_: None
    hosts.refuse_differences("configuration or workdir", f"{workdir} {config.to_json()}")
    refusals.refuse_values(config)
    config, lines = resolve_schedule(config, overrides or ())
    config.data.root = os.getcwd()
    with Checkpoints(workdir) as checkpoints, lost_output_noted(workdir):
        stored = checkpoints.read_meta() if checkpoints.steps else None
        for line in refusals.refuse_changes(stored, config, workdir):
            print_line(line)
        if stored is not None:
            end = _why_it_is_over(config, workdir, stored["step"], checkpoints)
            if end is not None:
                print_line(end)
                return TrainResult(workdir, stored["step"], 0, model, tuple(writers))
        draw_missing_data(config, had_data=(workdir / "config.json").is_file())
        skipped = _skipped_images(config, workdir, 0 if stored is None else stored["step"])
        run = make_run(config, print_line, stored is None, skipped, model)
        refusals.refuse_classes(stored, run.meta, workdir)
        for line in refusals.refuse_changed_data(stored, run.meta, config, workdir):
            print_line(line)
        if is_first_host:
            write_json(workdir / "config.json", config.to_dict(), indent=2)
        print_line(f"configuration {name}, the whole of it in {workdir / 'config.json'}")
        for key, (before, now) in diff(preset, config).items():
            if key != "data.root":
                print_line(f"  {key} = {now!r} ({name}: {before!r})")
        for line in lines:
            print_line(line)
        state, run = run.first_state, run._replace(first_state=None)
        if stored is not None:
            state, _ = checkpoints.restore_state(state)
            print_line(f"continuing after step {int(state.step)} of {config.train.num_steps}")
        elif (workdir / _METRICS_FILE).exists():
            print_line(f"no checkpoint yet in {workdir}: starting at step 1")
        done = int(state.step)  # an unreadable checkpoint is passed over
        handed_over = [state]  # nothing holds it once it is placed
        del state
        try:
            with (
                _open_trainer(config, workdir, run, done, checkpoints, writers) as trainer,
                _read_batches(config, workdir, run, done, skipped) as batches,
            ):
                exit_code = trainer.run(handed_over.pop(), batches)
        finally:
            if skipped is not None:
                print("\n".join(skipped.summary()), flush=True)
        step = checkpoints.latest_step or 0
        if exit_code == 0:
            print_line(f"finished: step {step}; results in {workdir}")
    return TrainResult(workdir, step, exit_code, model, tuple(writers))


def _why_it_is_over(
    config: ConfigDict, workdir: Path, done: int, checkpoints: Checkpoints
) -> str | None:
    """The message for a stored run that has nothing left to do, or None."""
    if done >= config.train.num_steps:
        return (
            f"the run in {workdir} is finished: step {done} of {config.train.num_steps}. To train"
            " on, raise --config.train.num_steps; to start over, give another --workdir."
        )
    early_stopping = EarlyStopping(config.train.early_stopping, _rows(workdir, done))
    return early_stopping.explain(done, checkpoints.best_step) if early_stopping.is_over else None


@contextlib.contextmanager
def _read_batches(
    config: ConfigDict, workdir: Path, run: Run, done: int, skipped: SkippedImages | None
) -> Iterator[Iterator[Batch]]:
    """Read this host's batches after step `done`; the first ones of a new run are also drawn."""
    host, num_hosts = jax.process_index(), jax.process_count()
    batches = loader.train_batches(
        run.dataset,
        run.plan,
        done,
        config.train.num_steps - done,
        host,
        num_hosts,
        config.data.num_workers,
        None if skipped is None else skipped.add,
    )
    folder = workdir / "batches"
    try:
        if host or done:
            yield batches
        else:
            yield save_first_batches(batches, run.plan, run.dataset, folder, host, num_hosts)
    finally:
        if isinstance(batches, Generator):
            batches.close()  # ends the processes that read images


@contextlib.contextmanager
def _open_trainer(
    config: ConfigDict,
    workdir: Path,
    run: Run,
    done: int,
    checkpoints: Checkpoints,
    functions: Sequence[Writer],
) -> Iterator[Trainer]:
    """Make the trainer; afterwards close its files and draw the curves."""
    settings, is_first_host = config.train, jax.process_index() == 0
    writers = _open_writers(workdir, done, settings.tensorboard) if is_first_host else []
    writers += [_FunctionWriter(function) for function in functions if is_first_host]
    rows = _rows(workdir, done)
    with open(os.devnull, "w") as nowhere:
        shown_progress = progress.Progress(
            settings.num_steps,
            run.plan.steps_per_epoch,
            settings.batch_size,
            done,
            sys.stdout if is_first_host else nowhere,
        )
        try:
            yield Trainer(
                step=run.step,
                checkpoints=checkpoints,
                meta=run.meta,
                learning_rate=run.learning_rate,
                steps_per_epoch=run.plan.steps_per_epoch,
                intervals=Intervals(*(settings[name] for name in Intervals.__annotations__)),
                evaluate=run.evaluate,
                early_stopping=EarlyStopping(settings.early_stopping, rows),
                writers=writers,
                progress=shown_progress,
                nonfinite=NonFiniteSteps(settings.skip_nonfinite, rows),
            )
        finally:
            # JAX keeps what a run compiled for the life of the process: on a CPU 700 to 1500 memory
            # mappings each, of the 65,530 that Linux allows. After them XLA ends the process.
            jax.clear_caches()
            for writer in writers:
                with _only_warned("the metrics may lack their end"):
                    writer.close()
            if is_first_host:
                with _only_warned("no curves.png"):
                    charts.save(charts.training_curves(_rows(workdir)), workdir / "curves.png")


@contextlib.contextmanager
def _only_warned(what: str) -> Iterator[None]:
    """Turn an error into a warning: what ended the run, such as a full disk, is to be shown."""
    try:
        yield
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).partition("\n")[0]
        print(f"WARNING: {what}: {reason}", flush=True)


def _open_writers(workdir: Path, done: int, tensorboard: bool) -> list[progress.RowWriter]:
    writers: list[progress.RowWriter] = [progress.MetricsFile(workdir / _METRICS_FILE, done)]
    if tensorboard:
        writers.append(progress.TensorBoard(workdir / "tensorboard", done))
    return writers


class _FunctionWriter:
    """A function of the user as a writer; its fault ends nothing."""

    def __init__(self, function: Writer):
        self._function: Writer | None = function

    def write(self, rows: Sequence[progress.Row]) -> None:
        """Call the function with each row."""
        for row in rows:
            if self._function is None:
                return
            try:
                self._function(dict(row))
            except Exception as error:
                name = getattr(self._function, "__name__", repr(self._function))
                self._function = None
                print(
                    f"WARNING: {name}, one of the writers, raised {type(error).__name__}: {error}. "
                    "It is not called again.",
                    flush=True,
                )

    def close(self) -> None:
        """Nothing is open."""


def _rows(workdir: Path, done: int | float = float("inf")) -> list[dict[str, float | int]]:
    """Read the metrics of the steps done so far; `MetricsFile` reports what cannot be read."""
    rows = progress.read_metrics(workdir / _METRICS_FILE, [])
    return [row for row in rows if row["step"] <= done]


def _skipped_images(config: ConfigDict, workdir: Path, done: int) -> SkippedImages | None:
    """This host's list of skipped images; None where a broken image ends the run."""
    if config.data.on_error != "skip":
        return None
    index = jax.process_index()
    path = workdir / (f"skipped_host{index}.csv" if index else "skipped.csv")
    return SkippedImages(path, done, config.train.batch_size // jax.process_count())
