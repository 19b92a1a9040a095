"""The predictor around a small made-up network, against a plain NumPy version of each step."""

import copy
import json
import pickle
import subprocess
import sys
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sparseinst_jax.checkpoints.state import TrainState
from sparseinst_jax.checkpoints.store import Checkpoints
from sparseinst_jax.data.coco import load_coco
from sparseinst_jax.data.images import as_rgb
from sparseinst_jax.data.transforms import padded_size, resize_image, resized_size
from sparseinst_jax.evaluation.evaluator import evaluate_dataset, match_categories
from sparseinst_jax.inference import masks
from sparseinst_jax.inference.predictor import Predictor
from sparseinst_jax.models.sparseinst.family import SPARSEINST
from sparseinst_jax.models.sparseinst.model import Outputs
from sparseinst_jax.models.trees import functional
from sparseinst_jax.runner import prediction, run_lengths
from sparseinst_jax.runner.prediction import Prediction
from sparseinst_jax.setup import builders
from sparseinst_jax.setup.config import load_config
from sparseinst_jax.setup.loading import load_run

NUM_MASKS = 6
EVAL_SIZE = (64, 96)
CLASS_NAMES, CATEGORY_IDS = ("cat", "dog", "owl"), (4, 17, 90)


def network(params, statistics, images, train=False):
    """Every mask is one linear map of the colours, so that masks follow the image."""
    batch = len(images)
    colours = images[:, ::4, ::4]  # [B, H/4, W/4, 3]
    return (
        Outputs(
            class_logits=jnp.broadcast_to(params["classes"], (batch, NUM_MASKS, 3)),
            mask_logits=jnp.einsum("bhwc,nc->bnhw", colours, params["masks"]) + statistics["shift"],
            objectness_logits=jnp.broadcast_to(params["objectness"], (batch, NUM_MASKS)),
        ),
        statistics,
    )


@pytest.fixture
def weights(rng):
    params = {
        "classes": rng.normal(size=(NUM_MASKS, 3)).astype(np.float32),
        "masks": 3 * rng.normal(size=(NUM_MASKS, 3)).astype(np.float32),
        "objectness": rng.normal(size=NUM_MASKS).astype(np.float32),
    }
    params["objectness"][2] = -20.0  # not kept
    return params, {"shift": np.float32(0.1)}


@pytest.fixture
def predictor(weights):
    return Predictor(network, *weights, CLASS_NAMES, CATEGORY_IDS, EVAL_SIZE, family=SPARSEINST)


def draw_image(rng, height, width):
    """A smooth image, so that few pixels lie at the threshold."""
    coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def linear(values, length):
    """Resize axis 0 with half-pixel centres, float64."""
    centre = (np.arange(length) + 0.5) * (len(values) / length) - 0.5
    centre = np.clip(centre, 0, len(values) - 1)
    return np.stack([np.interp(centre, np.arange(len(values)), c) for c in values.T], axis=1)


def plain_prediction(image, params, statistics):
    """Scores, labels, masks and their probabilities at the original size, step by step."""
    height, width = resized_size(image.shape[:2], *EVAL_SIZE)
    padded = padded_size((height, width))
    mean, deviation = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    canvas = np.zeros((*padded, 3))
    canvas[:height, :width] = (resize_image(image, (height, width)) - np.array(mean)) / deviation
    probs = sigmoid(
        np.einsum("hwc,nc->nhw", canvas[::4, ::4], params["masks"]) + statistics["shift"]
    )
    class_scores = np.sqrt(sigmoid(params["classes"]) * sigmoid(params["objectness"])[:, None])
    kept = np.flatnonzero(class_scores.max(axis=1) > 0.005)
    inside = probs > 0.45
    maskness = (probs * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
    full = []
    for query in kept:
        rows = linear(probs[query], padded[0])[:height]
        valid = linear(rows.T, padded[1])[:width]  # transposed
        full.append(linear(linear(valid.T, image.shape[0]).T, image.shape[1]).T)
    scores = class_scores.max(axis=1) * maskness
    return scores[kept], class_scores.argmax(axis=1)[kept], np.array(full), kept


def test_prediction_equals_the_plain_steps(rng, weights, predictor):
    image = draw_image(rng, 47, 75)
    scores, labels, probs, kept = plain_prediction(image, *weights)
    found = predictor(image)
    assert len(found) == len(kept) == NUM_MASKS - 1
    np.testing.assert_allclose(found.scores, scores, rtol=1e-5)
    np.testing.assert_array_equal(found.labels, labels)
    sure = np.abs(probs - 0.45) > 1e-5
    assert sure.mean() > 0.99
    np.testing.assert_array_equal(found.masks[sure], (probs > 0.45)[sure])
    assert found.class_names == [CLASS_NAMES[label] for label in labels]
    (detections,) = predictor.predict_batch([image])
    np.testing.assert_array_equal(detections.masks, found.masks)
    np.testing.assert_array_equal(detections.query_index, kept)


def test_results_depend_neither_on_the_company_nor_on_the_batch_size(rng, weights):
    sizes = [(40, 60), (60, 40), (40, 61), (90, 90), (20, 30)]
    images = [draw_image(rng, *size) for size in sizes]
    alone, together = (
        Predictor(
            network,
            *weights,
            CLASS_NAMES,
            CATEGORY_IDS,
            EVAL_SIZE,
            family=SPARSEINST,
            batch_size=size,
        )
        for size in (1, 3)
    )
    for image, found in zip(images, together.predict_batch(images), strict=True):
        (expected,) = alone.predict_batch([image])
        assert found.masks.shape[1:] == image.shape[:2]
        np.testing.assert_array_equal(found.masks, expected.masks)
        np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-6)
        np.testing.assert_array_equal(found.labels, expected.labels)


def test_one_compilation_for_each_padded_size_and_none_for_new_weights(rng, weights, predictor):
    for size in [(40, 60), (80, 121), (400, 600), (60, 40)]:  # padded: 64x96 and 96x64
        predictor.predict_batch([draw_image(rng, *size)])
    assert predictor._forward._cache_size() == 2
    params, statistics = weights
    image = draw_image(rng, 40, 60)
    before = predictor(image)
    params["objectness"] = params["objectness"] + np.float32(0.5)
    predictor.set_weights(params, statistics)
    assert (predictor(image).scores > before.scores).any()
    assert predictor._forward._cache_size() == 2


def test_weights_are_held_once(weights, predictor):
    for held, given in zip(*map(jax.tree.leaves, (predictor.weights, weights)), strict=True):
        assert isinstance(held, jax.Array), "the arrays that were given would stay beside a copy"
        np.testing.assert_array_equal(held, given)


def test_evaluation_and_prediction_find_the_same(rng, tmp_path, weights):
    images = {5: draw_image(rng, 50, 70), 3: draw_image(rng, 70, 50), 9: draw_image(rng, 33, 95)}
    content = {
        "images": [
            {"id": key, "file_name": f"{key}.png", "height": len(i), "width": i.shape[1]}
            for key, i in images.items()
        ],
        "categories": [
            {"id": key, "name": name} for key, name in zip(CATEGORY_IDS, CLASS_NAMES, strict=True)
        ],
        "annotations": [],
    }
    for key, image in images.items():
        Image.fromarray(image).save(tmp_path / f"{key}.png")
    predictor = Predictor(
        network, *weights, CLASS_NAMES, CATEGORY_IDS, EVAL_SIZE, family=SPARSEINST, batch_size=2
    )
    predictions = {key: predictor(tmp_path / f"{key}.png") for key in images}
    expected = [entry for key in images for entry in predictions[key].to_coco(key)]
    # The first detection of each image is taken as the truth: it must be found again.
    for number, (key, found) in enumerate(predictions.items(), start=1):
        first = found.to_coco(key)[0]
        content["annotations"].append({"id": number, "iscrowd": 0, **first})
    (tmp_path / "val.json").write_text(json.dumps(content))
    dataset = load_coco(tmp_path / "val.json", tmp_path)
    results, metrics = evaluate_dataset(predictor, dataset)
    assert results == expected
    assert metrics is not None and metrics["AR100"] == pytest.approx(1.0)


def test_prediction_can_be_cut_drawn_saved_and_written(rng, tmp_path, predictor):
    image = draw_image(rng, 47, 75)
    found = predictor(image)
    middle = float(np.median(found.scores))
    sure = found.above(middle)
    np.testing.assert_array_equal(sure.scores, found.scores[found.scores >= middle])
    np.testing.assert_array_equal(sure.masks, found.masks[found.scores >= middle])
    found.save(tmp_path / "a.png", score_threshold=0.0)
    assert np.asarray(Image.open(tmp_path / "a.png")).std() > 0
    assert found._repr_png_().startswith(b"\x89PNG")
    assert repr(found).startswith(f"Prediction(47x75 image, {len(found)} instances")
    entries = found.to_coco(12)
    assert [entry["category_id"] for entry in entries] == [CATEGORY_IDS[k] for k in found.labels]
    assert {entry["image_id"] for entry in entries} == {12}
    np.testing.assert_array_equal(
        run_lengths.decode_masks([entry["segmentation"] for entry in entries], (47, 75)),
        found.masks,
    )
    boxes = found.boxes_xyxy
    for mask, (left, top, right, bottom) in zip(found.masks, boxes.astype(int), strict=True):
        assert mask.sum() == mask[top:bottom, left:right].sum()
        assert mask[top:bottom, left:right].any(axis=0).all() or mask[:, left].any()


def test_drawing_holds_few_masks_at_a_time(monkeypatch, rng, predictor):
    found = predictor(draw_image(rng, 47, 75))
    decoded, alive = [], []

    def decode(rle, original=prediction.decode_crop):
        made = original(rle)
        decoded.append(weakref.ref(made.pixels))
        alive.append(sum(reference() is not None for reference in decoded))
        return made

    monkeypatch.setattr(prediction, "decode_crop", decode)
    found.plot(0.0)
    assert len(decoded) >= len(found) == 5
    assert max(alive) <= 2


def test_image_with_nothing_kept_gives_an_empty_prediction(rng, weights, predictor):
    params, statistics = weights
    predictor.set_weights({**params, "objectness": np.full(NUM_MASKS, -30, np.float32)}, statistics)
    found = predictor(draw_image(rng, 20, 30))
    assert len(found) == 0 and found.to_coco(1) == [] and found.class_names == []
    assert found.masks.shape == (0, 20, 30) and found.boxes_xyxy.shape == (0, 4)
    assert found.plot().size[0] % 30 == 0


def test_paths_pillow_images_and_arrays_are_the_same_image(rng, tmp_path):
    image = draw_image(rng, 10, 14)
    Image.fromarray(image).save(tmp_path / "a.png")
    opaque = np.concatenate([image, np.full((10, 14, 1), 255, np.uint8)], axis=2)
    for same in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(image), opaque):
        np.testing.assert_array_equal(as_rgb(same), image)
    grey = image[:, :, 0]
    np.testing.assert_array_equal(as_rgb(grey), np.stack([grey] * 3, axis=2))


def test_lists_of_paths_give_lists_of_the_same(rng, tmp_path, predictor):
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path, size in zip(paths, [(40, 60), (60, 40), (33, 50)], strict=True):
        Image.fromarray(draw_image(rng, *size)).save(path)
    alone = [predictor(path, 0.3) for path in paths]
    for found in (predictor(paths, 0.3), predictor.predict_batch(map(str, paths), 0.3)):
        assert len(found) == 3
        for ours, theirs in zip(found, alone, strict=True):
            assert type(ours) is Prediction and (ours.scores >= 0.3).all()
            np.testing.assert_array_equal(ours.masks, theirs.masks)
            np.testing.assert_array_equal(ours.scores, theirs.scores)
            np.testing.assert_array_equal(ours.image, theirs.image)
    with pytest.raises(ValueError, match=r"must be 0 to 1, got 30: 30 percent is 0\.3"):
        predictor(paths[0], 30)
    with pytest.raises(ValueError, match="must be 0 to 1, got nan"):
        alone[0].plot(float("nan"))


def test_instances_one_by_one_and_chosen(rng, predictor):
    found = predictor(draw_image(rng, 47, 75))
    instances = list(found)
    assert [instance.class_name for instance in instances] == found.class_names
    assert [instance.score for instance in instances] == found.scores.tolist()
    for instance, mask, box in zip(instances, found.masks, found.boxes_xyxy, strict=True):
        np.testing.assert_array_equal(instance.mask, mask)
        np.testing.assert_array_equal(instance.box_xyxy, box)
    assert found[-1].score == found.scores[-1]
    for index in (slice(1, 3), [2, 0], np.array([2, 0]), found.scores > 0.3):
        np.testing.assert_array_equal(found[index].scores, found.scores[index])
        np.testing.assert_array_equal(found[index].masks, found.masks[index])
        np.testing.assert_array_equal(found[index].query_index, found.query_index[index])


def test_empty_masks_are_left_out_of_a_prediction_only(rng, weights, predictor):
    params, _ = weights
    params["masks"][[1, 4]] = 0
    predictor.set_weights(params, {"shift": np.float32(-9)})  # those two: probability 1e-4
    image = draw_image(rng, 47, 75)
    found = predictor(image)
    assert found.masks.any(axis=(1, 2)).all()
    assert not set(found.query_index) & {1, 4}
    (raw,) = predictor.run([predictor.prepare(image)])  # what evaluation writes
    rles, scores = raw.encode()
    assert raw.query_index.tolist() == [0, 1, 3, 4, 5] and len(rles) == 5
    assert (scores[[1, 3]] == 0).all() and len(found) == (run_lengths.areas_of(rles) > 0).sum()


def test_a_prediction_keeps_its_image_and_its_entries_are_plain(rng, predictor):
    frame = draw_image(rng, 47, 75).copy()
    first = frame.copy()
    found = predictor(frame)
    frame[:] = 0
    np.testing.assert_array_equal(found.image, first)
    for image_id in (np.int64(7), np.uint8(7), 7):
        assert json.loads(json.dumps(found.to_coco(image_id)))[0]["image_id"] == 7
    with pytest.raises(TypeError):
        found.to_coco(7.5)


def test_category_ids_of_numpy_become_plain(rng, weights):
    ids = np.array(CATEGORY_IDS)
    predictor = Predictor(network, *weights, CLASS_NAMES, ids, EVAL_SIZE, family=SPARSEINST)
    json.dumps(predictor(draw_image(rng, 20, 30)).to_coco(1))


def test_a_predictor_is_described_in_one_line_and_says_that_it_cannot_be_pickled(rng, predictor):
    assert repr(predictor) == "Predictor(3 classes, eval_size=(64, 96), batch_size=1)"
    for copied in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match=r"cannot be pickled.*sparseinst_jax\.load"):
            copied(predictor)
    found = predictor(draw_image(rng, 47, 75))
    again = pickle.loads(pickle.dumps(found))
    np.testing.assert_array_equal(again.masks, found.masks)
    assert len(repr([found, found])) < 300


FORK = """
import os, sys
import jax, numpy as np
from sparseinst_jax.inference.predictor import Predictor
from sparseinst_jax.setup.load import load
from sparseinst_jax.setup.train import train
jax.devices()
if os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
for start in (lambda: load("nowhere"), lambda: train("tiny"), lambda: Predictor.start(None, [])):
    try:
        start()
    except ValueError as error:
        assert "was forked from one in which JAX had started" in str(error), error
    else:
        os._exit(1)
os._exit(7)
"""


def test_a_fork_after_jax_has_started_is_refused_in_words():
    run = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=100)
    assert run.returncode == 7, run.stderr


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((4, 4, 3), np.float32), np.zeros((3, 9, 9), np.uint8), np.zeros((0, 4, 3), np.uint8)],
)
def test_arrays_that_are_no_images_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        as_rgb(wrong)


def test_classes_are_matched_by_name(tmp_path):
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 5, "width": 5}],
        "categories": [{"id": 8, "name": "owl"}, {"id": 2, "name": "cat"}],
    }
    (tmp_path / "val.json").write_text(json.dumps(content))
    dataset = load_coco(tmp_path / "val.json", None)
    assert match_categories(CLASS_NAMES, dataset) == [2, None, 8]
    with pytest.raises(ValueError, match="none of the model's classes"):
        match_categories(("horse",), dataset)


def test_missing_images_are_all_named_before_the_first_is_predicted(tmp_path, predictor):
    content = {
        "images": [
            {"id": key, "file_name": f"{key}.png", "height": 5, "width": 5} for key in (1, 2, 3)
        ],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (tmp_path / "val.json").write_text(json.dumps(content))
    (tmp_path / "3.png").write_text("")  # where all are missing, one stands for them
    with pytest.raises(FileNotFoundError, match=r"2 of 3 images[\s\S]*1\.png[\s\S]*2\.png"):
        evaluate_dataset(predictor, load_coco(tmp_path / "val.json", tmp_path))


def test_overrides_that_ask_for_another_network_are_refused_with_every_difference(tmp_path):
    config = load_config(Path(__file__).parents[2] / "configs" / "tiny.py")
    _, params, statistics = functional(builders.build_model(config.model, 3, config.seed))
    meta = {"config": config.to_dict(), "class_names": CLASS_NAMES, "category_ids": CATEGORY_IDS}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(TrainState(np.int32(1), params, statistics, {"count": np.int32(1)}), meta)
    overrides = {"model.kernel_dim": "4", "model.backbone.norm": "frozen_batch_norm"}
    with pytest.raises(ValueError) as caught:
        load_run(tmp_path, overrides=overrides)
    lines = str(caught.value).splitlines()
    assert "  params/decoder/inst_branch/mask_kernel/bias: stored (8,), network (4,)" in lines
    assert "  params/backbone/res2/0/conv1/norm/scale: stored (8,), network nothing" in lines
    assert "  statistics/backbone/res2/0/conv1/norm/scale: stored nothing, network (8,)" in lines
    assert not any("encoder/" in line for line in lines)
    assert "only data.*, eval.* and model.dtype can be overridden" in lines[-1]
    overrides = {"data.eval_size": "(32, 64)", "model.dtype": "bfloat16", "eval.batch_size": "2"}
    predictor, _, step = load_run(tmp_path, overrides=overrides)
    assert (predictor.eval_size, predictor.batch_size, step) == ((32, 64), 2, 1)


def test_truth_that_cannot_be_scored_is_found_before_the_first_image_is_predicted(
    tmp_path, predictor, monkeypatch
):
    images = [{"id": 1, "file_name": "a.png", "height": 5, "width": 5}]
    entry = {"id": 4, "image_id": 1, "category_id": 1, "iscrowd": 0}
    content = {
        "images": images,
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [entry | {"segmentation": [[0, 0, 4, 0, 4, 4]]}],
    }
    (tmp_path / "val.json").write_text(json.dumps(content))
    Image.fromarray(np.zeros((5, 5, 3), np.uint8)).save(tmp_path / "a.png")
    dataset = load_coco(tmp_path / "val.json", tmp_path)
    content["annotations"][0]["segmentation"] = [[0, 0, 9e9, 0, 4, 4]]  # changed since
    (tmp_path / "val.json").write_text(json.dumps(content))
    monkeypatch.setattr(Predictor, "start", lambda *_: pytest.fail("an image was predicted"))
    with pytest.raises(
        ValueError, match=r"val\.json: 1 of 1 annotations.*\n +annotation 4 \(a\.png"
    ):
        evaluate_dataset(predictor, dataset)


# Above, bits of one program are compared with those of another.
@pytest.mark.usefixtures("quick_compilation")
def test_the_forms_for_an_accelerator_find_the_same(rng, monkeypatch):
    """Run on a CPU: weights made for inference, masks packed to bits."""
    network, *trees = functional(builders.build_model(load_config("tiny").model, 3, 0))
    images = [draw_image(rng, 47, 75), draw_image(rng, 80, 61)]

    def predict():
        predictor = Predictor(
            network, *trees, CLASS_NAMES, CATEGORY_IDS, EVAL_SIZE, family=SPARSEINST
        )
        return predictor, predictor.predict_batch(images)

    _, expected = predict()
    monkeypatch.setattr("sparseinst_jax.inference.predictor._is_accelerator", lambda device: True)
    monkeypatch.setattr(masks, "_accelerator", lambda masks: jax.devices()[0])
    predictor, found = predict()
    assert len(jax.tree.leaves(predictor._placed)) < len(jax.tree.leaves(predictor.weights))
    assert jax.tree.structure(predictor.weights) == jax.tree.structure(tuple(trees))
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours) > 0
        np.testing.assert_array_equal(ours.query_index, theirs.query_index)
        np.testing.assert_allclose(ours.scores, theirs.scores, rtol=1e-4)
        assert (ours.masks == theirs.masks).mean() > 0.999
