"""The train command on a small drawn data set, in this process."""

import io
import json
import os
import runpy
import shutil
import signal
import sys
import traceback
from pathlib import Path

import jax
import numpy as np
import pytest

from sparseinst_jax.checkpoints.store import Checkpoints
from sparseinst_jax.cli import train as train_command
from sparseinst_jax.data import loader
from sparseinst_jax.data.shapes import draw_shapes_dataset
from sparseinst_jax.models.sparseinst.objective import SparseInstObjective
from sparseinst_jax.training.progress import read_metrics
from sparseinst_jax.training.step import TrainStep
from sparseinst_jax.training.trainer import Trainer
from tests import smallest

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs" / "tiny.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    # Square images: a single padded shape to compile.
    return draw_shapes_dataset(folder, num_train=6, num_val=2, seed=3, image_size=(64, 64))


def arguments(
    data: Path, workdir: Path, config: object = smallest.__file__, **values: object
) -> list[str]:
    parts = [f"--config={config}", f"--workdir={workdir}"]
    for split in ("train", "val"):
        parts.append(f"--config.data.{split}.images={data / 'images' / split}")
        parts.append(f"--config.data.{split}.annotations={data / split}.json")
    return parts + [f"--config.{key.replace('__', '.')}={value}" for key, value in values.items()]


def train(data: Path, workdir: Path, *config: object, **values: object) -> int:
    return train_command.main(arguments(data, workdir, *config, **values))


def weights(workdir: Path, step: int) -> dict:
    with Checkpoints(workdir, read_only=True) as checkpoints:
        params, statistics, _ = checkpoints.restore_model(step)
    return {"params": params, "statistics": statistics}


def assert_identical(a: dict, b: dict) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def losses(workdir: Path) -> dict[int, float]:
    return {int(r["step"]): r["loss/total"] for r in read_metrics(workdir / "metrics.csv")}


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert train(data, workdir) == 0
    return workdir


# Of the real network, small: all of its runs have the same compiled step.
REAL = {
    "config": TINY,
    "train__learning_rate": 0.003,
    "train__milestones": "(100,)",
    "train__weight_decay": 0,
}


@pytest.fixture(scope="module")
def real(data, tmp_path_factory) -> Path:
    """A run of the real network."""
    workdir = tmp_path_factory.mktemp("runs") / "real"
    assert train(data, workdir, **REAL) == 0
    return workdir


def test_a_run_leaves_its_configuration_metrics_curves_and_checkpoints(uninterrupted, data):
    stored = json.loads((uninterrupted / "config.json").read_text())
    assert stored["data"]["train"]["images"] == str(data / "images" / "train")
    assert list(losses(uninterrupted)) == [1, 2, 3, 4]
    header = (uninterrupted / "metrics.csv").read_text().splitlines()[0].split(",")
    assert header[:2] == ["step", "loss/total"]
    assert (uninterrupted / "curves.png").stat().st_size > 1000
    with Checkpoints(uninterrupted, read_only=True) as checkpoints:
        assert checkpoints.steps == (2, 4)
        meta = checkpoints.read_meta()
    assert meta["config"] == stored
    assert len(meta["class_names"]) == len(meta["category_ids"]) == 3


def test_faults_of_paths_come_before_the_configuration(data, tmp_path, capsys):
    missing = {"data__train__annotations": tmp_path / "no.json"}
    with pytest.raises(FileNotFoundError, match=r"no\.json"):
        train(data, tmp_path / "run", **missing)
    assert capsys.readouterr().out == ""


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    data, uninterrupted, tmp_path, capsys
):
    # The schedule is fixed by its milestones, so a shorter num_steps stops the same run earlier.
    compiled = jax.local_devices()[0].client.live_executables
    assert train(data, tmp_path, train__num_steps=3) == 0
    kept = len(compiled())
    assert train(data, tmp_path, train__log_every=2) == 0
    assert len(compiled()) <= kept  # what a run compiled is let go of: a process has room for few
    shown = capsys.readouterr().out.rpartition("configuration smallest, the whole of it in ")[2]
    changed = [line for line in shown.splitlines() if " (smallest: " in line]
    assert shown.startswith(f"{tmp_path / 'config.json'}\n") and len(changed) == 5
    assert "  train.log_every = 2 (smallest: 1)" in changed
    assert shown.endswith(f"Next:\n  sparseinst eval --workdir={tmp_path}\n")
    assert losses(tmp_path) == losses(uninterrupted)
    assert_identical(weights(tmp_path, 4), weights(uninterrupted, 4))


def test_the_real_network_goes_on_from_a_checkpoint_bit_for_bit(data, real, tmp_path, capsys):
    shutil.copytree(real, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    assert train(data, tmp_path / "run", **REAL) == 0
    assert "continuing after step 2 of 4" in capsys.readouterr().out
    assert losses(tmp_path / "run") == losses(real)
    assert_identical(weights(tmp_path / "run", 4), weights(real, 4))


def test_steps_after_the_last_checkpoint_are_done_again_and_counted_once(
    data, uninterrupted, tmp_path, monkeypatch
):
    real, calls = TrainStep.__call__, []

    def crash_in_the_fourth_step(self, state, batch, *stop):
        calls.append(0)
        if len(calls) == 4:
            raise RuntimeError("power cut")
        return real(self, state, batch, *stop)

    monkeypatch.setattr(TrainStep, "__call__", crash_in_the_fourth_step)
    with pytest.raises(RuntimeError, match="power cut"):
        train(data, tmp_path)
    monkeypatch.setattr(TrainStep, "__call__", real)
    assert list(losses(tmp_path)) == [1, 2, 3]  # the checkpoint is of step 2
    assert train(data, tmp_path) == 0
    assert losses(tmp_path) == losses(uninterrupted)
    assert_identical(weights(tmp_path, 4), weights(uninterrupted, 4))


def test_a_signal_finishes_the_step_saves_and_says_where(
    data, uninterrupted, tmp_path, monkeypatch, capsys
):
    real, calls, sent = TrainStep.__call__, [], {1: signal.SIGTERM, 3: signal.SIGINT}

    def signal_in_some_steps(self, state, batch, *stop):
        calls.append(0)
        if len(calls) in sent:
            os.kill(os.getpid(), sent[len(calls)])
        return real(self, state, batch, *stop)

    monkeypatch.setattr(TrainStep, "__call__", signal_in_some_steps)
    for step, code in ((1, 143), (3, 130)):
        assert train(data, tmp_path) == code
        text = capsys.readouterr().out
        said = f"stopped by {sent[step].name} after step {step}"
        assert f"{said}; saved in {tmp_path}/checkpoints/{step}" in text
    assert train(data, tmp_path) == 0
    assert losses(tmp_path) == losses(uninterrupted)
    assert_identical(weights(tmp_path, 4), weights(uninterrupted, 4))


def test_readers_ended_by_the_signal_do_not_keep_the_state_from_being_saved(
    data, tmp_path, monkeypatch, capsys
):
    real = loader.train_batches

    def end_after_three(*args, **kwargs):
        for number, batch in enumerate(real(*args, **kwargs)):
            if number == 3:
                os.kill(os.getpid(), signal.SIGTERM)
                raise RuntimeError("a reading process died")
            yield batch

    monkeypatch.setattr(loader, "train_batches", end_after_three)
    assert train(data, tmp_path, train__log_every=4) == 143
    assert "stopped by SIGTERM after step 3" in capsys.readouterr().out
    assert list(losses(tmp_path)) == [1, 2, 3]
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.latest_step == 3


def test_a_finished_run_says_so_and_trains_nothing(data, uninterrupted, capsys):
    before = (uninterrupted / "metrics.csv").read_bytes()
    assert train(data, uninterrupted) == 0
    assert "is finished: step 4 of 4" in capsys.readouterr().out
    assert (uninterrupted / "metrics.csv").read_bytes() == before


def test_a_changed_configuration_is_refused_with_the_differing_keys(data, uninterrupted):
    with pytest.raises(ValueError) as caught:
        train(data, uninterrupted, train__learning_rate=0.5, train__num_steps=9, seed=7)
    message = str(caught.value)
    assert "seed: 0 in the run, 7 now" in message
    assert "train.learning_rate: 0.0015 in the run, 0.5 now" in message
    assert "train.num_steps: " not in message


def test_other_classes_than_the_runs_are_refused(data, uninterrupted, tmp_path):
    # Another json under the same name, as when the annotations were edited between two starts.
    annotations = data / "train.json"
    original = annotations.read_text()
    content = json.loads(original)
    content["categories"][0]["name"] = "renamed"
    try:
        annotations.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"learned the classes .* now have .*'renamed'"):
            train(data, uninterrupted, train__num_steps=6)
    finally:
        annotations.write_text(original)


def test_a_non_finite_loss_stops_with_step_images_and_last_good_checkpoint(
    data, tmp_path, monkeypatch, capsys
):
    real, calls, batches = TrainStep.__call__, [], []

    def nan_in_the_fourth_step(self, state, batch, *stop):
        state, metrics = real(self, state, batch, *stop)
        calls.append(0)
        batches.append(batch.image_id.tolist())
        if len(calls) == 4:
            metrics["loss/mask"] = metrics["loss/mask"] * np.nan
        return state, metrics

    monkeypatch.setattr(TrainStep, "__call__", nan_in_the_fourth_step)
    assert train(data, tmp_path, train__log_every=4) == 1
    message = capsys.readouterr().err
    assert "loss/mask became nan at step 4, checked for steps 3 to 4" in message
    assert f"Image ids of the batch: {batches[3]}" in message
    assert f"Last good checkpoint: {tmp_path}/checkpoints/2" in message
    assert list(losses(tmp_path)) == [1, 2, 3]  # with the good steps before the bad one


def test_evaluation_writes_ap_and_starts_from_the_weights_of_another_run(
    data, uninterrupted, tmp_path, capsys
):
    # A learning rate of zero: the weights after the step are those that it started from.
    values = {"train__learning_rate": 0, "train__num_steps": 1, "train__eval_every": 1}
    words = [*arguments(data, tmp_path, **values), "--init-from", str(uninterrupted)]
    assert train_command.main(words) == 0
    assert_identical(weights(tmp_path, 1)["params"], weights(uninterrupted, 4)["params"])
    (row,) = read_metrics(tmp_path / "metrics.csv")
    assert 0 <= row["AP"] <= row["AP50"] <= 1
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.read_meta()["metrics"]["AP"] == pytest.approx(row["AP"])
    text = capsys.readouterr().out
    assert "step 1: AP " in text and f"weights of {uninterrupted}, step 4:" in text
    # A run that goes on needs no weights to start from: their folder may be gone.
    words = arguments(data, tmp_path, **{**values, "train__num_steps": 2})
    assert train_command.main([*words, "--init-from", str(uninterrupted)]) == 0
    assert "weights of" not in capsys.readouterr().out


def test_two_images_are_learned_by_heart(data, tmp_path):
    content = json.loads((data / "train.json").read_text())
    objects = [a["image_id"] for a in content["annotations"]]
    kept = [i for i in content["images"] if i["id"] in objects][:2]
    ids = {image["id"] for image in kept}
    content["images"] = kept
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
    (tmp_path / "two.json").write_text(json.dumps(content))
    values = {
        "data__train__annotations": tmp_path / "two.json",
        "train__num_steps": 120,
        "train__log_every": 20,
        "train__checkpoint_every": 0,
    }
    assert train(data, tmp_path / "run", **REAL, **values) == 0
    history = losses(tmp_path / "run")
    first = np.mean([history[step] for step in range(1, 6)])
    last = np.mean([history[step] for step in range(111, 121)])
    assert first > 5 and last < 1.2  # 7.0 and 0.7 to 0.8 were seen


def test_values_that_no_run_can_have_are_listed_together(data, tmp_path):
    with pytest.raises(ValueError) as caught:
        train(data, tmp_path, train__num_steps=0, train__log_every=0, data__generator="x")
    message = str(caught.value)
    for key in ("train.num_steps", "train.log_every", "data.generator"):
        assert key in message
    assert (
        not list((tmp_path / "checkpoints").iterdir())
        if (tmp_path / "checkpoints").exists()
        else True
    )


@pytest.mark.parametrize("content", ["no key", "empty list", "crowd only"])
def test_a_json_with_nothing_to_learn_is_refused_at_the_start(data, tmp_path, content):
    annotations = json.loads((data / "train.json").read_text())
    if content == "no key":
        del annotations["annotations"]
    else:
        kept = annotations["annotations"] if content == "crowd only" else []
        annotations["annotations"] = [{**entry, "iscrowd": 1} for entry in kept]
    (tmp_path / "bare.json").write_text(json.dumps(annotations))
    values = {"data__train__annotations": tmp_path / "bare.json", "data__keep_empty": True}
    with pytest.raises(ValueError) as caught:
        train(data, tmp_path / "run", **values)
    message = str(caught.value)
    assert "bare.json has 6 images and no object, expected at least one" in message
    assert "--config.data.train.annotations" in message


@pytest.mark.parametrize("has_key", [True, False])
def test_validation_data_without_annotations_are_refused_at_the_start(data, tmp_path, has_key):
    content = json.loads((data / "val.json").read_text())
    content["annotations"] = []
    if not has_key:
        del content["annotations"]
    (tmp_path / "bare.json").write_text(json.dumps(content))
    values = {"data__val__annotations": tmp_path / "bare.json", "train__eval_every": 2}
    with pytest.raises(ValueError, match=r"bare\.json has no object .*train.eval_every=0"):
        train(data, tmp_path / "run", **values)


def test_frozen_norms_over_random_weights_are_warned_of(data, real, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Trainer, "run", lambda *_: 0)
    frozen = {"model__backbone__norm": "frozen_batch_norm"}
    assert train(data, tmp_path / "a", TINY, **frozen) == 0
    (warning,) = [x for x in capsys.readouterr().out.splitlines() if "frozen batch norms" in x]
    assert warning.startswith("WARNING: ")
    assert "--init-from" in warning
    assert warning.endswith("--config.model.backbone.norm=group_norm")
    assert train(data, tmp_path / "b", TINY) == 0
    assert train(data, tmp_path / "c", TINY, train__init_from=real) == 0
    assert "frozen batch norms" not in capsys.readouterr().out


def test_the_script_of_one_step_ends_its_live_line_and_passes_few_frames_of_ours_to_the_loss(
    data, tmp_path, monkeypatch
):
    stacks, loss, stream = [], SparseInstObjective.loss, io.StringIO()

    def recorded(*arguments):
        stacks.append([frame.filename for frame in traceback.extract_stack()])
        return loss(*arguments)

    stream.isatty = lambda: True
    monkeypatch.setattr(SparseInstObjective, "loss", recorded)
    monkeypatch.setattr(sys, "stdout", stream)
    words = arguments(data, tmp_path, train__num_steps=1)
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert caught.value.code == 0
    # Nothing else is printed in the line that is written again and again.
    *_, live, finished, _, _ = stream.getvalue().splitlines()  # and the next command
    assert live.startswith("step 1/1") and finished.startswith("finished: step 1")
    (stack,) = stacks
    ours = [
        name
        for name in stack
        if Path(name) == ROOT / "train.py" or Path(name).is_relative_to(ROOT / "sparseinst_jax")
    ]
    # The script, `cli.run`, the command, `train`, the trainer, the step and its second half; from
    # there JAX calls the loss, the eighth.
    assert len(ours) + 1 <= 8, ours


def test_a_missing_config_argument_is_a_usage_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as caught:
        train_command.main()
    assert caught.value.code == 2
    assert "--config NAME is needed" in capsys.readouterr().err
