"""Batches read from files."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from sparseinst_jax.data.coco import load_coco
from sparseinst_jax.data.loader import make_batch, train_batches
from sparseinst_jax.data.plan import ImagePlan, StepPlan, TrainPlan
from sparseinst_jax.data.shapes import draw_shapes_dataset
from sparseinst_jax.data.target_masks import FULL_BITS, QUARTER_LEVELS, unpack_bits
from sparseinst_jax.data.transforms import Transform


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = draw_shapes_dataset(tmp_path_factory.mktemp("data") / "shapes", 13, 1, seed=2)
    return load_coco(root / "train.json", root / "images/train")


def _plan(dataset, **options):
    options = {"seed": 1, "batch_size": 4, "train_sizes": (96, 128), **options}
    return TrainPlan(dataset.image_sizes, dataset.num_targets, train_max_size=200, **options)


def _assert_equal(first, second):
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def _two_images(tmp_path):
    """A 32x48 image with a square and a crowd region, and a 24x24 one without objects."""
    pixels = np.random.default_rng(0).integers(1, 256, (32, 48, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels[:24, :24]).save(tmp_path / "b.png")
    content = {
        "images": [
            {"id": 5, "file_name": "a.png", "height": 32, "width": 48},
            {"id": 6, "file_name": "b.png", "height": 24, "width": 24},
        ],
        "categories": [{"id": 4, "name": "x"}, {"id": 9, "name": "y"}],
        "annotations": [
            {"id": 1, "image_id": 5, "category_id": 9, "area": 64,
             "segmentation": [[8, 4, 16, 4, 16, 12, 8, 12]]},
            {"id": 2, "image_id": 5, "category_id": 4, "area": 9, "iscrowd": 1,
             "segmentation": {"size": [32, 48], "counts": [0, 1536]}},
        ],
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(content))
    return pixels, load_coco(tmp_path / "a.json", tmp_path)


def test_a_batch_holds_the_images_and_targets_at_the_top_left(tmp_path):
    pixels, dataset = _two_images(tmp_path)
    images = (
        ImagePlan(0, Transform(True, None, None, (32, 48))),
        ImagePlan(1, Transform(False, None, None, (24, 24))),
    )
    batch = make_batch(dataset.records, StepPlan(0, 0, (32, 64), 8, images))
    expected = np.zeros((2, 32, 64, 3), np.uint8)
    expected[0, :, :48] = pixels[:, ::-1]
    expected[1, :24, :24] = pixels[:24, :24]
    np.testing.assert_array_equal(batch.images, expected)
    np.testing.assert_array_equal(batch.valid_size, [[32, 48], [24, 24]])
    np.testing.assert_array_equal(batch.image_id, [5, 6])
    # The crowd region is no target.
    assert batch.is_target.sum() == 1 and batch.is_target[0, 0]
    assert batch.labels[0, 0] == 1 and batch.labels.sum() == 1
    masks = np.zeros((2, 8, 8, 16), np.uint8)
    masks[0, 0, 1:3, 8:10] = 4  # x 8..16 of 48 flipped is 32..40
    np.testing.assert_array_equal(batch.masks, masks)
    assert [a.dtype.name for a in batch[:6]] == [
        "uint8", "int32", "int32", "uint8", "bool", "int64"
    ]  # fmt: skip
    assert batch.is_ignored is None  # the crowd region is dropped, as in the original


def test_a_batch_of_full_masks_holds_them_in_bits_and_crowd_pixel_by_pixel(tmp_path):
    _, dataset = _two_images(tmp_path)
    images = (
        ImagePlan(0, Transform(True, None, None, (32, 48))),
        ImagePlan(1, Transform(False, None, None, (24, 24))),
    )
    plan = StepPlan(0, 0, (32, 64), 8, images, ignores_crowd=True, targets=FULL_BITS)
    batch = make_batch(dataset.records, plan)
    assert batch.masks.shape == (2, 8, 32, 8) and batch.masks.dtype == np.uint8
    masks = np.zeros((2, 8, 32, 64), bool)
    masks[0, 0, 4:12, 32:40] = True  # x 8..16 of 48 flipped is 32..40
    np.testing.assert_array_equal(unpack_bits(batch.masks), masks)
    is_ignored = np.zeros((2, 32, 64), bool)
    is_ignored[0, :, :48] = True  # the crowd region is the whole image,
    is_ignored &= ~masks[:, 0]  # but for the object
    np.testing.assert_array_equal(batch.is_ignored, is_ignored)
    levels = make_batch(dataset.records, plan._replace(targets=QUARTER_LEVELS))
    np.testing.assert_array_equal(levels.is_ignored, is_ignored[:, 1::4, 1::4])


@pytest.mark.parametrize("form", [QUARTER_LEVELS, FULL_BITS], ids=["levels", "bits"])
def test_an_object_that_a_crop_removed_stays_with_an_empty_mask_where_the_form_says_so(
    tmp_path, form
):
    _, dataset = _two_images(tmp_path)
    right_half = Transform(False, (32, 48), (0, 24, 32, 24), (32, 24))
    plan = StepPlan(0, 0, (32, 32), 8, (ImagePlan(0, right_half),), targets=form)
    assert not make_batch(dataset.records, plan).is_target.any()
    kept = make_batch(dataset.records, plan._replace(targets=form._replace(keeps_empty=True)))
    assert kept.is_target.sum() == 1 and kept.labels[0, 0] == 1
    assert kept.masks.shape == (1, 8, *form.shape((32, 32))) and not kept.masks.any()


def test_batches_come_in_the_order_of_the_steps(drawn):
    plan = _plan(drawn)
    batches = list(train_batches(drawn, plan, 0, 9))
    assert len(batches) == 9
    for step, batch in enumerate(batches):
        _assert_equal(batch, make_batch(drawn.records, plan.batch(step)))
    used = np.bincount(np.concatenate([b.image_id for b in batches]) - 1, minlength=13)
    assert used.sum() == 36 and used.max() <= 4


def test_a_resumed_run_sees_the_batches_it_would_have_seen(drawn):
    plan = _plan(drawn, augmentation="flip_resize_crop")
    whole = list(train_batches(drawn, plan, 0, 6))
    resumed = list(train_batches(drawn, _plan(drawn, augmentation="flip_resize_crop"), 4, 2))
    for first, second in zip(whole[4:], resumed, strict=True):
        _assert_equal(first, second)


def test_hosts_read_the_parts_of_the_same_batch(drawn):
    plan = _plan(drawn)
    whole = next(train_batches(drawn, plan, 3, 1))
    parts = [next(train_batches(drawn, plan, 3, 1, host, 2)) for host in range(2)]
    _assert_equal(whole, jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts))


def test_worker_processes_give_the_same_batches(drawn):
    """Those of full masks; `test_index_cache` has the same of levels."""
    form = FULL_BITS._replace(keeps_empty=True)
    plan = _plan(drawn, targets=form, augmentation="flip_resize_crop", crowd="ignore")
    in_threads = list(train_batches(drawn, plan, 2, 3))
    in_workers = list(train_batches(drawn, plan, 2, 3, num_workers=2))
    assert len(in_workers) == 3
    for first, second in zip(in_threads, in_workers, strict=True):
        assert first.masks.any() and first.masks.shape[-1] == first.images.shape[2] // 8
        _assert_equal(first, second)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_image_is_named(tmp_path, num_workers):
    _, dataset = _two_images(tmp_path)
    (tmp_path / "b.png").write_bytes(b"broken")
    plan = _plan(dataset, batch_size=2)
    with pytest.raises(ValueError, match=r"b\.png.*replace the file"):
        list(train_batches(dataset, plan, 0, 2, num_workers=num_workers))


def test_a_broken_mask_is_named(tmp_path):
    _, dataset = _two_images(tmp_path)
    plan = _plan(dataset, batch_size=2)
    dataset = dataclasses.replace(dataset, records=list(dataset.records))
    annotations = dataset.records[0].annotations
    longer = rle.encode(np.asfortranarray(np.eye(90, dtype=np.uint8)))["counts"]
    annotations[0] = annotations[0]._replace(segmentation={"size": [32, 48], "counts": longer})
    with pytest.raises(ValueError, match=r"annotation 1 of image .*a\.png"):
        list(train_batches(dataset, plan, 0, 1))
