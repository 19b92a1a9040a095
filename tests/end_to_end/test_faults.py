"""Faults while the train command runs, on a small drawn data set; kills are of real processes."""

import csv
import itertools
import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from sparseinst_jax.checkpoints.folders import whole_steps
from sparseinst_jax.checkpoints.store import SaveError
from sparseinst_jax.cli import debug_batch
from sparseinst_jax.cli import train as train_command
from sparseinst_jax.data.shapes import draw_shapes_dataset
from sparseinst_jax.training.progress import read_metrics
from tests import smallest
from tests.end_to_end import kill_at_random
from tests.unit.test_checkpoints import small_files

ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])  # the suite's: see `process.set_environment`
# The milestones are numbers in the compiled step: with those of the configuration it is that of the
# other runs.
SHORT = (
    "--config.train.num_steps=12",
    "--config.train.milestones=(3,)",
    "--config.train.eval_every=6",
    "--config.data.num_workers=0",
)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    return draw_shapes_dataset(folder, num_train=8, num_val=2, seed=3, image_size=(64, 64))


@pytest.fixture
def data(drawn, tmp_path) -> Path:
    return shutil.copytree(drawn, tmp_path / "shapes")


def train(data: Path, workdir: Path, *words: str) -> int:
    return train_command.main(arguments(data, workdir, *words))


def arguments(data: Path, workdir: Path, *words: str) -> list[str]:
    values = [f"--config={smallest.__file__}", f"--workdir={workdir}"]
    for split in ("train", "val"):
        values.append(f"--config.data.{split}.images={data / 'images' / split}")
        values.append(f"--config.data.{split}.annotations={data / split}.json")
    return [*values, *words]


def command(data: Path, workdir: Path) -> list[str]:
    return kill_at_random.command(data, workdir, *SHORT, config=smallest.__file__)


@pytest.fixture(scope="module")
def whole(drawn, tmp_path_factory) -> Path:
    """A run left alone."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    assert train_command.main(command(drawn, workdir)[2:]) == 0
    return workdir


def test_a_run_killed_in_a_save_and_in_an_evaluation_equals_one_left_alone(drawn, whole, tmp_path):
    killed, log = tmp_path / "killed", tmp_path / "log"
    words = command(drawn, killed)

    def is_saving() -> bool:
        return bool(list((killed / "checkpoints").glob("*tmp*")))

    process = kill_at_random.start(words, log, CACHE)
    assert kill_at_random.kill_at(process, is_saving)
    process = kill_at_random.start(words, log, CACHE)
    assert kill_at_random.kill_at(process, lambda: "evaluating step" in log.read_text())
    saved = whole_steps(killed / "checkpoints")
    assert kill_at_random.start(words, log, CACHE).wait() == 0, log.read_text()
    if saved:  # no more than what was done since the last save is repeated
        assert f"continuing after step {saved[-1]} of 12" in log.read_text()
    rows = kill_at_random.rows(killed)
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 13)]
    assert rows == kill_at_random.rows(whole)


def test_an_image_that_breaks_is_skipped_listed_and_the_run_can_be_told_so_later(
    data, tmp_path, capsys
):
    broken = sorted((data / "images" / "train").iterdir())[0]
    unreadable = sorted((data / "images" / "val").iterdir())[0]
    good = broken.read_bytes()
    broken.write_bytes(good[: len(good) // 2])
    words = ["--config.train.num_steps=6"]
    with pytest.raises(ValueError, match=f"{broken.name} cannot be read"):
        train(data, tmp_path / "run", *words)
    words.append("--config.data.on_error=skip")
    assert train(data, tmp_path / "run", *words) == 0
    assert train(data, tmp_path / "whole", *words) == 0
    assert kill_at_random.rows(tmp_path / "run") == kill_at_random.rows(tmp_path / "whole")
    with (tmp_path / "whole" / "skipped.csv").open() as file:
        listed = list(csv.DictReader(file))
    assert {row["file"] for row in listed} == {str(broken)}
    assert "WARNING: 1 images could not be used" in capsys.readouterr().out
    step = int(listed[0]["step"])
    workdir = str(tmp_path / "run")
    assert debug_batch.main(["--workdir", workdir, "--step", str(step - 1)]) == 0
    assert "left out, as in training" in capsys.readouterr().out
    # One of two images of the validation data is more than a twentieth.
    unreadable.write_bytes(b"")
    with pytest.raises(ValueError, match="1 of 2 images of the validation data cannot be used"):
        train(data, tmp_path / "val", *words, "--config.train.eval_every=4")
    assert "stopped by an error in the evaluation after step 4; saved" in capsys.readouterr().out
    assert whole_steps(tmp_path / "val" / "checkpoints") == [2, 4]


def test_other_data_than_before_are_told_and_refused_unless_wanted(data, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(data, run, "--config.train.num_steps=2") == 0
    content = json.loads((data / "train.json").read_text())
    content["annotations"].pop()
    (data / "train.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"(?s)had other data.*sha256 .* then.*on_change=continue"):
        train(data, run, "--config.train.num_steps=3")
    words = ["--config.train.num_steps=3", "--config.data.on_change=continue"]
    assert train(data, run, *words) == 0
    assert "WARNING: the run continues with other data than before" in capsys.readouterr().out
    assert train(data, run, "--config.train.num_steps=4") == 0  # it is the run's by now
    assert [row["step"] for row in read_metrics(run / "metrics.csv")] == [1, 2, 3, 4]


def test_a_run_of_an_earlier_version_goes_on_and_its_batches_can_be_drawn(data, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(data, run, "--config.train.num_steps=2") == 0
    path = run / "checkpoints" / "2" / "meta" / "metadata"
    for file in (run / "config.json", path):
        stored = json.loads(file.read_text())
        config = stored.get("config", stored)
        del config["data"]["crowd"], config["train"]["ema_decay"], config["eval"]["protocol"]
        stored.pop("data", None) if config is not stored else None
        file.write_text(json.dumps(stored))
    assert debug_batch.main(["--workdir", str(run), "--step", "0"]) == 0
    assert "keys that it did not know" in capsys.readouterr().out
    assert train(data, run) == 0
    said = [x for x in capsys.readouterr().out.splitlines() if "stored by an earlier version" in x]
    assert len(said) == 1 and "data.crowd = 'drop', train.ema_decay = 0.0" in said[0]
    assert json.loads((run / "config.json").read_text())["data"]["crowd"] == "drop"


def test_a_disk_without_room_ends_the_run_with_one_message(data, tmp_path, capfd):
    run = tmp_path / "run"
    assert train(data, run, "--config.train.num_steps=2") == 0
    capfd.readouterr()
    with (
        small_files(1 << 14),
        pytest.raises(SaveError, match=r"step 4 could not be saved.*too large\..*/2 is complete"),
    ):
        train(data, run)
    said = capfd.readouterr().err
    assert "Traceback" not in said and "orbax" not in said
    # In a process of its own, as it is with users: in this one threads of the failed save live on.
    words = [sys.executable, str(ROOT / "train.py"), *arguments(data, run)]
    assert kill_at_random.start(words, tmp_path / "log", CACHE).wait() == 0
    assert [row["step"] for row in read_metrics(run / "metrics.csv")] == [1, 2, 3, 4]


def test_a_clock_that_jumps_back_changes_nothing_and_nothing_is_written_beside_the_data(
    data, whole, tmp_path, monkeypatch
):
    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in data.rglob("*")}

    before, now, hours, back = files(), time.time(), itertools.count(), tmp_path / "back"
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: now - 3600.0 * next(hours))
        assert train_command.main(command(data, back)[2:]) == 0
    assert next(hours) > 0  # somebody asked for the time
    assert kill_at_random.rows(back) == kill_at_random.rows(whole)
    assert whole_steps(back / "checkpoints") == whole_steps(whole / "checkpoints") != []
    assert files() == before
