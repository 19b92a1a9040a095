"""`sparseinst export` and the commands that take its file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import sparseinst_jax
from sparseinst_jax import cli
from sparseinst_jax.export import sparseinst as sparseinst_writer
from sparseinst_jax.runner.onnx_file import read_metadata

PHOTOS = "data/images/train"
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def folder(stored_run, tmp_path_factory) -> Path:
    copy = tmp_path_factory.mktemp("export") / "copy"
    shutil.copytree(stored_run.parent, copy)
    return copy


@pytest.fixture(autouse=True)
def _inside(folder, monkeypatch):
    monkeypatch.chdir(folder)  # the configuration names data relative to this folder


@pytest.fixture(scope="module")
def model(folder) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = ["--workdir", "run", "--output", "model.onnx", "--verify", PHOTOS]
        assert cli.main(["export", *words]) == 0
    return folder / "model.onnx"


def test_export_says_what_was_compared_and_the_next_command(capsys):
    assert cli.main(["export", "--workdir", "run", "--output", "drawn.onnx"]) == 0
    out = capsys.readouterr().out
    assert "compared on 2 photos (64x96, 96x64)" in out and "labels equal" in out
    assert "sparseinst predict --checkpoint=drawn.onnx PHOTO.jpg" in out
    stored = read_metadata("drawn.onnx").verification
    assert stored["passed"] and stored["labels_or_kept"] == 0 and stored["mask_probs"] <= 2e-4


def test_a_file_scores_what_the_run_scores(model, capsys):
    found = {}
    for name, words in {
        "run": ["--workdir=run"],
        "ort": [f"--checkpoint={model}"],
        "ov": [f"--checkpoint={model}", "--runtime=openvino"],
    }.items():
        assert cli.main(["eval", *words, "--pictures=0", f"--output={name}"]) == 0
        found[name] = json.loads(Path(name, "metrics.json").read_text())
    for name in ("ort", "ov"):
        values = {key: found[name][key] for key in ("AP", "AP50", "AR100")}
        assert values == pytest.approx({key: found["run"][key] for key in values}, abs=1e-6)
    assert "exported file" in capsys.readouterr().out


def test_a_file_predicts_and_other_classes_can_be_chosen(model):
    words = ["predict", f"--checkpoint={model}", PHOTOS]
    assert cli.main([*words, "--output=all"]) == 0
    merged = '--config.data.class_map=("striped disc=thing", "dotted square=thing")'
    assert cli.main([*words, "--output=merged", merged]) == 0
    every, fewer = (json.loads(Path(n, "predictions.json").read_text()) for n in ("all", "merged"))
    assert len(every) == len(fewer) > 20 and Path("all/000001.png").is_file()
    ids = [{entry["category_id"] for entry in entries} for entries in (every, fewer)]
    assert len(ids[0]) == 3 and len(ids[1]) == 2


def test_python_exports_and_loads(model):
    predictor = sparseinst_jax.load("run")
    assert predictor.export("python.onnx").faults() == []
    photo = f"{PHOTOS}/000001.png"
    ours, theirs = predictor(photo), sparseinst_jax.load("python.onnx", runtime="openvino")(photo)
    np.testing.assert_array_equal(ours.query_index, theirs.query_index)
    np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-5)
    assert (ours.masks != theirs.masks).mean() <= 1e-5
    metrics = sparseinst_jax.evaluate(sparseinst_jax.load("python.onnx"), "data/train.json", PHOTOS)
    assert metrics is not None and metrics["AP"] == pytest.approx(0.4683482634, abs=1e-6)


def test_int8_is_written_with_what_it_costs(capsys):
    words = ["--output=int8.onnx", "--int8", "--calibrate", PHOTOS, "--verify", PHOTOS]
    assert cli.main(["export", "--workdir=run", *words]) == 0
    out = capsys.readouterr().out
    assert "int8.onnx: int8" in out and "(mean IoU 0." in out
    data = read_metadata("int8.onnx")
    assert data.precision == "int8" and data.verification["mean_iou"] > 0.8
    import onnx

    # As the runtime makes it: only what makes the mask features and what sees the coordinates is
    # left in float32.
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = "optimized.onnx"
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession("int8.onnx", options, providers=["CPUExecutionProvider"])
    nodes = onnx.load("optimized.onnx").graph.node
    assert sum(node.op_type == "QLinearConv" for node in nodes) > 10
    left = {node.name for node in nodes if node.op_type in ("Conv", "FusedConv")}
    first = [f"coordinates/decoder/{b}_branch/{b}_convs/0/Conv" for b in ("inst", "mask")]
    assert left == {"decoder/mask_branch/projection/Conv", *first}
    with pytest.raises(ValueError, match="is int8 already"):
        sparseinst_jax.load("int8.onnx", runtime="openvino_bf16")


def test_stablehlo_is_of_three_platforms_and_finds_the_same(capsys):
    from jax import export as jax_export

    words = ["--format=stablehlo", "--output=model.stablehlo", "--size=64x96"]
    assert cli.main(["export", "--workdir=run", *words]) == 0
    assert "labels equal" in capsys.readouterr().out
    exported = jax_export.deserialize(bytearray(Path("model.stablehlo").read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert [str(aval) for aval in exported.in_avals] == ["uint8[batch,64,96,3]", "int32[batch,2]"]
    assert json.loads(Path("model.stablehlo.json").read_text())["fixed_size"] == [64, 96]


def test_a_file_that_finds_something_else_is_not_left_and_the_exit_code_says_so(
    monkeypatch, capsys
):
    monkeypatch.setattr(
        sparseinst_writer, "sigmoid", lambda g, x: g.add("Add", g.add("Sigmoid", x), 0.001)
    )
    assert cli.main(["export", "--workdir=run", "--output=wrong.onnx"]) == 1
    assert "so no file was written" in capsys.readouterr().err
    assert not Path("wrong.onnx").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["export", "--workdir=run", "--output=model.pb"], "--output must be a .onnx file"),
        (
            ["export", "--workdir=run", "--output=a.onnx", "--int8"],
            "--calibrate PHOTOS go together",
        ),
        (["export", "--workdir=run", "--output=a.onnx", "--size=60x96"], "multiples of 32"),
        (["export", "--workdir=run", "--output=a.onnx", "--verify=none"], "do not exist"),
        (["export", "--checkpoint=model.onnx", "--output=a.onnx"], "is exported already"),
        (["predict", "--checkpoint=model.onnx", "--step=3", PHOTOS], "has one state"),
        (["predict", "--workdir=run", "--runtime=openvino", PHOTOS], "is for an exported file"),
        (["eval", "--checkpoint=none.onnx"], "none.onnx does not exist"),
        (
            ["eval", "--checkpoint=model.onnx", "--config.eval.score_threshold=0.1"],
            "leave out --config.eval.score_threshold",
        ),
        (["eval", "--checkpoint=model.onnx", "--config.model.num_masks=3"], "export it again"),
    ],
)
def test_what_cannot_be_is_refused_in_words(model, command, message, capsys):
    assert cli.main(command) == 1
    assert message in capsys.readouterr().err


def test_benchmark_measures_runtimes_beside_the_package(model, capsys):
    words = ["--size=64x96", "--runtime", "onnxruntime", "openvino", "--iterations=1", "--warmup=0"]
    assert cli.main(["benchmark", "--workdir=run", *words, "--output=speed.json"]) == 0
    names = [row["name"] for row in json.loads(Path("speed.json").read_text())["results"]]
    runtimes = ("package", "onnxruntime", "openvino")
    assert names == [f"{part}/{one}" for part in ("network", "with_masks") for one in runtimes]
    assert cli.main(["benchmark", "--checkpoint=model.onnx", *words[:1], *words[4:]]) == 0
    assert "with_masks/onnxruntime model.onnx" in capsys.readouterr().out
