"""What PaddleDetection's SparseInst does otherwise: data, schedule, averages, evaluation."""

import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from sparseinst_jax.data import transforms as T
from sparseinst_jax.data.coco import Annotation, ImageRecord, load_coco
from sparseinst_jax.data.ecosystems import find_protocol, opencv_resize, paddledetection
from sparseinst_jax.data.plan import TrainPlan
from sparseinst_jax.data.target_masks import reduce_mask
from sparseinst_jax.data.train_image import load_train_image
from sparseinst_jax.evaluation.evaluator import predict_dataset
from sparseinst_jax.inference.predictor import Predictor
from sparseinst_jax.models.sparseinst.family import SPARSEINST
from sparseinst_jax.models.sparseinst.model import InstanceBranch, Outputs
from sparseinst_jax.models.trees import functional
from sparseinst_jax.runner.predictor import FoundInstances
from sparseinst_jax.setup import builders
from sparseinst_jax.setup.config import load_config
from sparseinst_jax.setup.loading import build_predictor
from sparseinst_jax.training.optimizer import decay_mask, make_schedule, moving_average, rules_of
from tests.unit.recipe_step import same, take_step

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = Path(__file__).parents[2]
TINY = {"model.backbone.width": "4", "model.backbone.stage_depths": "(1, 1, 1, 1)"}
EVERYWHERE = np.float32([[0, 0, 10_000, 10_000]])
SIZES = tuple(range(416, 641, 32))


def draw(draws, size, augmentation="flip_resize_crop", boxes=EVERYWHERE, sizes=SIZES):
    return paddledetection.draw_transform(draws, size, T.Recipe(sizes, 853, augmentation), boxes)


# What is trained.


def test_stem_res2_and_every_norm_are_frozen_and_res3_moves():
    path = ROOT / "configs/paddle_iam_r50.py"
    config = load_config(path, TINY)
    model = builders.build_model(config.model, 3, 0, config.train.frozen_stages)
    assert model.backbone.frozen_names == ("stem", "res2")
    params, after, statistics, moved = take_step(path, TINY)
    paths = [str(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    assert not [path for path in paths if "norm" in path]
    assert all(same(statistics, moved))
    for stage in ("stem", "res2"):
        assert all(same(params[stage], after[stage]))
    for stage in ("res3", "res4", "res5"):
        assert not any(same(params[stage], after[stage]))


def test_weight_decay_on_everything_is_the_originals_where_norms_are_frozen():
    # 0.05 on every trained tensor there, none for names with "norm" here: the same without any.
    small = {"model.encoder_channels": "8", "model.decoder_channels": "8"}
    config = load_config(ROOT / "configs/paddle_giam_r50.py", {**TINY, **small})
    model = builders.build_model(config.model, 3, 0)
    _, params, _ = functional(model)
    assert config.train.weight_decay == 0.05
    decays = jax.tree_util.tree_leaves_with_path(decay_mask(params, rules_of(model)))
    assert len(decays) > 60  # biases of the encoder and decoder among them
    assert [str(path) for path, does_decay in decays if not does_decay] == []


def test_the_learning_rate_of_the_recipe_at_its_corners():
    train = load_config(ROOT / "configs/paddle_giam_r50vd_ssld_aug.py").train
    assert train.milestones == (208848, 250984) and train.num_steps == 274800
    train = load_config(ROOT / "configs/paddle_iam_r50.py").train
    assert train.milestones == (210680, 249152) and train.num_steps == 274800
    keys = ("learning_rate", "warmup_steps", "warmup_factor", "milestones", "lr_decay")
    schedule = make_schedule(*(train[key] for key in keys))
    rates = {
        0: 5e-5 * 0.001,
        500: 5e-5 * (0.001 * 0.5 + 0.5),
        1000: 5e-5,
        210679: 5e-5,
        210680: 5e-6,
        249151: 5e-6,
        249152: 5e-7,
    }
    found = [float(schedule(step)) for step in rates]
    np.testing.assert_allclose(found, list(rates.values()), rtol=1e-6)


def paddle_average(values, decay):
    """The average from zero, divided by 1 - d^t with the last d: what an exported file holds."""
    state, d = 0.0, 0.0
    for t, value in enumerate(values):
        d = min(decay, (1 + t) / (10 + t))
        state = d * state + (1 - d) * value
    return state / (1 - d ** len(values))


def our_average(first, values, decay):
    average = np.float64(first)
    for t, value in enumerate(values):
        share = 1 - min(decay, (1 + t) / (10 + t))
        average += share * (value - average)
    return average


def test_an_average_of_constant_weights_is_the_constant():
    average = np.float32(0.7)
    for step in range(40):
        average = moving_average(average, np.float32(0.7), 0.9998, step)
    assert average == np.float32(0.7)
    # There the division overdoes it while d grows: by 1.5 % after two steps.
    assert paddle_average([0.7], 0.9998) == pytest.approx(0.7, rel=1e-12)
    assert paddle_average([0.7] * 2, 0.9998) == pytest.approx(0.7 * 1.0153846, rel=1e-6)
    assert paddle_average([0.7] * 40, 0.9998) == pytest.approx(0.7, rel=1e-3)


def test_the_average_is_paddledetections_once_its_start_is_forgotten():
    values = np.cumsum(np.random.default_rng(0).normal(size=600))
    # d stays at 0.97 from step 290 on: 0.97^600 = 1e-8 is what the division still changes.
    ours, paddle = our_average(-3.0, values, 0.97), paddle_average(values, 0.97)
    assert ours == pytest.approx(paddle, rel=3e-8)
    found = jnp.float32(-3.0)
    for step, value in enumerate(values[:30]):
        found = moving_average(found, jnp.float32(value), 0.97, step)
    assert float(found) == pytest.approx(our_average(-3.0, values[:30], 0.97), rel=1e-5)
    assert 0.9998 ** load_config(ROOT / "configs/paddle_iam_r50.py").train.num_steps < 1e-23


# Training images.


def test_training_sizes_are_rounded_down_from_a_whole_short_side():
    assert paddledetection.resized_size((480, 640), 416, 853) == (416, 554)
    assert T.resized_size((480, 640), 416, 853) == (416, 555)
    assert paddledetection.resized_size((640, 480), 416, 853) == (554, 416)
    assert paddledetection.resized_size((480, 640), 640, 853) == (640, 853)
    assert paddledetection.resized_size((333, 500), 640, 853) == (568, 852)
    assert paddledetection.resized_size((427, 640), 640, 853) == (569, 852)
    assert paddledetection.resized_size((480, 640), 500) == (500, 666)
    assert paddledetection.resized_size((300, 300), 512, 853) == (512, 512)
    # Where rounding the short side up is stretched: 82.6 becomes 83, and 83 * 640 / 62 = 856.
    assert paddledetection.resized_size((62, 640), 640, 853) == (83, 856)


def test_half_of_all_sizes_differ_from_detectron2s_and_by_one_pixel():
    grid = itertools.product(range(320, 641, 17), range(320, 641, 13), SIZES)
    pairs = [
        (paddledetection.resized_size((h, w), s, 853), T.resized_size((h, w), s, 853))
        for h, w, s in grid
    ]
    apart = np.abs(np.subtract(*zip(*pairs, strict=True)))
    assert apart.max() == 1
    assert 0.4 < apart.any(axis=1).mean() < 0.6


def test_a_crop_may_hang_over_by_one_row_and_one_column_and_loses_them():
    random = np.random.default_rng(0)
    seen = {400: set(), 500: set(), 600: set()}
    for draws in random.random((6000, T.NUM_DRAWS)):
        draws[2] = 0.9  # the half with a crop
        transform = draw(draws, (480, 640))
        y, x, height, width = transform.crop
        first = transform.first_size
        assert y + height <= first[0] and x + width <= first[1]
        seen[first[0]].add((height, width, y == first[0] - height, x == first[1] - width))
    heights = {s: sorted({h for h, *_ in seen[s]}) for s in seen}
    # Drawn: 384 ... min(s, 600) + 1. At the last offset one row is lost: 383.
    assert (heights[400][0], heights[400][-1]) == (383, 400)
    assert (heights[500][0], heights[500][-1]) == (383, 500)
    assert heights[600][-1] == 600
    widths = sorted({w for _, w, *_ in seen[600]})  # of 800 columns: up to 601, whole inside
    assert widths[0] >= 383 and widths[-1] == 601


def test_the_last_draws_give_the_ends_of_both_ranges():
    draws = np.full(T.NUM_DRAWS, 0.9999)
    transform = draw(draws, (480, 640), sizes=(640,))
    # Window 601 x 601 of 600 x 800: row 0 with one row over, column 800 - 601 + 1 with one over.
    assert transform.first_size == (600, 800)
    assert transform.crop == (0, 200, 600, 600)
    assert transform.size == (640, 640) and transform.rasterizes_first
    draws[4:6] = 0
    assert draw(draws, (480, 640)).crop == (600 - 384 + 1, 800 - 384 + 1, 383, 383)
    # A window of just the image's size lies on it: no offset is drawn.
    square = np.array([0.9, 0, 0.9, 0.0, 16.5 / 18, 16.5 / 18, 0.9, 0.9])
    assert draw(square, (300, 300)).crop == (0, 0, 400, 400)


def test_a_crop_without_an_object_is_not_made():
    draws = np.array([0.9, 0.99, 0.9, 0.99, 0.0, 0.0, 0.0, 0.0])  # rows and columns 0 ... 383
    assert draw(draws, (480, 640), boxes=np.float32([[0, 0, 9, 9]])).crop == (0, 0, 384, 384)
    away = np.float32([[400, 320, 500, 400], [600, 10, 620, 20]])
    transform = draw(draws, (480, 640), boxes=away)
    assert transform.first_size == (600, 800)
    assert transform.crop == (0, 0, 600, 800) and transform.size == (640, 853)
    # Flipped, the second box lies at columns 20 ... 40 of 640.
    draws[0] = 0.1
    assert draw(draws, (480, 640), boxes=away).crop == (0, 0, 384, 384)
    flipped = draw(draws, (480, 640), boxes=away)
    inside = T.boxes_in_crop(away, (480, 640), flipped)
    assert inside.tolist() == [False, True]


def test_without_crops_the_transform_is_flip_and_resize():
    draws = np.array([0.1, 0.0, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9])
    transform = draw(draws, (480, 640), "flip_resize")
    assert transform == T.Transform(True, None, None, (416, 554), paddledetection.PIXELS, False)


def square_annotation(x, y, side, number, box=None):
    square = [float(v) for v in (x, y, x + side, y, x + side, y + side, x, y + side)]
    return Annotation(0, [square], False, float(side * side), number, box)


def test_pixels_of_images_and_masks_are_opencvs():
    image = np.random.default_rng(3).integers(0, 256, (71, 95, 3), np.uint8)
    transform = T.Transform(
        True, (90, 120), (11, 7, 50, 81), (37, 59), paddledetection.PIXELS, rasterizes_first=True
    )
    first = opencv_resize.resize_bilinear(np.ascontiguousarray(image[:, ::-1]), (90, 120))
    cut = np.ascontiguousarray(first[11:61, 7:88])
    expected = opencv_resize.resize_bilinear(cut, (37, 59))
    np.testing.assert_array_equal(T.transform_image(image, transform), expected)
    # A polygon becomes a mask at the original size, which moves by nearest neighbour.
    polygon = [[10.3, 5.2, 80.7, 12.0, 40.1, 66.6]]
    mask = rle.decode(rle.merge(rle.frPyObjects(polygon, 71, 95)))[:, ::-1]
    for size, window in (((90, 120), np.s_[11:61, 7:88]), ((37, 59), np.s_[:, :])):
        rows, columns = map(opencv_resize.nearest_indices, mask.shape, size)
        mask = mask[rows][:, columns][window]
    np.testing.assert_array_equal(T.move_mask(polygon, (71, 95), transform), mask)
    levels = T.mask_levels(polygon, (71, 95), transform)
    np.testing.assert_array_equal(levels, reduce_mask(np.ascontiguousarray(mask)))
    # Without crops it moves as a polygon.
    plain = T.Transform(
        True, None, None, (142, 190), paddledetection.PIXELS, rasterizes_first=False
    )
    moved = T.move_polygons(polygon, (71, 95), plain)
    drawn = rle.decode(rle.merge(rle.frPyObjects(moved, 142, 190)))
    np.testing.assert_array_equal(T.move_mask(polygon, (71, 95), plain), drawn)


def test_objects_are_kept_by_their_box_and_empty_masks_stay(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(np.zeros((480, 640, 3), np.uint8)).save(path)
    near, far = (0.0, 0.0, 310.0, 310.0), (500.0, 400.0, 600.0, 470.0)
    annotations = [
        square_annotation(10, 10, 50, 1, (10.0, 10.0, 60.0, 60.0)),
        square_annotation(620, 460, 10, 2, near),  # its box is larger than its mask
        square_annotation(510, 410, 50, 3, far),
    ]
    record = ImageRecord(1, "image.png", str(path), 480, 640, annotations)
    boxes = [np.float32([a.box_xyxy for a in annotations])]
    plan = TrainPlan(
        [(480, 640)],
        [3],
        seed=0,
        batch_size=1,
        train_sizes=(416,),
        train_max_size=853,
        augmentation="flip_resize_crop",
        resize_rule="paddledetection",
        boxes_xyxy=boxes,
    )
    steps = (plan.batch(step).images[0] for step in range(200))
    chosen = next(
        image
        for image in steps
        if image.transform.crop is not None
        and not image.transform.flip
        and T.boxes_in_crop(boxes[0], (480, 640), image.transform).tolist() == [True, True, False]
    )
    loaded = load_train_image([record], chosen)
    assert [bool(mask.any()) for mask in loaded.masks] == [True, False]
    assert loaded.outside == [annotations[2]] and loaded.labels == [0, 0]
    # By detectron2's rule what has no pixel left is no target.
    plain = chosen._replace(transform=chosen.transform._replace(pixels=T.ORIGINAL_PIXELS))
    record.annotations = [annotation._replace(box_xyxy=None) for annotation in annotations]
    assert len(load_train_image([record], plain).masks) == 1


def test_the_plan_follows_the_rule_and_holds_what_it_gives():
    sizes = [(480, 640), (62, 640), (427, 640)]
    options = dict(seed=3, batch_size=4, train_sizes=SIZES, train_max_size=853)
    plan = TrainPlan(sizes, [1, 1, 1], resize_rule="paddledetection", **options)
    for step in range(20):
        batch = plan.batch(step)
        for image in batch.images:
            size = sizes[image.position]
            possible = {paddledetection.resized_size(size, s, 853) for s in SIZES}
            assert image.transform.size in possible
            assert image.transform.size[1] <= batch.padded_size[1]
    again = TrainPlan(sizes, [1, 1, 1], resize_rule="paddledetection", **options)
    assert again.batch(7) == plan.batch(7)
    message = "resize_rule must be one of .*got 'paddle'"
    with pytest.raises(ValueError, match=message):
        TrainPlan(sizes, [1, 1, 1], resize_rule="paddle", **options)
    with pytest.raises(ValueError, match="lsj is none of paddledetection"):
        TrainPlan(sizes, [1, 1, 1], resize_rule="paddledetection", augmentation="lsj", **options)


# Evaluation.


@pytest.mark.parametrize(
    ("size", "resized", "cut"),
    [
        ((480, 640), (640, 853), (639, 853)),
        ((375, 500), (640, 853), (639, 853)),
        ((426, 640), (568, 853), (567, 853)),
        ((427, 640), (569, 853), (569, 853)),
        ((640, 480), (853, 640), (853, 639)),
        ((500, 500), (640, 640), (640, 640)),
        ((70, 100), (597, 853), (597, 853)),  # 853 / 100 * 100 is below 853 in float64
    ],
)
def test_masks_are_cut_to_a_size_that_is_rounded_down(size, resized, cut):
    image = np.zeros((*size, 3), np.uint8)
    found, mask_size = find_protocol("paddledetection").resize(image, (640, 853))
    assert (found.shape[:2], mask_size) == (resized, cut)
    found, mask_size = find_protocol("original").resize(image, (640, 853))
    assert found.shape[:2] == mask_size == resized


def test_test_images_are_sampled_by_the_factor_and_not_by_the_rounded_sizes():
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    found, _ = find_protocol("paddledetection").resize(image, (64, 85))
    factor = 85 / 64
    np.testing.assert_array_equal(found, opencv_resize.resize_bicubic_by_factor(image, factor))
    by_size = (np.arange(64) + 0.5) * (48 / 64) - 0.5
    by_factor = (np.arange(64) + 0.5) / factor - 0.5
    assert np.abs(by_size - by_factor).max() > 0.17  # pixels apart at the far border


NUM_MASKS = 5


def network(params, statistics, images, train=False):
    """Every mask is one linear map of the colours, so that masks follow the image."""
    shape = len(images), NUM_MASKS
    logits = jnp.einsum("bhwc,nc->bnhw", images[:, ::4, ::4], params["masks"])
    return (
        Outputs(
            class_logits=jnp.broadcast_to(params["classes"][:, None], (*shape, 1)),
            mask_logits=logits,
            objectness_logits=jnp.zeros(shape),
        ),
        statistics,
    )


def paddle_predictor(classes, protocol="paddledetection"):
    masks = np.random.default_rng(2).normal(size=(NUM_MASKS, 3)).astype(np.float32)
    params = {"classes": np.float32(classes), "masks": 3 * masks}
    return Predictor(
        network, params, {}, ("cat",), (7,), (64, 85), family=SPARSEINST, protocol=protocol
    )


def test_the_last_kept_query_of_each_image_is_lost():
    image = np.random.default_rng(1).integers(0, 256, (48, 64, 3), np.uint8)
    kept = [1.0, -30.0, 2.0, 3.0, -30.0]  # queries 0, 2 and 3
    (whole,) = paddle_predictor(kept, "original").predict_batch([image])
    assert whole.query_index.tolist() == [0, 2, 3]
    predictor = paddle_predictor(kept)
    (found,) = predictor.predict_batch([image])
    assert found.query_index.tolist() == [0, 2]
    assert [entry["category_id"] for entry in predictor(image).to_coco(1)] == [7, 7]
    for classes in ([-30.0, 1.0, -30.0, -30.0, -30.0], [-30.0] * NUM_MASKS):
        assert paddle_predictor(classes)(image).to_coco(1) == []


def test_masks_are_stretched_from_the_cut():
    image = np.random.default_rng(4).integers(0, 256, (6, 8, 3), np.uint8)
    image = np.kron(image, np.ones((8, 8, 1), np.uint8))  # 48 x 64
    (found,) = paddle_predictor([1.0] * NUM_MASKS).predict_batch([image])
    masks = 3 * np.random.default_rng(2).normal(size=(NUM_MASKS, 3)).astype(np.float32)
    resized = opencv_resize.resize_bicubic_by_factor(image, 85 / 64)  # 64 x 85, cut to 63 x 85
    canvas = np.zeros((64, 96, 3))
    mean, deviation = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    canvas[:, :85] = (resized - mean) / deviation
    logits = np.einsum("hwc,nc->nhw", canvas[::4, ::4], masks[:-1])
    full = linear(linear(1 / (1 + np.exp(-logits)), 64, 1), 96, 2)[:, :63, :85]
    expected = linear(linear(full, 48, 1), 64, 2)
    sure = np.abs(expected - 0.45) > 1e-4
    assert sure.mean() > 0.99
    np.testing.assert_array_equal(found.masks[sure], (expected > 0.45)[sure])
    whole = linear(linear(1 / (1 + np.exp(-logits)), 64, 1), 96, 2)[:, :, :85]
    uncut = linear(linear(whole, 48, 1), 64, 2)
    assert ((uncut > 0.45) != (expected > 0.45)).any()


def linear(values, length, axis):
    """Resize an axis with half-pixel centres and repeated edges."""
    size = values.shape[axis]
    centre = np.clip((np.arange(length) + 0.5) * (size / length) - 0.5, 0, size - 1)
    low = np.minimum(centre.astype(int), size - 2)
    shape = [1] * values.ndim
    shape[axis] = length
    share = (centre - low).reshape(shape)
    return values.take(low, axis) * (1 - share) + values.take(low + 1, axis) * share


def test_the_configuration_names_the_protocol():
    overrides = {"eval.protocol": "paddledetection", "data.eval_size": "(64, 85)"}
    config = load_config(ROOT / "configs/giam_r50.py", overrides)
    params = {"classes": np.zeros(NUM_MASKS, np.float32), "masks": np.eye(5, 3, dtype=np.float32)}
    predictor = build_predictor(config, network, params, {}, ("cat",), (7,))
    assert predictor.prepare(np.zeros((48, 64, 3), np.uint8)).mask_size == (63, 85)
    config.eval.protocol = "original"
    predictor = build_predictor(config, network, params, {}, ("cat",), (7,))
    assert predictor.prepare(np.zeros((48, 64, 3), np.uint8)).mask_size == (64, 85)


def test_another_protocol_is_refused():
    with pytest.raises(ValueError, match=r"eval\.protocol must be one of original, paddle"):
        paddle_predictor([0.0] * NUM_MASKS, "paddle")


# The network.


def test_maps_normalised_after_the_product_give_what_they_give_before_it(rng):
    branch = InstanceBranch(
        10,
        channels=8,
        num_convs=1,
        num_masks=6,
        num_groups=2,
        num_classes=3,
        kernel_dim=4,
        normalizer="sigmoid",
        dtype=jnp.float32,
        rng=rng,
    )
    logits = rng.normal(size=(2, 20, 27, 12)).astype(np.float32)
    logits[..., 0] = -40.0  # a map of nothing: the floor of the sum
    features = np.abs(rng.normal(size=(2, 20, 27, 8))).astype(np.float32)
    maps = 1 / (1 + np.exp(-logits))
    maps = maps / np.maximum(maps.sum((1, 2), keepdims=True), 1e-6)
    before = np.einsum("bhwm,bhwc->bmc", maps, features)
    before = before.reshape(2, 2, 6, 8).transpose(0, 2, 1, 3).reshape(2, 6, 16)
    np.testing.assert_allclose(
        branch.pool(branch.activate(logits), features), before, rtol=0, atol=1e-5
    )


def test_images_without_an_object_to_learn_are_not_predicted(tmp_path):
    box = {"bbox": [2, 2, 8, 8], "area": 64.0, "segmentation": [[2, 2, 10, 2, 10, 10, 2, 10]]}
    kinds = ({}, {"iscrowd": 1}, {"ignore": 1}, {"bbox": None}, {"area": 0.0}, None, {})
    content = {"categories": [{"id": 7, "name": "cat"}], "images": [], "annotations": []}
    for i, kind in enumerate(kinds):
        name = f"{i}.png"
        Image.new("RGB", (32, 32)).save(tmp_path / name)
        content["images"].append({"id": i, "file_name": name, "height": 32, "width": 32})
        if kind is not None:
            entry = {"id": i + 1, "image_id": i, "category_id": 7, "iscrowd": 0, **box, **kind}
            entry = {key: value for key, value in entry.items() if value is not None}
            content["annotations"].append(entry)
    (tmp_path / "val.json").write_text(json.dumps(content))
    prepared = []

    class Blind:
        class_names, eval_size, num_together = ("cat",), (64, 85), 1

        def __init__(self, name):
            self.protocol = find_protocol(name)

        def prepare(self, image):
            prepared.append(image)
            return image

        def start(self, items):
            return items

        def finish(self, pending):
            none = np.zeros(0, np.int32)
            return [FoundInstances(none, none, iter(()), image.shape[:2]) for image in pending]

    dataset = load_coco(tmp_path / "val.json", tmp_path)
    for name, expected in (("original", 7), ("paddledetection", 2)):
        prepared.clear()
        assert predict_dataset(Blind(name), dataset) == []
        assert len(prepared) == expected
    content["annotations"] = content["annotations"][1:3]
    (tmp_path / "val.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"leaves out all 7 images of .*eval\.protocol=original"):
        predict_dataset(Blind("paddledetection"), load_coco(tmp_path / "val.json", tmp_path))
