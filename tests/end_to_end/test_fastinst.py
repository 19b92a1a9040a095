"""A tiny FastInst through the calls of a user: train, continue, evaluate, predict, convert."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import sparseinst_jax
from sparseinst_jax.checkpoints.store import Checkpoints
from sparseinst_jax.cli import main
from sparseinst_jax.data.shapes import draw_shapes_dataset
from sparseinst_jax.training.progress import read_metrics
from tests import tiny_fastinst

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    return draw_shapes_dataset(folder, num_train=6, num_val=2, seed=3, image_size=(64, 64))


@pytest.fixture(scope="module")
def config(data):
    parts = {
        part: dict(images=str(data / "images" / part), annotations=str(data / f"{part}.json"))
        for part in ("train", "val")
    }
    return tiny_fastinst.get_config(**parts)


def _weights(workdir):
    with Checkpoints(workdir, read_only=True) as checkpoints:
        return checkpoints.restore_model(None)[:2]


def test_it_trains_continues_evaluates_predicts_and_converts(config, data, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert sparseinst_jax.train(config, whole).step == 4
    rows = read_metrics(whole / "metrics.csv")
    terms = {name.removeprefix("loss/") for name in rows[0] if name.startswith("loss/")}
    assert len(terms - {"total"}) == 3 * (2 * config.model.num_layers + 1) + 1
    assert all(np.isfinite(row["loss/total"]) for row in rows)
    # The same from a checkpoint on the way.
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "4")
    assert sparseinst_jax.train(config, parts).step == 4
    assert "continuing after step 2 of 4" in capsys.readouterr().out
    assert [row["loss/total"] for row in read_metrics(parts / "metrics.csv")] == [
        row["loss/total"] for row in rows
    ]
    jax.tree.map(np.testing.assert_array_equal, _weights(whole), _weights(parts))

    metrics = sparseinst_jax.evaluate(whole)
    assert metrics is not None and 0 <= metrics["AP"] <= 1
    photo = next((data / "images/val").glob("*.png"))
    prediction = sparseinst_jax.load(whole)(photo)
    assert prediction.masks.shape[1:] == (64, 64) and len(prediction) <= 6 * 3
    assert main(["summary", "--workdir", str(whole)]) == 0
    assert main(["debug-batch", "--workdir", str(whole), "--step", "1"]) == 0

    # To the original's names and back.
    theirs, back = tmp_path / "theirs.safetensors", tmp_path / "back"
    convert = ["convert", str(whole), "--to", "original", "--output", str(theirs)]
    assert main(convert) == 0, capsys.readouterr().err
    path = tmp_path / "tiny.py"
    path.write_text(
        "from tests import tiny_fastinst\n\n\ndef get_config():\n"
        "    return tiny_fastinst.get_config()\n"
    )
    convert = ["convert", str(theirs), "--config", str(path), "--output", str(back)]
    assert main([*convert, "--classes", str(data / "train.json")]) == 0, capsys.readouterr().err
    jax.tree.map(np.testing.assert_array_equal, _weights(whole), _weights(back))


def test_regions_to_be_ignored_are_refused_by_name(config, tmp_path):
    with pytest.raises(ValueError, match=r'crowd is "ignore", which FastInst does not'):
        sparseinst_jax.train(config, tmp_path / "run", {"data.crowd": "ignore"})
