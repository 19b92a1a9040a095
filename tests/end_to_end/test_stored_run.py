"""A run of before the modules were moved is loaded, scored and continued, with the same numbers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import sparseinst_jax
from sparseinst_jax import cli
from sparseinst_jax.checkpoints.store import Checkpoints
from sparseinst_jax.models.sparseinst.weights import NAMES
from sparseinst_jax.setup.config import load_config
from sparseinst_jax.setup.loading import load_weights_file
from sparseinst_jax.training.progress import read_metrics
from sparseinst_jax.weights.convert import ours_to_original

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
        scores, labels, pixels = (np.array(of[number]) for of in (SCORES, LABELS, PIXELS))
        kept = pixels > 0  # masks without a pixel are no part of a prediction
        np.testing.assert_allclose(found.scores, scores[kept], rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(found.labels, labels[kept])
        np.testing.assert_allclose(found.masks.sum((1, 2)), pixels[kept], atol=1)
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


MERGED = "striped disc=round,dotted square=round"
IMAGE = "data/images/train/000001.png"


def test_classes_that_are_merged_at_evaluation_are_merged_in_a_model_that_knows_them_apart(run):
    arguments = ["eval", "--workdir", str(run), "--pictures", "0"]
    assert cli.main(arguments) == 0
    (run / "eval/predictions.json").rename("plain.json")
    merge = f"--config.data.class_map={MERGED}"
    assert cli.main([*arguments, merge]) == 0
    metrics = json.loads((run / "eval/metrics.json").read_text())
    assert metrics["per_class"].keys() == {"round", "plain triangle"}
    assert metrics["per_class"]["round"]["AP"] == pytest.approx(0.538120, rel=1e-5)
    overrides, data = {"data.class_map": MERGED}, ("data/train.json", "data/images/train")
    by_python = sparseinst_jax.evaluate(run, *data, overrides=overrides)
    assert by_python is not None and by_python.as_dict() == metrics
    # As the detections of the classes apart, merged when they are scored.
    assert cli.main([*arguments, merge, "--predictions", "plain.json"]) == 0
    assert json.loads((run / "eval/plain/metrics.json").read_text()) == metrics
    plain = sparseinst_jax.load(run)(IMAGE)
    merged = sparseinst_jax.load(run, overrides={"data.class_map": MERGED})(IMAGE)
    names = {"striped disc": "round", "dotted square": "round"}
    assert merged.class_names == [names.get(name, name) for name in plain.class_names]
    np.testing.assert_array_equal(merged.scores, plain.scores)
    ids = {entry["category_id"] for entry in merged.to_coco(1)}
    assert ids == {plain.category_ids[0], plain.category_ids[2]}


@pytest.mark.parametrize(
    "overrides",
    [{"data.exclude_classes": "dotted square"}, {"data.classes": "striped disc,plain triangle"}],
)
def test_classes_that_are_left_out_are_not_predicted(run, overrides):
    plain = sparseinst_jax.load(run)(IMAGE)
    chosen = sparseinst_jax.load(run, overrides=overrides)(IMAGE)
    kept = plain.labels != 1
    assert 0 < kept.sum() < len(plain)
    np.testing.assert_array_equal(chosen.labels, plain.labels[kept])
    np.testing.assert_array_equal(chosen.scores, plain.scores[kept])
    arguments = [f"--config.{key}={value}" for key, value in overrides.items()]
    assert cli.main(["eval", "--workdir", str(run), "--pictures", "0", *arguments]) == 0
    metrics = json.loads((run / "eval/metrics.json").read_text())
    assert metrics["per_class"].keys() == {"striped disc", "plain triangle"}


def test_a_weights_file_is_of_all_classes_or_of_those_that_are_chosen(run, tmp_path):
    config = load_config(run / "config.json")
    with Checkpoints(run, read_only=True) as checkpoints:
        params, statistics, _ = checkpoints.restore_model(None)
    np.savez(tmp_path / "w.npz", **ours_to_original(params, statistics, NAMES))
    whole, origin = load_weights_file(config, tmp_path / "w.npz")
    assert origin == "data/train.json"
    assert len(set(whole.class_names)) == 3
    config.data.class_map = tuple(MERGED.split(","))
    merged, _ = load_weights_file(config, tmp_path / "w.npz")
    assert merged.class_names == ("round", "round", "plain triangle")
    config.data.exclude_classes = ("plain triangle",)
    assert load_weights_file(config, tmp_path / "w.npz")[0].category_ids[2] is None
