"""A run that was stored before the modules were moved is loaded, and goes on as it did then."""

import shutil

import numpy as np
import pytest

import sparseinst_jax
from sparseinst_jax import cli
from sparseinst_jax.data.shapes import draw_shapes_dataset
from sparseinst_jax.training.progress import read_metrics

# Of steps 3 and 4, as that version went on.
RECORDED = {
    "loss/total": (8.13654613, 8.94019413),
    "loss/mask": (3.56654167, 3.45756626),
    "grad_norm": (24.4697971, 15.5459471),
    "learning_rate": (0.00150000001, 0.000150000007),
}


def test_a_run_stored_before_the_move_is_loaded_and_goes_on(stored_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw_shapes_dataset("data", num_train=4, num_val=2, seed=3, image_size=(64, 64))
    shutil.copytree(stored_run, "run")
    predictor = sparseinst_jax.load("run")
    assert predictor.class_names[0] == "striped disc"
    assert len(predictor.predict_batch([np.zeros((64, 64, 3), np.uint8)])) == 1
    assert cli.main(["train", "--config", "run/config.json", "--workdir", "run"]) == 0
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert [row["step"] for row in rows] == [3, 4]
    for name, values in RECORDED.items():
        assert [row[name] for row in rows] == pytest.approx(values, rel=1e-4), name
