"""`sparseinst train`: put data, model, optimizer and loop together and run them."""

import argparse
import dataclasses
import functools
import os
import sys
from collections.abc import Collection, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from sparseinst_jax.checkpoints.state import TrainState
from sparseinst_jax.checkpoints.store import Checkpoints
from sparseinst_jax.cli.arguments import add_config_arguments, parse_command_line
from sparseinst_jax.data import loader
from sparseinst_jax.data.batch import Batch
from sparseinst_jax.data.failures import SkippedImages
from sparseinst_jax.drawing import charts
from sparseinst_jax.drawing.batches import save_first_batches
from sparseinst_jax.runtime import hosts, process
from sparseinst_jax.runtime.files import write_json
from sparseinst_jax.setup import config as configs
from sparseinst_jax.setup import train_checks
from sparseinst_jax.setup.train_setup import Run, prepare, resolve_schedule
from sparseinst_jax.training import progress
from sparseinst_jax.training.early_stopping import EarlyStopping
from sparseinst_jax.training.nonfinite import NonFiniteLossError, NonFiniteSteps
from sparseinst_jax.training.trainer import Intervals, Trainer

_DESCRIPTION = """Train on COCO-format data. Starting the same command again continues the run.
Exit codes: 0 done, 1 error or non-finite loss, 75 another host was lost, 130 and 143 saved and
stopped by a signal."""
_METRICS_FILE = "metrics.csv"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse `--config FILE [--workdir DIR] [--init-from PATH] [--config.KEY=VALUE ...]` and train.

    Returns:
      The exit code, see `train`.
    """
    parser = argparse.ArgumentParser("train.py", description=_DESCRIPTION)
    add_config_arguments(parser)
    parser.add_argument(
        "--init-from",
        metavar="PATH",
        help="start from these weights, the same as --config.train.init_from: a file (.pth,"
        " .pkl, .pdparams, .npz, .safetensors), or a run or checkpoint folder",
    )
    hosts.add_argument(parser)
    arguments = parse_command_line(parser, argv)
    if arguments.config is None:
        parser.error("--config NAME is needed, such as --config shapes")
    if arguments.init_from is not None:
        if "train.init_from" in arguments.overrides:
            parser.error("give --init-from or --config.train.init_from, not both")
        arguments.overrides["train.init_from"] = arguments.init_from
    config = configs.load_config(arguments.config, arguments.overrides)
    process.unmap_freed_blocks()
    hosts.join(arguments.distributed)
    workdir = arguments.workdir or configs.default_workdir(arguments.config)
    return train(config, workdir, literal_keys=arguments.overrides)


def train(config: ConfigDict, workdir: str | Path, *, literal_keys: Collection[str] = ()) -> int:
    """Train as the configuration says, or continue the run in `workdir`.

    Writes `config.json`, `metrics.csv`, `checkpoints/`, `curves.png` and pictures of the first
    batches into the folder. On several hosts all of them call this, after `hosts.join()`.

    Args:
      config: its schedule is written for `train.base_batch_size` and translated to
        `train.batch_size`, see `train_setup.resolve_schedule`; what comes out is stored.
      workdir: run folder, made if missing.
      literal_keys: keys whose values are not translated, as those typed on the command line.

    Returns:
      Exit code: 0 finished (or already finished before, or stopped early), 1 after a non-finite
      loss, 130 or 143 when stopped by SIGINT or SIGTERM after saving.

    Raises:
      FileNotFoundError: data or initial weights are missing.
      ValueError: the configuration cannot be trained, or differs from the run's.
    """
    workdir = Path(workdir)
    is_first_host = jax.process_index() == 0
    say = functools.partial(print, flush=True) if is_first_host else lambda *_: None
    hosts.refuse_differences("configuration or workdir", f"{workdir} {config.to_json()}")
    train_checks.check(config)
    config, lines = resolve_schedule(config, literal_keys)
    say("\n".join([f"configuration of {workdir}:\n{configs.describe(config)}", *lines]))
    with Checkpoints(workdir) as checkpoints:
        stored = _stored_meta(checkpoints)
        for line in train_checks.refuse_changes(stored, config, workdir):
            say(line)
        if stored is not None and stored["step"] >= config.train.num_steps:
            say(
                f"the run in {workdir} is finished: step {stored['step']} of"
                f" {config.train.num_steps}. To go on, raise --config.train.num_steps; to start"
                " anew, give another --workdir."
            )
            return 0
        if stored is not None:
            early_stopping = _early_stopping(config, workdir, stored["step"])
            if early_stopping.is_over:
                say(early_stopping.explain(stored["step"], checkpoints.best_step))
                return 0
        skipped = _skipped_images(config, workdir, 0 if stored is None else stored["step"])
        run = prepare(config, say, is_new=stored is None, skipped=skipped)
        train_checks.refuse_classes(stored, run.meta, workdir)
        for line in train_checks.refuse_changed_data(stored, run.meta, config, workdir):
            say(line)
        if is_first_host:
            write_json(workdir / "config.json", config.to_dict(), indent=2)
        state = run.first_state
        if stored is not None:
            state, _ = checkpoints.restore_state(state)
            say(f"continuing after step {int(state.step)} of {config.train.num_steps}")
        code = _loop(config, workdir, checkpoints, run, state, skipped)
        if skipped is not None:
            print("\n".join(skipped.summary()), flush=True)
        if code == 0:
            say(f"finished: step {checkpoints.latest_step}; results in {workdir}")
    return code


def _loop(
    config: ConfigDict,
    workdir: Path,
    checkpoints: Checkpoints,
    run: Run,
    state: TrainState,
    skipped: SkippedImages | None,
) -> int:
    """Run the trainer between open files, and draw the curves at the end."""
    settings, done = config.train, int(state.step)
    is_first_host = jax.process_index() == 0
    early_stopping = _early_stopping(config, workdir, done)
    writers = _open_writers(workdir, done, settings.tensorboard) if is_first_host else []
    steps_per_epoch = run.plan.steps_per_epoch
    with open(os.devnull, "w") as nowhere:
        shown_progress = progress.Progress(
            settings.num_steps,
            steps_per_epoch,
            settings.batch_size,
            done,
            sys.stdout if is_first_host else nowhere,
        )
        trainer = Trainer(
            step=run.step,
            checkpoints=checkpoints,
            meta=run.meta,
            learning_rate=run.learning_rate,
            steps_per_epoch=steps_per_epoch,
            intervals=Intervals(*(settings[field.name] for field in dataclasses.fields(Intervals))),
            evaluate=run.evaluate,
            early_stopping=early_stopping,
            writers=writers,
            progress=shown_progress,
            nonfinite=_nonfinite_steps(config, workdir, done),
        )
        batches = _read_batches(config, run, done, skipped)
        shown: Iterator[Batch] = batches
        if is_first_host and not done:
            shown = save_first_batches(
                batches, run.plan, run.dataset, workdir / "batches", 0, jax.process_count()
            )
        try:
            return trainer.run(state, shown)
        except NonFiniteLossError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        finally:
            # JAX keeps what a run compiled for the life of the process: on a CPU 700 to 1500 memory
            # mappings each, of the 65,530 that Linux allows. After them XLA ends the process.
            jax.clear_caches()
            if isinstance(batches, Generator):
                batches.close()  # ends the processes that read images
            for writer in writers:
                writer.close()
            if is_first_host:
                rows = progress.read_metrics(workdir / _METRICS_FILE)
                charts.save(charts.training_curves(rows), workdir / "curves.png")


def _read_batches(
    config: ConfigDict, run: Run, done: int, skipped: SkippedImages | None
) -> Iterator[Batch]:
    return loader.train_batches(
        run.dataset,
        run.plan,
        done,
        config.train.num_steps - done,
        jax.process_index(),
        jax.process_count(),
        config.data.num_workers,
        None if skipped is None else skipped.add,
    )


def _early_stopping(config: ConfigDict, workdir: Path, done: int) -> EarlyStopping:
    rows = progress.read_metrics(workdir / _METRICS_FILE)
    return EarlyStopping(config.train.early_stopping, [r for r in rows if r["step"] <= done])


def _nonfinite_steps(config: ConfigDict, workdir: Path, done: int) -> NonFiniteSteps:
    rows = progress.read_metrics(workdir / _METRICS_FILE)
    return NonFiniteSteps(config.train.skip_nonfinite, [r for r in rows if r["step"] <= done])


def _skipped_images(config: ConfigDict, workdir: Path, done: int) -> SkippedImages | None:
    """The list of this host; None where an image that cannot be used ends the run."""
    if config.data.on_error != "skip":
        return None
    index = jax.process_index()
    path = workdir / (f"skipped_host{index}.csv" if index else "skipped.csv")
    return SkippedImages(path, done, config.train.batch_size // jax.process_count())


def _open_writers(workdir: Path, done: int, tensorboard: bool) -> list[progress.RowWriter]:
    writers: list[progress.RowWriter] = [progress.MetricsFile(workdir / _METRICS_FILE, done)]
    if tensorboard:
        writers.append(progress.TensorBoard(workdir / "tensorboard", done))
    return writers


def _stored_meta(checkpoints: Checkpoints) -> dict[str, Any] | None:
    return checkpoints.read_meta() if checkpoints.steps else None
