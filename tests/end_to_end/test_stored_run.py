"""A run of before the modules were moved is loaded, scored and continued, with the same numbers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import sparseinst_jax
from sparseinst_jax import cli
from sparseinst_jax.training.progress import read_metrics

# What the code of then gave. For two images: the score, label and mask pixels of each query.
SCORES = {
    1: (0.649154, 0.074912, 0, 0.916415, 0.825335, 0.825562, 0.228075, 0.234016, 0, 0.118752),
    2: (0.177914, 0.11357, 0.13792, 0.730905, 0.717527, 0.686943, 0.117451, 0.177257, 0, 0.077697),
}
LABELS = {1: (0, 2, 1, 1, 1, 0, 1, 1, 2, 0), 2: (2, 2, 1, 1, 0, 1, 0, 1, 2, 2)}
PIXELS = {
    1: (335, 4, 0, 182, 642, 288, 741, 693, 0, 158),
    2: (32, 16, 1, 137, 333, 112, 282, 359, 0, 51),
}
METRICS = {"AP": 0.4683482634, "AP50": 0.7656765677, "AP75": 0.501210121, "AR100": 0.4922619048}
# Of steps 401 and 402.
RESUMED = {
    "loss/total": (0.626984715, 1.22142529),
    "loss/mask": (0.140356466, 0.25817278),
    "loss/objectness": (0.388735235, 0.589044571),
    "grad_norm": (2.06902218, 5.06679678),
    "learning_rate": (0.0005, 0.0005),
}


@pytest.fixture
def run(stored_run, tmp_path, monkeypatch) -> Path:
    shutil.copytree(stored_run.parent, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")  # its configuration names data relative to this folder
    return Path("run")


def test_a_stored_run_predicts_and_scores_as_it_did(run):
    predictor = sparseinst_jax.load(run)
    assert predictor.class_names == ("striped disc", "dotted square", "plain triangle")
    for number in SCORES:
        found = predictor(f"data/images/train/{number:06}.png")
        np.testing.assert_allclose(found.scores, SCORES[number], rtol=1e-4, atol=1e-6)
        assert tuple(found.labels) == LABELS[number]
        np.testing.assert_allclose(found.masks.sum((1, 2)), PIXELS[number], atol=1)
    assert cli.main(["eval", "--workdir", str(run), "--pictures", "0"]) == 0
    metrics = json.loads((run / "eval" / "metrics.json").read_text())
    assert {name: metrics[name] for name in METRICS} == pytest.approx(METRICS, rel=1e-6)


def test_a_stored_run_goes_on_as_it_did(run):
    steps = ["--config.train.num_steps=402", "--config.train.log_every=1"]
    assert cli.main(["train", "--config", f"{run}/config.json", "--workdir", str(run), *steps]) == 0
    rows = [row for row in read_metrics(run / "metrics.csv") if row["step"] > 400]
    assert [row["step"] for row in rows] == [401, 402]
    for name, values in RESUMED.items():
        assert [row[name] for row in rows] == pytest.approx(values, rel=1e-4), name
