"""Save and restore runs with Orbax; the only module that knows its interface.

A checkpoint `<workdir>/checkpoints/<step>/` holds three items: `model` (parameters and statistics,
which load alone), `optimizer`, and `meta` (JSON: step, configuration, classes, code version). A run
that averages its weights has the averages in `model`, for evaluation and prediction, and the
trained weights in `trained`. All arrays are stored from the host's memory, so that a run continues
on any number of devices.
"""

import contextlib
import errno
import itertools
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from sparseinst_jax.checkpoints import limits
from sparseinst_jax.checkpoints.folders import (
    has_bad_metrics,
    is_step,
    locate,
    set_aside,
    whole_steps,
)
from sparseinst_jax.checkpoints.state import TrainState
from sparseinst_jax.runtime.files import FolderLock, make_folder, remove_empty

Value = TypeVar("Value")
_HALF = ".orbax-checkpoint-tmp"  # how Orbax calls a save that is not complete
_NUM_LATEST = 2  # the one before the last is there if the last cannot be read
# Why a checkpoint cannot be written; TensorStore and Orbax wrap it in a page of their own words.
_CAUSES = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM),
)


class SaveError(ValueError):
    """A checkpoint could not be written; the ones before it are whole."""


class Checkpoints:
    """The checkpoints of one run.

    Keeps the last two and the best (by `AP`, among those saved with metrics). Saving happens in
    the background; `close`, or leaving the `with` block, waits for it. Who may save holds the
    folder's lock (of several hosts the first one), so that what is left of a broken save can be
    removed: no living process is writing it.

    Args:
      path: a run folder, its `checkpoints` folder, or the folder of one step.
      read_only: refuse to save; the folder must exist then.

    Raises:
      FileNotFoundError: `read_only`, and there is no checkpoint.
      FolderInUseError: not `read_only`, and another process writes there.
    """

    def __init__(self, path: str | Path, read_only: bool = False):
        self._made: list[Path] = []
        self._saving: int | None = None
        self._half: Path | None = None  # what a failed save left
        self._lock: FolderLock | None = None
        with contextlib.ExitStack() as undo:
            undo.callback(self._let_go)
            if read_only:
                self.directory, self._only_step = locate(path)
                self._while_saving(lambda: self._open(path, read_only))
            else:
                self._open(path, read_only)
            undo.pop_all()

    def _open(self, path: str | Path, read_only: bool) -> None:
        if not read_only:
            self.directory, self._only_step = Path(path).resolve() / "checkpoints", None
            _silence_failed_saves()
            self._made = make_folder(self.directory, "--workdir")
            if jax.process_index() == 0:
                self._lock = FolderLock(self.directory.parent, "--workdir")
            broken = [p for p in self.directory.iterdir() if is_step(p) and has_bad_metrics(p)]
            set_aside(broken)  # Orbax would refuse to open the whole folder
        with _quiet():
            self._manager = ocp.CheckpointManager(
                self.directory,
                item_handlers={
                    "model": ocp.StandardCheckpointHandler(),
                    "trained": ocp.StandardCheckpointHandler(),
                    "optimizer": ocp.StandardCheckpointHandler(),
                    "meta": ocp.JsonCheckpointHandler(),
                },
                options=_options(read_only),
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.close()
        except SaveError as error:
            if kind is None:
                raise
            if kind is not SaveError:  # the first one says it all
                print(error, file=sys.stderr)  # in addition to the error being raised

    def close(self) -> None:
        """Wait for the save in progress, release the folder, and remove it if it stayed empty.

        Raises:
          SaveError: that save failed.
        """
        try:
            try:
                self.wait()
            finally:
                with self._save_errors():
                    self._manager.close()
        finally:
            if self._half is not None:  # threads may have written on until now
                _remove(self._half)
            self._let_go()

    def _let_go(self) -> None:
        if self._lock is not None:
            self._lock.release()
        remove_empty(self._made)

    def wait(self) -> None:
        """Wait for the save in progress; raises SaveError if it failed."""
        with self._save_errors():
            self._manager.wait_until_finished()

    def check(self) -> None:
        """Raise SaveError if the last save has failed by now; does not wait for it."""
        # Several hosts would find out at different steps; they do at the next save.
        if jax.process_count() == 1 and not self._manager.is_saving_in_progress():
            self.wait()

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps with a complete checkpoint, increasing."""
        steps = tuple(sorted(self._manager.all_steps()))
        return steps if self._only_step is None else (self._only_step,)

    @property
    def latest_step(self) -> int | None:
        """The last step saved, or None."""
        return self.steps[-1] if self.steps else None

    @property
    def best_step(self) -> int | None:
        """The step with the highest AP, the last one where none was evaluated, or None."""
        scored = [(self._score(step), step) for step in self.steps]
        return max(scored)[1] if scored else None

    def save(
        self, state: TrainState, meta: Mapping[str, Any], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Save a state under its step, in the background.

        Args:
          state: host state with fields step, params, statistics and opt_state (NumPy leaves);
            must not be written to afterwards. With opt_state None a run can start from it only.
          meta: JSON values; `step` is added.
          metrics: what an evaluation of this state gave; `AP` ranks the checkpoints.

        Raises:
          SaveError: the state cannot be written, or the one before could not.
        """
        step = int(state.step)
        if metrics is not None:  # JSON has no NaN; an AP that is not defined must not win
            metrics = {k: float(v) if np.isfinite(v) else -1.0 for k, v in metrics.items()}
        # Copies in NumPy: a background save must not see later changes, nor touch devices.
        items = jax.tree.map(lambda leaf: np.array(leaf), _items(state))
        self.wait()
        self._saving = step
        with _quiet(), self._save_errors():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
                    meta=ocp.args.JsonSave({**meta, "step": step, "metrics": metrics or {}}),
                ),
                metrics=metrics,
                force=True,
            )

    @contextmanager
    def _save_errors(self) -> Iterator[None]:
        """Turn errors into a SaveError: which step could not be saved, why, and what is left."""
        try:
            yield
        # Disk faults appear as OSError, ValueError of TensorStore, or Orbax errors around them.
        except Exception as error:
            if self._saving is None:
                raise
            steps = [s for s in whole_steps(self.directory) if s != self._saving]
            if jax.process_count() == 1:  # what there is of it would only fill the disk
                self._half = self.directory / f"{self._saving}{_HALF}"
                _remove(self._half)
            last = f"{self.directory / str(max(steps))} is complete" if steps else "there is none"
            raise SaveError(
                f"the checkpoint of step {self._saving} could not be saved:"
                f" {_cause(error)}. The last one: {last}. Free some space, or fix the cause;"
                " then the same command continues from there."
            ) from error

    def restore_state(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Restore the last state that can be read, to continue training.

        A checkpoint that cannot be read is reported, set aside as `<step>.unreadable`, and the
        one before it is used.

        Args:
          abstract: a state whose leaves have the wanted shapes and types.

        Returns:
          The state with NumPy leaves, and the stored meta.

        Raises:
          FileNotFoundError: there is no checkpoint.
          ValueError: none can be read, or the stored arrays have other names or shapes.
        """
        candidates = self._candidates(None)
        if not any((self.directory / str(step) / "optimizer").is_dir() for step in candidates):
            raise ValueError(
                f"{self.directory} holds only weights, so there is no run to continue: start one"
                " from it with --init-from, in another --workdir."
            )
        restored, step = self._first_readable(
            candidates, lambda step: self._restore(step, jax.tree.map(_empty, _items(abstract)))
        )
        # A complete checkpoint of another network is not damaged: it is refused and left alone.
        _check_like(restored, abstract, self.directory)
        if abstract.average is None and (self.directory / str(step) / "trained").is_dir():
            raise ValueError(f"{self.directory / str(step)} holds averages: set train.ema_decay.")
        newer = [self.directory / str(s) for s in self.steps if s > step]
        if newer:
            set_aside(newer)
            self._manager.reload()
        weights = {name: jax.tree.map(np.asarray, restored[name]) for name in _weights(abstract)}
        trained = weights.get("trained", weights["model"])
        state = abstract._replace(
            step=np.int32(step),
            **trained,
            opt_state=jax.tree.unflatten(
                jax.tree.structure(abstract.opt_state),
                [np.asarray(leaf) for _, leaf in sorted(restored["optimizer"].items())],
            ),
        )
        if abstract.average is not None:
            model = weights["model"]
            state = state._replace(average=(model["params"], model["statistics"]))
        return state, restored["meta"]

    def restore_model(
        self, step: int | str | None = None
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Load parameters and statistics without the optimizer's state.

        Args:
          step: a step, "best" (highest AP) or None for the last. Where the last cannot be read,
            the one before it is used, with a message.

        Returns:
          (params, statistics, meta), the first two nested dicts of NumPy arrays.

        Raises:
          FileNotFoundError: there is no such checkpoint.
          ValueError: the checkpoint cannot be read.
        """

        def read(candidate: int) -> dict[str, Any]:
            shapes = self._manager.item_metadata(candidate)["model"]
            return self._restore(candidate, {"model": jax.tree.map(_empty, dict(shapes))})

        restored = self._read_listed(step, read)
        model = jax.tree.map(np.asarray, restored["model"])
        return model["params"], model["statistics"], restored["meta"]

    def read_meta(self, step: int | str | None = None) -> dict[str, Any]:
        """Read the stored meta alone: step, config, class_names, category_ids, code_version.

        The step is as in `restore_model`.
        """
        return self._read_listed(step, lambda candidate: self._restore(candidate, {}))["meta"]

    def _read_listed(
        self, step: int | str | None, read: Callable[[int], dict[str, Any]]
    ) -> dict[str, Any]:
        """Read the first readable checkpoint, of those that are there by now."""
        tries = itertools.count()

        def look() -> dict[str, Any]:
            if next(tries):
                self._manager.reload()
            return self._first_readable(self._candidates(step), read)[0]

        return self._while_saving(look)

    def _while_saving(self, read: Callable[[], Value]) -> Value:
        """Read again where training, replaced what was listed."""
        for seconds in (0.1, 0.5, 2.0, None):
            listed = whole_steps(self.directory)
            try:
                return read()
            except Exception:
                time.sleep(seconds or 0)
                if seconds is None or whole_steps(self.directory) == listed:
                    raise
        raise AssertionError("unreachable")

    def _first_readable(
        self, candidates: Sequence[int], read: Callable[[int], dict[str, Any]]
    ) -> tuple[dict[str, Any], int]:
        """Read the first of the candidates that can be read, and report the others."""
        faults = []
        for step in candidates:
            try:
                limits.refuse_unsafe_files(self.directory / str(step))
                found = read(step)
                for fault in faults:
                    print(fault, file=sys.stderr)
                return found, step
            # Damage appears as almost any error: KeyError, JSON errors, errors of TensorStore.
            except Exception as error:
                faults.append(f"{self.directory / str(step)} cannot be read: {_first_line(error)}")
        raise ValueError(
            "no checkpoint can be read:\n  "
            + "\n  ".join(faults)
            + "\nIf another process writes there, try again; otherwise give another checkpoint, or,"
            " to start over, another --workdir."
        )

    def _score(self, step: int) -> float:
        try:
            return self._restore(step, {})["meta"]["metrics"].get("AP", -np.inf)
        except Exception:
            return -np.inf

    def _candidates(self, step: int | str | None) -> list[int]:
        if not self.steps:
            raise FileNotFoundError(
                f"no checkpoint in {self.directory}. Train first, or give the right path."
            )
        if step is None:
            return list(reversed(self.steps))
        wanted = self.best_step if step == "best" else step
        if wanted not in self.steps:
            raise FileNotFoundError(
                f"no checkpoint of step {step} in {self.directory}; there are {self.steps}."
                " Give one of these, train first, or give the right path."
            )
        return [int(wanted)]

    def _restore(self, step: int, targets: Mapping[str, Any]) -> dict[str, Any]:
        if targets:
            limits.refuse_huge_arrays(self._manager.item_metadata(step), targets)
        arguments = {name: ocp.args.StandardRestore(tree) for name, tree in targets.items()}
        restored = self._manager.restore(
            step, args=ocp.args.Composite(meta=ocp.args.JsonRestore(), **arguments)
        )
        limits.check_meta(restored["meta"])
        return {name: restored[name] for name in (*targets, "meta")}


def _cause(error: Exception) -> str:
    """The operating system's reason if the error holds one, otherwise its first line."""
    text = str(error)
    known = (os.strerror(number) for number in _CAUSES)
    return next((cause for cause in known if cause in text), _first_line(error))


def _silence_failed_saves() -> None:
    """Keep what a failed save leaves behind from burying the SaveError, which says it all.

    Orbax logs tracebacks. It closes its event loop while TensorStore still writes: each of those
    writes ends in an exception on a thread of C++, which goes to `sys.unraisablehook`, and what
    waited for them is never awaited or looked at.
    """
    for logger in (absl.logging.get_absl_logger(), logging.getLogger("asyncio")):
        logger.addFilter(_is_not_of_orbax)  # once, however often
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    if not isinstance(sys.unraisablehook, _WithoutClosedLoops):
        sys.unraisablehook = _WithoutClosedLoops(sys.unraisablehook)


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in f"{record.pathname} {record.getMessage()}"


class _WithoutClosedLoops:
    """A `sys.unraisablehook` that passes everything on but what TensorStore's threads raise."""

    def __init__(self, before: Callable[[Any], Any]):
        self._before = before

    def __call__(self, found: Any) -> None:
        if not (found.exc_type is RuntimeError and str(found.exc_value) == "Event loop is closed"):
            self._before(found)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide Orbax's warnings about options that are intended."""
    before = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)
    try:
        yield
    finally:
        absl.logging.set_verbosity(before)


def _options(read_only: bool) -> ocp.CheckpointManagerOptions:
    def rank(metrics: Mapping[str, float]) -> float:
        return metrics["AP"]

    policies = checkpoint_managers
    return ocp.CheckpointManagerOptions(
        # The policy decides what is kept, `best_fn` what `best_step` answers: both are needed.
        preservation_policy=policies.AnyPreservationPolicy(
            [
                policies.LatestN(_NUM_LATEST),
                policies.BestN(get_metric_fn=rank, n=1, keep_checkpoints_without_metrics=False),
            ]
        ),
        best_fn=rank,
        best_mode="max",
        read_only=read_only,
        create=not read_only,
        lightweight_initialize=read_only,
        cleanup_tmp_directories=not read_only,  # of a save in which the process was killed
        enable_async_checkpointing=not read_only,
        # Made in the background, a folder that cannot be made leaves threads waiting for twenty
        # minutes for a signal that never comes, and the process with them.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
    )


def _remove(folder: Path) -> None:
    """Remove a folder into which threads of a failed save may still be writing."""
    for _ in range(40):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            break
        time.sleep(0.05)


def _weights(state: TrainState) -> dict[str, dict[str, Any]]:
    """The items that hold weights: `model`, and `trained` where the model holds averages."""
    names = ("params", "statistics")
    items: dict[str, dict[str, Any]] = {"model": dict(zip(names, state.to_use, strict=True))}
    if state.average is not None:
        items["trained"] = {name: getattr(state, name) for name in names}
    return items


def _items(state: TrainState) -> dict[str, dict[str, Any]]:
    """All items: those of `_weights`, and `optimizer` where there is a state of it.

    That has its leaves by their position: Optax's classes change between versions.
    """
    items = _weights(state)
    if state.opt_state is not None:
        leaves = jax.tree.leaves(state.opt_state)
        items["optimizer"] = {f"{i:05d}": leaf for i, leaf in enumerate(leaves)}
    return items


def _empty(leaf: Any) -> np.ndarray:
    """A stand-in of the leaf's shape and type without memory; makes Orbax return NumPy."""
    return np.broadcast_to(np.zeros((), leaf.dtype), tuple(leaf.shape))


def _check_like(restored: Mapping[str, Any], abstract: TrainState, directory: Path) -> None:
    items = _items(abstract)
    want = jax.tree_util.tree_leaves_with_path(items)
    have = jax.tree_util.tree_leaves_with_path({name: restored[name] for name in items})
    wrong = [
        f"{jax.tree_util.keystr(path)}: stored {np.shape(b)}, network {a.shape}"
        for (path, a), (_, b) in zip(want, have, strict=True)
        if a.shape != np.shape(b)
    ]
    if wrong:
        raise ValueError(
            "the checkpoint belongs to a different network:\n  "
            + "\n  ".join(wrong)
            + f"\nDelete {directory} to start over, or give another --workdir."
        )


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
