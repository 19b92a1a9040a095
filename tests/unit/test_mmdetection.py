"""What mmdetection's SparseInst does otherwise, and what it does not."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from sparseinst_jax import losses
from sparseinst_jax.data.coco import load_coco, read_image
from sparseinst_jax.data.ecosystems import find_resize_rule, mmdetection
from sparseinst_jax.data.transforms import Recipe, mask_levels, resized_size
from sparseinst_jax.models import ops
from sparseinst_jax.models.trees import functional
from sparseinst_jax.setup import builders
from sparseinst_jax.setup.config import load_config
from sparseinst_jax.training.optimizer import make_schedule
from tests.unit.recipe_step import same, take_step

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs/mmdet_iam_r50.py"
TINY = {
    "model.backbone.width": "4",
    "model.backbone.stage_depths": "(1, 1, 1, 1)",
    "model.encoder_channels": "8",
    "model.decoder_channels": "8",
}


@pytest.mark.parametrize("kind", ["random", "no target", "nothing at all"])
def test_two_half_epsilons_in_the_dice_loss_are_one_whole(kind, rng):
    logits = rng.normal(size=(4, 9, 11)).astype(np.float32) * 3
    targets = (rng.random((4, 9, 11)) < 0.4).astype(np.float32)
    if kind != "random":
        targets[:] = 0
    if kind == "nothing at all":
        logits[:] = -100
    probs = 1 / (1 + np.exp(-logits.astype(np.float64)))
    squares = (probs**2).sum((1, 2)) + 5e-5, (targets**2).sum((1, 2)) + 5e-5
    expected = 1 - 2 * (probs * targets).sum((1, 2)) / (squares[0] + squares[1])
    np.testing.assert_allclose(losses.dice_loss(logits, targets), expected, rtol=0, atol=1e-6)


def test_the_recipe_starts_at_the_full_rate_and_falls_twice():
    train = load_config(CONFIG).train
    keys = ("learning_rate", "warmup_steps", "warmup_factor", "milestones", "lr_decay")
    schedule = make_schedule(*(train[key] for key in keys))
    rates = {0: 5e-5, 500: 5e-5, 1000: 5e-5, 209999: 5e-5, 210000: 5e-6, 250000: 5e-7}
    found = [float(schedule(step)) for step in rates]
    np.testing.assert_allclose(found, list(rates.values()), rtol=1e-6)
    assert train.num_steps == 270000 and train.ema_decay == 0 and train.gradient_clip_norm == 0


def test_the_recipe_freezes_the_stem_and_trains_res2():
    params, after, statistics, moved = take_step(CONFIG, TINY)
    kept = {stage: same(params[stage], after[stage]) for stage in params}
    assert all(kept["stem"])
    assert not any(kept["res2"] + kept["res3"] + kept["res4"] + kept["res5"])
    assert all(same(statistics, moved))


def square(x, y, width, height):
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def entry(number, segmentation, bbox, area=25.0, image_id=1, **more):
    base = {"id": number, "image_id": image_id, "category_id": 3, "iscrowd": 0, "area": area}
    return {**base, "segmentation": segmentation, "bbox": bbox, **more}


def run_lengths(height, width):
    mask = np.zeros((height, width), np.uint8)
    mask[5:15, 5:15] = 1
    runs = rle.encode(np.asfortranarray(mask))
    return {"size": [height, width], "counts": runs["counts"].decode()}


@pytest.fixture
def annotations(tmp_path):
    """One object for each reason to leave one out, of the numbers that say so."""
    polygon = square(10, 10, 5, 5)
    content = {
        "images": [
            {"id": 1, "file_name": "a.jpg", "height": 60, "width": 80},
            {"id": 2, "file_name": "narrow.jpg", "height": 31, "width": 80},
            {"id": 3, "file_name": "runs.jpg", "height": 40, "width": 40},
        ],
        "categories": [{"id": 3, "name": "cat"}],
        "annotations": [
            entry(1, polygon, [10, 10, 5, 5]),
            entry(2, polygon, [10, 10, 0.9, 5]),  # narrower than a pixel
            entry(3, polygon, [10, 10, 5, 5], area=0),
            entry(4, polygon, [90, 10, 5, 5]),  # beside the image
            entry(5, polygon, [10, 10, 5, 5], ignore=1),
            entry(6, run_lengths(60, 80), [5, 5, 10, 10]),
            entry(7, polygon, [10, 10, 5, 0]),  # no height
            entry(8, run_lengths(60, 80), [5, 5, 10, 10], iscrowd=1),
            entry(9, polygon, [10, 10, 5, 5], image_id=2),
            entry(10, run_lengths(40, 40), [5, 5, 10, 10], image_id=3),
            entry(11, [[1, 1, 2, 2], *polygon], [10, 10, 5, 5]),  # one of two polygons is good
            entry(12, [[1, 1, 2, 2], [1, 2, 3, 4, 5, 6, 7]], [10, 10, 5, 5]),  # none is
        ],
    }
    path = tmp_path / "train.json"
    path.write_text(json.dumps(content))
    return path


def kept(path, name, **options):
    dataset = load_coco(path, None, annotation_filter=name, **options)
    return {r.image_id: [a.id for a in r.annotations] for r in dataset.records}, dataset


def test_each_filter_leaves_out_what_its_implementation_does(annotations):
    everything, dataset = kept(annotations, "detectron2")
    assert everything == {1: [1, 2, 3, 4, 5, 6, 7, 8, 11], 2: [9], 3: [10]}
    assert (dataset.num_filtered, dataset.num_without_mask) == (0, 1)
    # Crowd regions (8) are no objects: they are not asked.
    found, dataset = kept(annotations, "mmdetection")
    assert found == {1: [1, 8, 11], 3: []}
    assert dataset.num_filtered == 7
    found, dataset = kept(annotations, "paddledetection")
    assert found == {1: [1, 2, 4, 6, 8, 11], 2: [9], 3: [10]}
    assert dataset.num_filtered == 3


def test_an_image_whose_objects_mmdetection_leaves_out_stays_and_one_without_any_does_not(
    annotations,
):
    content = json.loads(annotations.read_text())
    content["images"] += [
        {"id": i, "file_name": f"{i}.jpg", "height": 60, "width": 80} for i in (4, 5)
    ]
    content["annotations"].append(
        entry(13, run_lengths(60, 80), [5, 5, 10, 10], image_id=4, iscrowd=1)
    )
    annotations.write_text(json.dumps(content))
    found, _ = kept(annotations, "mmdetection", keep_empty=False)
    assert found == {1: [1, 8, 11], 3: [], 4: [13]}
    for name in ("detectron2", "paddledetection"):
        found, _ = kept(annotations, name, keep_empty=False)
        assert found.keys() == {1, 2, 3}


def test_boxes_are_kept_where_they_are_asked_for(annotations):
    _, dataset = kept(annotations, "paddledetection", keeps_boxes=True)
    boxes = dataset.boxes_xyxy
    assert boxes[0].tolist()[:2] == [[10, 10, 15, 15], [10, 10, np.float32(10.9), 15]]
    assert [len(image) for image in boxes] == dataset.num_targets.tolist() == [5, 1, 1]
    assert kept(annotations, "paddledetection")[1].boxes_xyxy is None


def test_a_json_without_boxes_gets_them_from_the_masks_and_paddledetection_learns_none(annotations):
    content = json.loads(annotations.read_text())
    for annotation in content["annotations"]:
        del annotation["bbox"]
        del annotation["area"]
    annotations.write_text(json.dumps(content))
    found, dataset = kept(annotations, "detectron2", keeps_boxes=True)
    assert found == {1: [1, 2, 3, 4, 5, 6, 7, 8, 11], 2: [9], 3: [10]}
    assert dataset.boxes_xyxy[0].tolist()[0] == [10, 10, 15, 15]
    assert dataset.boxes_xyxy[2].tolist() == [[5, 5, 15, 15]]  # of run lengths
    assert kept(annotations, "mmdetection")[0] == {1: [1, 2, 3, 4, 7, 8, 11], 3: []}
    assert kept(annotations, "paddledetection")[0] == {1: [8], 2: [], 3: []}
    with pytest.raises(ValueError, match="nothing to learn"):
        kept(annotations, "paddledetection", keep_empty=False)


def test_another_filter_is_refused(annotations):
    with pytest.raises(ValueError, match=r"annotation_filter must be one of .*, got 'mmdet'"):
        load_coco(annotations, None, annotation_filter="mmdet")


def test_resized_sizes_are_the_same_but_where_a_side_comes_to_exactly_one_half():
    different = []
    for h, w, size in itertools.product(
        range(30, 1300, 23), range(30, 1300, 29), range(416, 641, 32)
    ):
        if resized_size((h, w), size, 853) != mmdetection.resized_size((h, w), size, 853):
            different.append((h, w))
    # Images twice as long as they are wide: 853 / 2 is 426.5, and either way rounds it as it falls.
    assert all(max(shape) == 2 * min(shape) for shape in different)
    assert len(different) == 7


def test_an_object_between_the_pixels_stays_a_target_with_an_empty_mask():
    draws = np.array([0.9, 0.0, 0, 0, 0, 0, 0, 0])
    triangle = [[200.2, 200.2, 201.3, 200.2, 201.3, 201.3]]
    for rule, kept_empty in (("detectron2", False), ("mmdetection", True)):
        find = find_resize_rule(rule)
        transform = find.draw(draws, (427, 640), Recipe((416, 448), 853, "flip_resize"))
        assert (transform.flip, transform.size) == (False, (416, 624))
        levels = mask_levels(triangle, (427, 640), transform)
        assert (levels is not None) == kept_empty
        assert levels is None or not levels.any()


def test_a_red_image_is_the_same_input_by_way_of_bgr(tmp_path):
    red = np.zeros((32, 32, 3), np.uint8)
    red[..., 0] = 250
    Image.fromarray(red).save(tmp_path / "red.png")
    bgr = np.asarray(Image.open(tmp_path / "red.png"))[..., ::-1]  # as its loader stores images
    mean, deviation = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    expected = (bgr[..., [2, 1, 0]] - mean) / deviation  # bgr_to_rgb
    image = read_image(tmp_path / "red.png")
    found = ops.normalize_images(image[None], np.array([[32, 32]]))
    np.testing.assert_allclose(found[0], expected, rtol=1e-6)
    assert found[0, 0, 0, 0] > 2 > 0 > found[0, 0, 0, 2]


def test_its_258_input_channels_are_our_256_and_the_two_coordinates():
    assert load_config(CONFIG).model.encoder_channels == 256
    config = load_config(CONFIG, TINY)
    _, params, _ = functional(builders.build_model(config.model, 3, 0))
    for branch in ("inst_branch", "mask_branch"):
        first = params["decoder"][branch][f"{branch[:4]}_convs"]["0"]["kernel"]
        assert first.shape == (3, 3, 8 + 2, 8)
