"""`eval.py` and `predict.py` from their arguments to the files that they write."""

import collections
import csv
import json
import shlex
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from sparseinst_jax.checkpoints.state import TrainState
from sparseinst_jax.checkpoints.store import Checkpoints
from sparseinst_jax.cli import eval as eval_command
from sparseinst_jax.cli import predict as predict_command
from sparseinst_jax.data.coco import Annotation, ImageRecord, encode_segmentation, load_coco
from sparseinst_jax.data.shapes import draw_shapes_dataset
from sparseinst_jax.evaluation import report
from sparseinst_jax.evaluation.coco_metrics import METRIC_NAMES
from sparseinst_jax.evaluation.errors import ImageErrors
from sparseinst_jax.models.sparseinst.weights import NAMES
from sparseinst_jax.models.trees import functional
from sparseinst_jax.runner import run_lengths
from sparseinst_jax.setup import builders, loading
from sparseinst_jax.setup.config import load_config
from sparseinst_jax.weights.convert import ours_to_original

TINY = Path(__file__).parents[2] / "configs" / "tiny.py"


class Run(NamedTuple):
    """A run folder with one checkpoint of random weights, and its data."""

    workdir: Path
    data: Path
    config: Any
    params: Any
    statistics: Any


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    data = draw_shapes_dataset(folder / "shapes", num_train=1, num_val=3)
    config = load_config(
        TINY,
        {
            f"data.{split}.{key}": str(data / name)
            for split in ("train", "val")
            for key, name in (("annotations", f"{split}.json"), ("images", f"images/{split}"))
        }
        | {"data.generator": ""},
    )
    classes = load_coco(data / "val.json", None)
    model = builders.build_model(config.model, len(classes.class_names), seed=3)
    _, params, statistics = functional(model)
    # Random weights find little: lift the class scores so that there are detections to compare.
    branch = params["decoder"]["inst_branch"]
    branch["cls_score"]["bias"] = branch["cls_score"]["bias"] + np.float32(4)
    meta = {
        "config": config.to_dict(),
        "class_names": list(classes.class_names),
        "category_ids": list(classes.category_ids),
        "code_version": "0",
    }
    with Checkpoints(folder / "work") as checkpoints:
        checkpoints.save(TrainState(np.int32(7), params, statistics, {"count": np.int32(0)}), meta)
    (folder / "work" / "config.json").write_text(json.dumps(config.to_dict()))
    return Run(folder / "work", data, config, params, statistics)


def read(path):
    return json.loads(Path(path).read_text())


@pytest.fixture(scope="module")
def evaluated(run):
    assert eval_command.main(["--workdir", str(run.workdir), "--pictures", "2"]) == 0
    return run.workdir / "eval"


def test_eval_writes_metrics_predictions_and_pictures(run, evaluated):
    metrics = read(evaluated / "metrics.json")
    assert list(metrics) == [*METRIC_NAMES, "per_class"]
    truth = read(run.data / "val.json")
    assert list(metrics["per_class"]) == [entry["name"] for entry in truth["categories"]]
    results = read(evaluated / "predictions.json")
    assert {entry["image_id"] for entry in results} == {e["id"] for e in truth["images"]}
    assert {entry["category_id"] for entry in results} <= {e["id"] for e in truth["categories"]}
    sizes = {e["id"]: [e["height"], e["width"]] for e in truth["images"]}
    assert all(e["segmentation"]["size"] == sizes[e["image_id"]] for e in results)
    assert len(list(evaluated.glob("*.png"))) == 2
    assert not list(evaluated.glob("*.tmp")) and not list(evaluated.glob(".*"))


def test_checkpoint_folder_and_original_weights_give_the_same_detections(run, evaluated, tmp_path):
    expected = read(evaluated / "predictions.json")
    step = str(run.workdir / "checkpoints" / "7")
    arguments = ["--pictures", "0", "--output"]
    assert eval_command.main(["--checkpoint", step, *arguments, str(tmp_path / "a")]) == 0
    assert read(tmp_path / "a" / "predictions.json") == expected
    np.savez(tmp_path / "weights.npz", **ours_to_original(run.params, run.statistics, NAMES))
    overrides = [
        f"--config.data.val.annotations={run.data / 'val.json'}",
        f"--config.data.val.images={run.data / 'images' / 'val'}",
        f"--config.data.train.annotations={run.data / 'train.json'}",
    ]
    weights = ["--config", str(TINY), "--weights", str(tmp_path / "weights.npz"), *overrides]
    assert eval_command.main([*weights, *arguments, str(tmp_path / "b")]) == 0
    assert read(tmp_path / "b" / "predictions.json") == expected


def test_a_results_file_is_scored_without_model_and_images(run, tmp_path, capsys):
    """The truth as results scores 1, in a run without checkpoint and images."""
    truth = read(run.data / "val.json")
    sizes = {entry["id"]: (entry["height"], entry["width"]) for entry in truth["images"]}
    results = []
    for entry in truth["annotations"]:
        mask = encode_segmentation(entry["segmentation"], *sizes[entry["image_id"]])
        counts = mask["counts"]
        mask["counts"] = counts.decode() if isinstance(counts, bytes) else counts
        results.append(
            {"image_id": entry["image_id"], "category_id": entry["category_id"]}
            | {"score": 1.0, "segmentation": mask}
        )
    (tmp_path / "results.json").write_text(json.dumps(results))
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(run.workdir / "config.json", bare)
    arguments = ["--predictions", str(tmp_path / "results.json")]
    no_images = f"--config.data.val.images={tmp_path / 'nowhere'}"
    assert eval_command.main(["--workdir", str(bare), *arguments, no_images]) == 0
    # The folder `eval` itself is for what the run's own model reaches.
    assert [path.name for path in (bare / "eval").iterdir()] == ["results"]
    metrics = read(bare / "eval" / "results" / "metrics.json")
    assert metrics["AP"] == pytest.approx(1.0)
    assert not (bare / "eval" / "results" / "predictions.json").exists()
    assert "  100.0" in capsys.readouterr().out
    annotations = f"--config.data.val.annotations={run.data / 'val.json'}"
    output = ["--output", str(tmp_path / "out")]
    assert eval_command.main(["--config", str(TINY), *arguments, annotations, *output]) == 0
    assert read(tmp_path / "out" / "metrics.json") == metrics
    both = ["--config", str(TINY), "--workdir", str(tmp_path / "both")]
    assert eval_command.main([*both, *arguments, annotations]) == 0
    assert read(tmp_path / "both" / "eval" / "results" / "metrics.json") == metrics


def test_plots_show_tables_curves_and_the_worst_images(run, evaluated, tmp_path, capsys):
    predictions = ["--predictions", str(evaluated / "predictions.json")]
    output = ["--output", str(tmp_path), "--plots", "--pictures", "2", "--score-threshold", "0"]
    stale = tmp_path / "plots" / "worst" / "007_of_an_earlier_run.png"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"")
    assert eval_command.main(["--workdir", str(run.workdir), *predictions, *output]) == 0
    folder = tmp_path / "plots"
    assert sorted(path.name for path in folder.iterdir()) == [
        "confusion_matrix.csv",
        "confusion_matrix.png",
        "errors_per_image.csv",
        "per_class.csv",
        "precision_recall.png",
        "worst",
    ]
    with open(folder / "errors_per_image.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    truth = read(run.data / "val.json")
    assert sum(int(row["objects"]) for row in rows) == len(truth["annotations"])
    numbers = [int(row["errors"]) for row in rows]
    assert numbers == sorted(numbers, reverse=True) and numbers[1] > 0
    names = [f"{rank:03d}_{Path(rows[rank - 1]['file_name']).stem}.png" for rank in (1, 2)]
    assert sorted(path.name for path in (folder / "worst").iterdir()) == names
    assert "objects found" in capsys.readouterr().out
    # Without photos, everything but the pictures.
    nowhere = f"--config.data.val.images={tmp_path / 'nowhere'}"
    output = ["--output", str(tmp_path / "bare"), "--plots"]
    assert eval_command.main(["--workdir", str(run.workdir), *predictions, nowhere, *output]) == 0
    assert "no picture of the worst images: set --config" in capsys.readouterr().out
    assert not (tmp_path / "bare" / "plots" / "worst").exists()


def test_missed_and_false_objects_are_drawn_in_their_colours():
    def square(x):
        return [[x, 0, x + 100, 0, x + 100, 300, x, 300]]

    targets = [Annotation(0, square(0), False, 3e4, 1), Annotation(1, square(200), False, 3e4, 2)]
    record = ImageRecord(5, "a.png", None, 300, 512, targets)
    labels = [0, 1, 1]
    detections = [{"segmentation": square(x), "score": 0.9} for x in (0, 350, 200)]
    errors = ImageErrors(record, tuple(detections), tuple(labels), ((0, 0),), (), (1, 2), (1,))
    white = np.full((300, 512, 3), 255, np.uint8)
    pixels = np.asarray(report.draw_errors(white, errors, ("cat", "dog")))
    bar = pixels.shape[0] - 300 - 2 * (pixels.shape[0] - 300) // 3
    row = pixels[180 + bar]  # below the labels

    def tint(colour):
        return np.rint(0.55 * 255 + 0.45 * np.array(colour))

    green, red, blue = (0, 158, 115), (213, 94, 0), (0, 114, 178)
    for x, colour in ((50, green), (400, red), (250, red), (518 + 50, green), (518 + 250, blue)):
        np.testing.assert_allclose(row[x], tint(colour), atol=1)
    assert (row[150] == 255).all() and (row[518 + 400] == 255).all()


def test_a_list_without_annotations_is_predicted_and_not_scored(run, evaluated, tmp_path, capsys):
    truth = read(run.data / "val.json")
    del truth["annotations"]
    (tmp_path / "list.json").write_text(json.dumps(truth))
    override = f"--config.data.val.annotations={tmp_path / 'list.json'}"
    output = ["--output", str(tmp_path / "out"), "--pictures", "1"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.json").write_text("{}")  # of an earlier evaluation
    assert eval_command.main(["--workdir", str(run.workdir), override, *output]) == 0
    expected = read(evaluated / "predictions.json")
    assert read(tmp_path / "out" / "predictions.json") == expected
    assert not (tmp_path / "out" / "metrics.json").exists()
    out = capsys.readouterr().out
    assert "not scored" in out
    *_, head, command = out.splitlines()
    assert head == "Next:" and command.startswith("  sparseinst predict --workdir=")
    assert predict_command.main([*shlex.split(command)[2:], "--output", str(tmp_path / "p")]) == 0


def test_predict_finds_what_eval_finds_and_goes_on_after_a_broken_image(
    run, evaluated, tmp_path, capsys
):
    photos = tmp_path / "photos"
    (photos / "below").mkdir(parents=True)
    records = read(run.data / "val.json")["images"]
    for number, record in enumerate(records):
        target = photos / "below" / f"{number}.png" if number else photos / f"{number}.png"
        shutil.copy(run.data / "images" / "val" / record["file_name"], target)
    (photos / "broken.jpg").write_text("no image")
    (photos / "notes.txt").write_text("not an image")
    output = photos / "out"
    arguments = ["--workdir", str(run.workdir), str(photos), "--output", str(output)]
    assert predict_command.main(arguments) == 1
    out, err = capsys.readouterr()
    failed = [line for line in err.splitlines() if "failed" in line]
    assert len(failed) == 1
    assert failed[0].startswith(f"failed: image {photos / 'broken.jpg'} cannot be read")
    assert failed[0].endswith("or leave it out")
    assert sorted(path.name for path in output.glob("*.png")) == ["0.png", "1.png", "2.png"]
    ids = {str(n): record["id"] for n, record in enumerate(records)}
    found = read(output / "predictions.json")
    for entry in found:
        entry["image_id"] = ids[Path(entry.pop("file_name")).stem]

    def key(entry):
        return entry["image_id"], entry["score"], entry["segmentation"]["counts"]

    # The evaluation's file has the empty masks too, as the original's.
    expected = [
        e for e in read(evaluated / "predictions.json") if run_lengths.areas_of([rle(e)])[0]
    ]
    assert sorted(found, key=key) == sorted(expected, key=key)
    assert f"{len(found)} objects of any score: {output / 'predictions.json'}" in out
    shown = sum(entry["score"] >= 0.4 for entry in found)
    assert f"{shown or 'no'} object{'s' * (shown != 1)} above 0.4 in 3 images: {output}" in out
    # Once more: the pictures of the first time are not predicted.
    (photos / "broken.jpg").unlink()
    assert predict_command.main(arguments) == 0
    assert len(list(output.glob("*.png"))) == 3


def rle(entry):
    return entry["segmentation"]


def test_predict_takes_patterns_and_says_where_nothing_was_found(run, tmp_path, capsys):
    names = sorted(path.name for path in (run.data / "images" / "val").glob("*.png"))
    pattern = str(run.data / "images" / "**" / "*.png")
    arguments = ["--workdir", str(run.workdir), pattern, "--output", str(tmp_path)]
    assert predict_command.main([*arguments, "--score-threshold", "1"]) == 0
    out = capsys.readouterr().out
    assert {path.name for path in tmp_path.glob("*.png")} >= set(names)
    assert "no object above 1 in 4: " in out and "(best 0." in out
    assert shlex.split(out.splitlines()[-1])[2:] == [
        f"--workdir={run.workdir}",
        pattern,
        f"--output={tmp_path}",
        "--score-threshold=0.5",
    ]
    literal = tmp_path / "a[1].png"
    shutil.copy(run.data / "images" / "val" / names[0], literal)
    assert predict_command.list_images([literal], tmp_path / "out") == ([literal], [])


def test_pictures_do_not_depend_on_how_many_are_predicted_together(run, tmp_path):
    photos, texts = str(run.data / "images" / "val"), []
    for size in ("1", "2"):
        arguments = ["--workdir", str(run.workdir), photos, f"--config.eval.batch_size={size}"]
        assert predict_command.main([*arguments, "--output", str(tmp_path / size)]) == 0
        texts.append([rle(entry) for entry in read(tmp_path / size / "predictions.json")])
    assert texts[0] == texts[1]


def test_score_threshold_is_for_showing_only(run, tmp_path):
    record = read(run.data / "val.json")["images"][0]
    photo = run.data / "images" / "val" / record["file_name"]
    texts, pictures = [], []
    for threshold in ("0", "1"):
        output = tmp_path / threshold
        arguments = ["--workdir", str(run.workdir), str(photo), "--output", str(output)]
        assert predict_command.main([*arguments, "--score-threshold", threshold]) == 0
        texts.append((output / "predictions.json").read_text())
        pictures.append(np.asarray(Image.open(output / f"{photo.stem}.png")))
    assert texts[0] == texts[1]
    assert (pictures[0] != pictures[1]).any()


def test_paddledetections_protocol_loses_one_detection_of_each_image(run, evaluated, tmp_path):
    arguments = ["--workdir", str(run.workdir), "--pictures", "0", "--output", str(tmp_path)]
    assert eval_command.main([*arguments, "--config.eval.protocol=paddledetection"]) == 0
    expected, found = (
        collections.Counter(entry["image_id"] for entry in read(folder / "predictions.json"))
        for folder in (evaluated, tmp_path)
    )
    assert found == {image_id: number - 1 for image_id, number in expected.items()}
    with pytest.raises(ValueError, match=r"eval\.protocol must be one of .*, got 'paddle'"):
        eval_command.main([*arguments, "--config.eval.protocol=paddle"])


def test_load_reads_a_run_with_its_classes_and_takes_overrides(run, evaluated):
    found = loading.load_checkpoint(run.workdir, overrides={"data.eval_size": "(96, 128)"})
    assert found.eval_size == (96, 128)
    assert found.class_names == tuple(read(evaluated / "metrics.json")["per_class"])
    assert loading.load_checkpoint(run.workdir / "checkpoints" / "7").eval_size == (64, 96)
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 5"):
        loading.load_checkpoint(run.workdir, step=5)


def test_faults_of_the_command_line_are_all_named(run):
    with pytest.raises(ValueError, match=r"--weights needs --config[\s\S]*--step"):
        eval_command.main(["--weights", "a.npz", "--step", "best", "--workdir", "x"])
    with pytest.raises(ValueError, match="no model"):
        eval_command.main([])
    for command in (eval_command.main, lambda given: predict_command.main([*given, "a.png"])):
        for option in ("--workdir", "--checkpoint"):
            with pytest.raises(ValueError, match=r"its own configuration.*--config\.KEY=VALUE"):
                command(["--config", str(TINY), option, str(run.workdir)])
    with pytest.raises(ValueError, match=r"data\.val\.annotations"):
        eval_command.main(["--workdir", str(run.workdir), "--config.data.val.nonsense=1"])
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        eval_command.main(["--workdir", str(run.data)])


def test_predictions_are_kept_whatever_happens_while_they_are_scored(
    run, evaluated, tmp_path, monkeypatch
):
    def fail(*_):
        raise ValueError("no score")

    monkeypatch.setattr(eval_command, "score", fail)
    with pytest.raises(ValueError, match="no score"):
        eval_command.main(["--workdir", str(run.workdir), "--output", str(tmp_path)])
    assert read(tmp_path / "predictions.json") == read(evaluated / "predictions.json")
