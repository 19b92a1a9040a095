"""COCO numbers of a recorded results file, which only `pytest --data=DIR` has."""

import json

import pytest

from sparseinst_jax.evaluation.coco_metrics import evaluate

pytestmark = pytest.mark.data


def test_recorded_numbers_are_reproduced(data_dir):
    folder = data_dir / "eval_fixture"
    metrics = evaluate(folder / "gt_dataset.json", folder / "dt_dataset.json")
    assert metrics["AP"] == pytest.approx(0.6947194719471946, abs=1e-12)
    assert metrics["AP50"] == pytest.approx(0.6947194719471946, abs=1e-12)
    assert metrics["APm"] == pytest.approx(0.7367986798679867, abs=1e-12)
    assert metrics["AR100"] == pytest.approx(0.75, abs=1e-12)


def test_boxes_and_areas_of_the_detections_do_not_matter(data_dir):
    folder = data_dir / "eval_fixture"
    results = json.loads((folder / "dt_dataset.json").read_text())
    bare = [
        {key: entry[key] for key in ("image_id", "category_id", "score", "segmentation")}
        for entry in results
    ]
    truth = folder / "gt_dataset.json"
    assert evaluate(truth, bare) == evaluate(truth, results)
