import contextlib
import re
import resource
import shutil
import threading
import time
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from sparseinst_jax.checkpoints.state import TrainState
from sparseinst_jax.checkpoints.store import Checkpoints, SaveError, locate

META = {"config": {"a": 1}, "class_names": ["x"], "category_ids": [7], "code_version": "0"}


def make_state(step: int, width: int = 3) -> TrainState:
    rng = np.random.default_rng(step)
    params = {"conv": {"kernel": rng.normal(size=(2, width)).astype(np.float32)}, "b": np.ones(1)}
    optimizer = optax.adamw(1e-3, mask={"conv": {"kernel": True}, "b": False})
    opt_state = jax.tree.map(np.asarray, optimizer.init(params))
    opt_state = jax.tree.map(lambda x: x + np.asarray(step, x.dtype), opt_state)
    return TrainState(np.int32(step), params, {"mean": np.full(2, step, np.float32)}, opt_state)


def save(workdir: Path, *steps: tuple[int, float | None]) -> None:
    with Checkpoints(workdir) as checkpoints:
        for step, ap in steps:
            checkpoints.save(make_state(step), META, None if ap is None else {"AP": ap})


def assert_same(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
        assert x.dtype == y.dtype


def test_a_state_comes_back_exactly_with_its_meta(tmp_path):
    save(tmp_path, (4, None))
    with Checkpoints(tmp_path) as checkpoints:
        state, meta = checkpoints.restore_state(make_state(0))
    assert_same(state, make_state(4))
    assert meta == {**META, "step": 4, "metrics": {}}


def test_the_last_two_and_the_best_are_kept(tmp_path):
    save(tmp_path, (1, 0.2), (2, 0.5), (3, 0.1), (4, None), (5, float("nan")))
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps == (2, 4, 5)
        assert checkpoints.latest_step == 5
        assert checkpoints.best_step == 2
        assert checkpoints.read_meta("best")["metrics"] == {"AP": 0.5}


def test_without_evaluation_the_last_is_the_best(tmp_path):
    save(tmp_path, (1, None), (2, None))
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.best_step == 2


def test_the_model_loads_without_the_optimizer_from_each_kind_of_path(tmp_path):
    save(tmp_path, (1, None), (2, None))
    shutil.rmtree(tmp_path / "checkpoints" / "2" / "optimizer")
    for path, step in [("", 2), ("checkpoints", 2), ("checkpoints/1", 1)]:
        with Checkpoints(tmp_path / path, read_only=True) as checkpoints:
            params, statistics, meta = checkpoints.restore_model()
        assert_same(params, make_state(step).params)
        assert_same(statistics, make_state(step).statistics)
        assert meta["step"] == step and meta["class_names"] == ["x"]


def truncate_everything(folder: Path) -> None:
    for file in [p for p in folder.rglob("*") if p.is_file()]:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def truncate_arrays(folder: Path) -> None:
    for file in folder.glob("model/**/d/*"):
        file.write_bytes(file.read_bytes()[:20])


def remove_optimizer(folder: Path) -> None:
    shutil.rmtree(folder / "optimizer")


@pytest.mark.parametrize("damage", [truncate_everything, truncate_arrays, remove_optimizer])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, damage, capsys):
    save(tmp_path, (1, 0.1), (2, 0.2))
    damage(tmp_path / "checkpoints" / "2")
    if damage is not remove_optimizer:
        with Checkpoints(tmp_path, read_only=True) as checkpoints:
            assert_same(checkpoints.restore_model()[0], make_state(1).params)
    with Checkpoints(tmp_path) as checkpoints:
        state, _ = checkpoints.restore_state(make_state(0))
        assert_same(state, make_state(1))
        assert "2 cannot be read" in capsys.readouterr().err
        checkpoints.save(make_state(2), META)  # the step can be saved again
        checkpoints.wait()
        assert checkpoints.steps == (1, 2)
    assert (tmp_path / "checkpoints" / "2.unreadable").is_dir()


def test_nothing_readable_lists_what_is_wrong(tmp_path):
    save(tmp_path, (1, None))
    truncate_arrays(tmp_path / "checkpoints" / "1")
    with (
        Checkpoints(tmp_path, read_only=True) as checkpoints,
        pytest.raises(ValueError, match=r"can be read:\n.*checkpoints/1[\s\S]*another --workdir"),
    ):
        checkpoints.restore_model()


def test_a_checkpoint_of_another_network_is_refused_and_left_alone(tmp_path):
    save(tmp_path, (1, None))
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(
            ValueError, match=r"stored \(2, 3\), network \(2, 4\)[\s\S]*another --workdir"
        ),
    ):
        checkpoints.restore_state(make_state(0, width=4))
    assert (tmp_path / "checkpoints" / "1").is_dir()


def test_missing_checkpoints_and_steps_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        locate(tmp_path)
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(FileNotFoundError, match=r"no checkpoint in .* Train first"),
    ):
        checkpoints.read_meta()
    save(tmp_path, (3, None))
    with (
        Checkpoints(tmp_path, read_only=True) as checkpoints,
        pytest.raises(FileNotFoundError, match=r"of step 9 .* there are \(3,\).* right path"),
    ):
        checkpoints.restore_model(9)


def test_a_saved_state_does_not_see_later_changes(tmp_path):
    state = make_state(1)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, META)
        state.params["conv"]["kernel"][:] = 0
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert_same(checkpoints.restore_model()[0], make_state(1).params)


@contextlib.contextmanager
def small_files(size: int):
    """Files end at so many bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("notice", ["wait", "check", "save", "close"])
def test_a_save_that_fails_says_so_once_and_leaves_the_ones_before(tmp_path, notice):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(make_state(step, 9000), META)
    checkpoints.wait()
    last = re.escape(str(tmp_path / "checkpoints" / "2"))
    with (
        small_files(1 << 13),
        pytest.raises(SaveError, match=rf"checkpoint of step 3 could not .* {last} is complete"),
    ):
        checkpoints.save(make_state(3, 9000), META)
        if notice == "wait":
            checkpoints.wait()
        elif notice == "save":
            checkpoints.save(make_state(4, 9000), META)
        elif notice == "close":
            checkpoints.close()
        while notice == "check":
            checkpoints.check()
            time.sleep(0.01)
    checkpoints.close()
    with Checkpoints(tmp_path, read_only=True) as opened:
        assert opened.steps == (1, 2)
        state, _ = opened.restore_state(make_state(0, 9000))
        assert_same(state, make_state(2, 9000))


def test_what_a_killed_save_left_is_removed_at_the_next_start(tmp_path):
    save(tmp_path, (1, None))
    half = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "1", half)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps == (1,)
    assert half.exists()  # who only reads removes nothing
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == (1,)
        checkpoints.save(make_state(2), META)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"1", "2"}


@pytest.mark.parametrize("what", ["newest", "all", "file in place"])
def test_checkpoints_that_vanish_while_a_run_saves(tmp_path, what):
    folder = tmp_path / "checkpoints"
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(make_state(step), META)
        checkpoints.wait()
        shutil.rmtree(folder / "2" if what == "newest" else folder)
        if what == "file in place":
            folder.write_text("")
            with pytest.raises(SaveError, match=r"step 3 could not be saved.*there is none"):
                checkpoints.save(make_state(3), META)
                checkpoints.wait()
            return
        for step in (3, 4):
            checkpoints.save(make_state(step), META)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps == (3, 4)
        params, _, _ = checkpoints.restore_model()
    assert_same(params, make_state(4).params)


@pytest.mark.parametrize("wanted", [None, "best"])
def test_what_training_replaces_while_it_is_read_is_looked_for_again(
    tmp_path, monkeypatch, capsys, wanted
):
    save(tmp_path, (1, None), (2, None))
    folder, restore, overtaken = tmp_path / "checkpoints", Checkpoints._restore, []

    def restore_late(self, step, targets):
        if not overtaken:  # two saves later
            overtaken.append(step)
            shutil.rmtree(folder / "1")
            shutil.rmtree(folder / "2")
            save(tmp_path / "other", (3, None), (4, None))
            for path in (tmp_path / "other" / "checkpoints").iterdir():
                path.rename(folder / path.name)
        return restore(self, step, targets)

    monkeypatch.setattr(Checkpoints, "_restore", restore_late)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        params, _, meta = checkpoints.restore_model(wanted)
    assert_same(params, make_state(4).params)
    assert meta["step"] == 4 and overtaken
    assert capsys.readouterr().err == ""


def test_a_run_is_read_while_it_saves(tmp_path):
    save(tmp_path, (1, None))
    failed: list[BaseException] = []

    def write():
        try:
            save(tmp_path, *((step, None) for step in range(2, 20)))
        except BaseException as error:
            failed.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    steps = []
    while writer.is_alive():
        with Checkpoints(tmp_path, read_only=True) as checkpoints:
            params, _, meta = checkpoints.restore_model()
        assert_same(params, make_state(meta["step"]).params)
        steps.append(meta["step"])
    assert not failed and steps == sorted(steps) and len(set(steps)) > 2


def test_what_cannot_be_read_is_never_told_to_be_deleted(tmp_path):
    save(tmp_path, (1, None))
    (tmp_path / "checkpoints" / "1" / "meta" / "metadata").write_text("{")
    with pytest.raises(ValueError, match="If another process writes there") as error:
        with Checkpoints(tmp_path, read_only=True) as checkpoints:
            checkpoints.read_meta()
    assert "delete" not in str(error.value)
