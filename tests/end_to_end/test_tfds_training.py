"""A TFDS data set in place of a folder, through every command: the same results."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparseinst_jax import cli
from sparseinst_jax.training.progress import read_metrics
from tests.end_to_end.test_training import (
    arguments,
    assert_identical,
    data,
    losses,
    train,
    weights,
)

__all__ = ["data"]  # a fixture
NAMES = {
    "data__train__tfds": "coco_instances/train",
    "data__val__tfds": "coco_instances/val",
    "data__train__images": "",
    "data__train__annotations": "",
    "data__val__images": "",
    "data__val__annotations": "",
}


@pytest.fixture(scope="module")
def built(data, tmp_path_factory):
    """Built by the command; and what that printed."""
    root = tmp_path_factory.mktemp("tfds")
    assert cli.main(_build(data, root)) == 0
    return root


def _build(data: Path, root: Path) -> list[str]:
    names = [str(data / f"{split}.json") for split in ("train", "val")]
    folders = [str(data / "images" / split) for split in ("train", "val")]
    command = ["build-tfds", names[0], "--images", folders[0], "--val-json", names[1]]
    return [*command, "--val-images", folders[1], "--output", str(root)]


@pytest.fixture(scope="module")
def runs(data, built, tmp_path_factory):
    """A run on the folder and one on the shards."""
    root = tmp_path_factory.mktemp("runs")
    assert train(data, root / "folder", train__eval_every=2) == 0
    assert train(data, root / "shards", train__eval_every=2, **NAMES, data__tfds_dir=built) == 0
    return root / "folder", root / "shards"


def test_training_and_its_evaluation_equal_those_on_the_folder_bit_for_bit(runs):
    folder, shards = runs
    assert losses(shards) == losses(folder)
    assert_identical(weights(shards, 4), weights(folder, 4))
    rows = [read_metrics(run / "metrics.csv") for run in (folder, shards)]
    compared = [name for name in rows[0][-1] if name.startswith(("loss/", "AP", "grad"))]
    assert {"loss/total", "AP", "AP50", "grad_norm"} <= set(compared)
    for first, second in zip(*rows, strict=True):
        assert [first.get(name) for name in compared] == [second.get(name) for name in compared]


def test_eval_scores_and_draws_the_same(runs, tmp_path, capsys):
    for run in runs:
        argv = ["eval", f"--workdir={run}", f"--output={tmp_path / run.name}", "--plots"]
        assert cli.main([*argv, "--score-threshold=0"]) == 0
    assert "on coco_instances/val in " in capsys.readouterr().out
    files = sorted(p.relative_to(tmp_path / "folder") for p in (tmp_path / "folder").rglob("*.*"))
    assert len(files) > 5
    for file in files:
        assert (tmp_path / "shards" / file).read_bytes() == (
            tmp_path / "folder" / file
        ).read_bytes(), file
    predictions = tmp_path / "folder" / "predictions.json"
    argv = ["eval", f"--workdir={runs[1]}", f"--output={tmp_path / 'again'}"]
    assert cli.main([*argv, f"--predictions={predictions}"]) == 0
    again = json.loads((tmp_path / "again/metrics.json").read_text())
    assert again == json.loads((tmp_path / "folder/metrics.json").read_text())


def test_debug_batch_draws_the_same_picture(runs, tmp_path):
    for run in runs:
        argv = ["debug-batch", f"--workdir={run}", "--step=7", f"--output={tmp_path / run.name}"]
        assert cli.main(argv) == 0
    first, second = (
        np.asarray(Image.open(tmp_path / run.name / "step_000007.png")) for run in runs
    )
    np.testing.assert_array_equal(first, second)


def test_check_data_tells_the_same(data, built, tmp_path, capsys):
    told = []
    for name, options in (("folder", {}), ("shards", {**NAMES, "data__tfds_dir": built})):
        argv = [p for p in arguments(data, tmp_path, **options) if "--workdir" not in p]
        assert cli.main(["check-data", *argv, f"--output={tmp_path / name}"]) == 0
        told.append(capsys.readouterr().out.replace(str(tmp_path / name), "OUTPUT").splitlines())
    assert "coco_instances/train in" in told[1][0]
    assert [line for line in told[1] if "coco_instances" not in line] == [
        line for line in told[0] if str(data) not in line
    ]


def test_predict_with_a_run_on_shards_masks_the_same(runs, data, tmp_path):
    image = str(next((data / "images/val").iterdir()))
    for run in runs:
        argv = ["predict", f"--workdir={run}", image, f"--output={tmp_path / run.name}"]
        assert cli.main([*argv, "--score-threshold=0"]) == 0
    names = sorted(path.name for path in (tmp_path / "folder").iterdir())
    assert names
    for name in names:
        if not name.endswith(".json"):  # which hold paths
            a, b = ((tmp_path / run.name / name).read_bytes() for run in runs)
            assert a == b


def test_the_command_says_how_to_train_and_refuses_what_is_there(data, built, tmp_path, capsys):
    assert cli.main(_build(data, tmp_path)) == 0
    printed = capsys.readouterr()
    assert f"{tmp_path}/coco_instances/1.0.0: 2 shards" in printed.out
    assert "--config.data.train.tfds=coco_instances/train" in printed.out
    assert "written 8/8 images" in printed.err
    assert cli.main(_build(data, tmp_path)) == 1
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data__train__tfds": "coco/2017"}, "only coco_instances has masks"),
        ({"data__train__tfds": "coco_instances/test"}, "has no split 'test'; it has train, val"),
        ({"data__train__tfds": "coco_instances:3.1.4/train"}, "is of version 3.1.4"),
        ({"data__tfds_dir": "nowhere"}, "sparseinst build-tfds"),
    ],
)
def test_a_wrong_name_ends_in_one_message(data, built, tmp_path, capsys, options, message):
    values = {**NAMES, "data__tfds_dir": built, **options}
    assert cli.main(["train", *arguments(data, tmp_path / "run", **values)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "run").exists()
