"""A family from outside the package works, and the package knows nothing of SparseInst's inside."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import sparseinst_jax
from sparseinst_jax.checkpoints.store import Checkpoints
from sparseinst_jax.data.coco import load_coco
from sparseinst_jax.data.shapes import draw_shapes_dataset
from sparseinst_jax.models.families import FAMILIES
from sparseinst_jax.models.trees import functional
from sparseinst_jax.setup import builders
from sparseinst_jax.setup.loading import build_predictor
from sparseinst_jax.training.progress import read_metrics
from tests import outside_family

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(autouse=True)
def dots(monkeypatch):
    monkeypatch.setitem(FAMILIES, "dots", outside_family.DOTS)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    return draw_shapes_dataset(folder, num_train=6, num_val=2, seed=3, image_size=(64, 64))


def _config(data):
    return outside_family.get_config(
        **{
            part: dict(images=str(data / "images" / part), annotations=str(data / f"{part}.json"))
            for part in ("train", "val")
        }
    )


def _weights(workdir):
    with Checkpoints(workdir, read_only=True) as checkpoints:
        return checkpoints.restore_model(None)[:2]


def test_a_family_from_outside_trains_resumes_evaluates_and_predicts(data, tmp_path, capsys):
    config = _config(data)
    config.train.eval_every = 4
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert sparseinst_jax.train(config, whole).step == 4
    rows = read_metrics(whole / "metrics.csv")
    terms = {name for name in rows[0] if name.startswith("loss/")}
    assert terms == {"loss/total", "loss/proposal", "loss/mask", "loss/guided"}
    assert all(np.isfinite(row["loss/total"]) for row in rows) and len(rows) == 4
    assert 0 <= rows[-1]["AP"] <= 1
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
    assert metrics is not None and metrics["AP"] == pytest.approx(rows[-1]["AP"], abs=1e-6)
    predictor = sparseinst_jax.load(whole)
    dataset = load_coco(data / "val.json", data / "images/val")
    prediction = predictor(dataset.records[0].path)
    assert len(prediction) == 8 and prediction.masks.shape == (8, 64, 64)
    (found,) = predictor.predict_batch([prediction.image])
    np.testing.assert_array_equal(found.masks, prediction.masks)
    np.testing.assert_array_equal(found.scores, prediction.scores)
    assert found.query_index.max() < 6 and len(set(found.query_index)) < 8  # some come twice


def test_scores_are_finished_at_the_original_size(data):
    """By hand: the logits enlarged, cut and resized, then probabilities, then their mean inside."""
    config = _config(data)
    model = builders.build_model(config.model, 3, seed=0)
    apply, params, statistics = functional(model)
    predictor = build_predictor(config, apply, params, statistics, ["a", "b", "c"], [1, 2, 3])
    image = np.random.default_rng(0).integers(0, 256, (45, 70, 3), np.uint8)
    item = predictor.prepare(image)
    (pending,) = predictor.start([item])
    selection = jax.device_get(pending.selection)
    (found,) = predictor.predict_batch([image])
    assert selection.masks.shape[2:] == (64 // 8, 96 // 8)
    assert (predictor.mask_threshold, item.mask_size) == (0.5, (62, 96))
    for row, query in enumerate(selection.query_index[0]):
        logits = selection.masks[0, query].astype(np.float64)
        padded = _resize(_resize(logits, 64, 0), 96, 1)
        full = _resize(_resize(padded[:62], 45, 0), 70, 1)
        probs = 1 / (1 + np.exp(-full))
        inside = probs > 0.5
        sure = np.abs(full) > 1e-4
        np.testing.assert_array_equal(found.masks[row][sure], inside[sure])
        factor = probs[inside].sum() / (inside.sum() + 1e-6)
        np.testing.assert_allclose(found.scores[row], selection.scores[0, row] * factor, rtol=1e-4)
    assert (selection.scores[0] > 0).all()


def _resize(array, length, axis):
    """Bilinear, half-pixel centres, no antialias."""
    number = array.shape[axis]
    centre = np.maximum((np.arange(length) + 0.5) * number / length - 0.5, 0)
    low = np.minimum(centre.astype(int), number - 1)
    high, share = np.minimum(low + 1, number - 1), centre - low
    share = np.expand_dims(share, tuple(a for a in range(array.ndim) if a != axis))
    return np.take(array, low, axis) * (1 - share) + np.take(array, high, axis) * share


def test_its_options_are_checked_by_the_family_itself(data):
    config = _config(data)
    config.model.num_queries = 0
    with pytest.raises(ValueError, match=r"model\.num_queries must be at least 1, got 0"):
        builders.check_model(config.model)
    with config.model.unlocked():
        config.model.num_groups = 4
    with pytest.raises(ValueError, match=r"'dots', which has no num_groups; it has num_queries, w"):
        builders.check_model(config.model)


_DEVICES = """
import jax
jax.config.update("jax_num_cpu_devices", 4)
import numpy as np
import optax
from sparseinst_jax.checkpoints.state import TrainState
from sparseinst_jax.data.batch import Batch
from sparseinst_jax.models.families import BACKBONES, FAMILIES
from sparseinst_jax.models.trees import functional
from sparseinst_jax.setup import builders
from sparseinst_jax.training.step import TrainStep
from tests import outside_family, smallest, tiny_fastinst

FAMILIES["dots"], BACKBONES["patches"] = outside_family.DOTS, smallest.Patches
config = FAMILY.get_config()
with config.unlocked():
    config.model.backbone = dict(name="patches", width=16, has_norm=False)
rng = np.random.default_rng(1)  # no near tie: one that falls otherwise moves a gradient by 1 %
batch = Batch(
    images=rng.integers(0, 256, (4, 64, 64, 3)).astype(np.uint8),
    valid_size=np.full((4, 2), [64, 60], np.int32),
    labels=rng.integers(0, 2, (4, 4)).astype(np.int32),
    masks=rng.integers(0, 256, (4, 4, 64, 8)).astype(np.uint8),
    is_target=np.arange(4) < np.array([1, 2, 4, 0])[:, None],
    image_id=np.arange(4),
)

def run(number):
    model = builders.build_model(config.model, 2, seed=2)
    apply, params, statistics = functional(model)
    optimizer, devices = optax.sgd(1e-3), jax.local_devices()[:number]
    step = TrainStep(builders.build_objective(config, apply), optimizer, seed=5, devices=devices)
    state = step.place(TrainState(np.int32(0), params, statistics, optimizer.init(params)))
    losses = []
    for _ in range(3):
        state, metrics = step(state, batch)
        jax.block_until_ready(state)
        losses.append({name: float(value[0]) for name, value in metrics.items()})
    return losses, step.fetch(state)

alone, state = run(1)
assert alone[0]["loss/mask"] != alone[1]["loss/mask"]
for number in (2, 4):
    losses, other = run(number)
    for a, b in zip(alone, losses):
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=2e-5, atol=1e-7, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), state, other)
print("equal")
"""


@pytest.mark.parametrize("family", ["outside_family", "tiny_fastinst"])
def test_what_it_draws_does_not_depend_on_the_number_of_devices(family):
    program = _DEVICES.replace("FAMILY.", f"{family}.")
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"PJRT_NPROC": "32", "NPROC": "32"},  # for collectives
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("equal\n")


# What only SparseInst's network and options have, also within longer names. Names of published
# configurations ("iam_r50") are data, and prose may speak of IAM.
_INSIDE = re.compile(
    r"(?<![A-Za-z0-9])(objectness|num_groups|inst_branch|iam(?!_r\d))(?![A-Za-z0-9])"
)


def test_no_module_outside_its_folder_names_what_is_inside_sparseinst():
    folder = ROOT / "sparseinst_jax"
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]}"
        for path in sorted(folder.rglob("*.py"))
        if "sparseinst" not in path.relative_to(folder).with_suffix("").parts
        and "configs" not in path.parts
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for match in _INSIDE.finditer(line)
    ]
    assert found == []
