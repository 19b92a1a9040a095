"""What a notebook calls: the same runs and numbers as the commands, as plain calls."""

import json
import os
import shutil

import numpy as np
import pytest

import sparseinst_jax
from sparseinst_jax import cli
from sparseinst_jax.data.shapes import draw_shapes_dataset
from sparseinst_jax.setup.config import load_config
from tests import smallest


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps with an evaluation, started beside its data and used from elsewhere."""
    folder = tmp_path_factory.mktemp("python")
    data = draw_shapes_dataset(folder / "data", 4, 2, seed=3, image_size=(64, 64))
    overrides = {
        f"data.{split}.{key}": f"data/{place}"
        for split in ("train", "val")
        for key, place in (("annotations", f"{split}.json"), ("images", f"images/{split}"))
    }
    overrides |= {"train.num_steps": 2, "train.eval_every": 2, "data.generator": ""}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return sparseinst_jax.train(smallest.__file__, folder / "run", overrides), data, overrides


def test_training_from_python_is_the_commands_run_and_goes_on(trained, capsys):
    result, _, overrides = trained
    assert (result.step, result.exit_code) == (2, 0)
    assert [row["step"] for row in result.rows] == [1, 2] and "AP" in result.rows[1]
    assert (result.workdir / "curves.png").is_file()
    # Values that are given are meant as they are, as on a command line.
    stored = load_config(result.workdir / "config.json")
    assert (stored.train.num_steps, stored.data.generator) == (2, "")
    again = sparseinst_jax.train(load_config(smallest.__file__, overrides), result.workdir)
    assert (again.step, again.exit_code) == (2, 0)
    assert "is finished: step 2 of 2" in capsys.readouterr().out


def test_a_run_is_scored_on_its_own_data_and_a_predictor_on_those_that_are_named(trained):
    result, data, _ = trained
    metrics = sparseinst_jax.evaluate(result.workdir)
    assert metrics["AP"] == pytest.approx(result.rows[1]["AP"], abs=1e-9)
    predictor = sparseinst_jax.load(result.workdir)
    named = sparseinst_jax.evaluate(predictor, data / "val.json", data / "images" / "val")
    assert named.as_dict() == metrics.as_dict()


COMMANDS = {
    "eval": ["eval", "--pictures=0"],
    "score a file": ["eval", "--pictures=0", "--predictions={run}/eval/predictions.json"],
    "debug-batch": ["debug-batch", "--step=1"],
    "train": ["train", "--config.train.num_steps=3", "--config.train.eval_every=0"],
    "summary": ["summary", "--json"],
}


def test_commands_find_a_runs_data_from_another_folder(trained, tmp_path, monkeypatch, capsys):
    result, data, _ = trained
    run = shutil.copytree(result.workdir, tmp_path / "run")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name, command in COMMANDS.items():
        arguments = [word.format(run=run) for word in command]
        assert cli.main([*arguments, "--workdir=~/run"]) == 0, name
        out = capsys.readouterr().out
        assert name != "train" or "continuing after step 2 of 3" in out
    assert json.loads(out)["num_classes"] == 3
    stored = json.loads((run / "config.json").read_text())
    assert stored["data"]["val"]["annotations"] == str(data / "val.json")
    assert stored["data"]["root"] == str(tmp_path)
    assert not (tmp_path / "~").exists()


def test_a_moved_run_takes_the_data_that_are_there_and_says_where_they_were(
    trained, tmp_path, monkeypatch
):
    result, data, _ = trained
    monkeypatch.chdir(tmp_path)
    stored = json.loads((result.workdir / "config.json").read_text())
    assert stored["data"]["root"] == str(data.parent)
    assert stored["data"]["val"]["annotations"] == "data/val.json"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "val.json").write_text("{}")
    stored["data"]["root"] = str(tmp_path / "gone")
    config = load_config(stored)
    assert config.data.val.annotations == "data/val.json"  # beside the command
    assert config.data.train.annotations == str(tmp_path / "gone" / "data" / "train.json")
    other = load_config(stored, {"data.root": str(data.parent), "data.val.images": "~/images"})
    assert other.data.val.annotations == str(data / "val.json")
    assert other.data.val.images == os.path.expanduser("~/images")


def test_a_run_that_is_none_cannot_be_continued_without_a_configuration(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", f"--workdir={tmp_path}"])
    assert f"{tmp_path}/config.json does not exist" in capsys.readouterr().err


def test_a_weights_file_is_loaded_with_the_configuration_that_is_named(stored_run, tmp_path):
    predictor = sparseinst_jax.load(stored_run)
    file, data = tmp_path / "weights.safetensors", stored_run.parent / "data"
    assert cli.main(["convert", str(stored_run), "--to=original", f"--output={file}"]) == 0
    overrides = {"model.backbone.width": 2, "data.val.annotations": str(data / "train.json")}
    overrides |= {f"model.{part}_channels": 8 for part in ("encoder", "decoder")}
    same = sparseinst_jax.load(file, config="tiny", overrides=overrides)
    image = data / "images" / "train" / "000001.png"
    np.testing.assert_array_equal(same(image).scores, predictor(image).scores)
    assert same.class_names == predictor.class_names
    with pytest.raises(ValueError, match=r"is a weights file.*load\(.*config=\"giam_r50\"\)"):
        sparseinst_jax.load(file)
    with pytest.raises(ValueError, match="a run has its own configuration"):
        sparseinst_jax.load(stored_run, config="tiny")
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        sparseinst_jax.load(tmp_path / "nothing.pth")


def test_what_cannot_be_called_is_refused_with_what_is_expected(trained):
    result, data, _ = trained
    with pytest.raises(ValueError, match="expected a workdir"):
        sparseinst_jax.train(load_config("tiny"))
    predictor = sparseinst_jax.load(result.workdir)
    for given in ((predictor,), (predictor, data / "val.json"), (result.workdir, data / "v.json")):
        with pytest.raises(ValueError, match="expected annotations and images"):
            sparseinst_jax.evaluate(*given)
