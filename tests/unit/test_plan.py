"""The plan of batches."""

import pickle

import numpy as np
import pytest

from sparseinst_jax.data.coco import load_coco
from sparseinst_jax.data.loader import train_batches
from sparseinst_jax.data.plan import CHUNK_STEPS, TrainPlan, target_levels, training_buckets
from sparseinst_jax.data.shapes import draw_shapes_dataset

SIZES = tuple(range(416, 641, 32))


def _plan(sizes, counts=None, batch_size=8, seed=0, **options):
    options = {"train_sizes": SIZES, "train_max_size": 853, **options}
    counts = np.full(len(sizes), 3) if counts is None else counts
    return TrainPlan(sizes, counts, seed=seed, batch_size=batch_size, **options)


def _positions(plan, steps):
    return np.array([[i.position for i in plan.batch(step).images] for step in steps])


def test_thirteen_images_in_batches_of_eight_are_used_once_per_epoch():
    plan = _plan([(480, 640)] * 13)
    stream = _positions(plan, range(13)).ravel()  # 104 = 8 epochs
    for epoch in range(8):
        assert sorted(stream[epoch * 13 : (epoch + 1) * 13]) == list(range(13))
    assert [plan.epoch_of(step) for step in (0, 1, 2, 13)] == [0, 0, 1, 8]
    assert plan.steps_per_epoch == 13 / 8
    assert not np.array_equal(stream[:13], stream[13:26])


def test_fewer_images_than_the_batch_work():
    counts = np.bincount(_positions(_plan([(480, 640)] * 3), range(6)).ravel())
    assert counts.tolist() == [16, 16, 16]


def test_nothing_is_lost_or_repeated_when_orientations_are_sorted():
    sizes = [(480, 640)] * 10 + [(640, 480)] * 3
    plan = _plan(sizes)
    # A chunk is 2048 slots: 157 epochs of 13 and 7 images more.
    counts = np.bincount(_positions(plan, range(CHUNK_STEPS)).ravel(), minlength=13)
    assert counts.sum() == CHUNK_STEPS * 8
    assert set(counts) <= {157, 158}


def test_a_batch_has_one_orientation_but_for_the_last_of_a_chunk():
    plan = _plan([(480, 640)] * 10 + [(640, 480)] * 3)
    mixed = []
    for step in range(2 * CHUNK_STEPS):
        step_plan = plan.batch(step)
        upright = {plan.image_sizes[i.position][0] == 640 for i in step_plan.images}
        if len(upright) > 1:
            mixed.append(step)
        elif upright == {True}:
            assert step_plan.padded_size[0] > step_plan.padded_size[1]
    assert set(mixed) <= {CHUNK_STEPS - 1, 2 * CHUNK_STEPS - 1}
    assert mixed  # 2048 slots and 473 or so upright ones leave a rest


def test_every_image_fits_the_bucket_and_the_bucket_is_the_smallest():
    rng = np.random.default_rng(0)
    sizes = rng.integers(50, 900, (40, 2))
    for augmentation in ("flip_resize", "flip_resize_crop"):
        plan = _plan(sizes, batch_size=2, augmentation=augmentation)
        seen = set()
        for step in range(CHUNK_STEPS + 3):
            step_plan = plan.batch(step)
            height, width = np.max([i.transform.size for i in step_plan.images], axis=0)
            seen.add(step_plan.padded_size)
            assert height <= step_plan.padded_size[0] and width <= step_plan.padded_size[1]
            turn = slice(None, None, -1 if step_plan.padded_size[0] > width else 1)
            smaller = [b for b in plan.buckets if max(b) < max(step_plan.padded_size)]
            assert not any(
                height <= b[turn][0] and width <= b[turn][1]
                for b in smaller
                if step_plan.padded_size in plan.buckets or turn.step == -1
            )
        assert seen <= {b for b in plan.buckets} | {b[::-1] for b in plan.buckets}


def test_buckets_are_three_scales_and_waste_nothing_on_a_uniform_set():
    assert training_buckets(SIZES, 853) == ((480, 640), (576, 768), (640, 864))
    assert _plan([(128, 160)], train_sizes=(128,), train_max_size=213).buckets == ((128, 160),)
    assert _plan([(300, 900), (480, 640)]).buckets[-1] == (640, 864)
    assert _plan([(512, 512)]).buckets[-1] == (640, 640)


def test_numbers_of_padded_targets_are_few_static_levels():
    assert target_levels(0) == (8,)
    assert target_levels(8) == (8,)
    assert target_levels(20) == (24,)
    assert target_levels(32) == (32,)
    assert target_levels(93) == (32, 96)
    plan = _plan([(480, 640)] * 16, counts=np.array([93] + [4] * 15))
    for step in range(8):
        step_plan = plan.batch(step)
        crowded = any(image.position == 0 for image in step_plan.images)
        assert step_plan.num_targets == (96 if crowded else 32)


def test_any_number_of_hosts_gives_the_same_global_batch():
    plan = _plan([(480, 640)] * 10 + [(640, 480)] * 9, augmentation="flip_resize_crop")
    for step in (0, 5, CHUNK_STEPS - 1, CHUNK_STEPS):
        whole = plan.batch(step)
        for host_count in (2, 4, 8):
            parts = [plan.batch(step, host, host_count) for host in range(host_count)]
            assert sum((part.images for part in parts), ()) == whole.images
            assert {part.padded_size for part in parts} == {whole.padded_size}
            assert {part.num_targets for part in parts} == {whole.num_targets}


def test_a_step_is_planned_alike_alone_in_order_and_after_pickling():
    make = lambda seed: _plan([(480, 640)] * 7 + [(600, 500)] * 5, seed=seed)  # noqa: E731
    in_order = make(3)
    steps = [in_order.batch(step) for step in range(CHUNK_STEPS + 4)]
    copied = pickle.loads(pickle.dumps(in_order))
    for step in (CHUNK_STEPS + 2, 17, 0):
        assert make(3).batch(step) == steps[step]
        assert copied.batch(step) == steps[step]
    assert make(4).batch(0) != steps[0]


def test_an_image_gets_another_transform_in_each_epoch():
    plan = _plan([(480, 640)], batch_size=1)
    transforms = {plan.batch(step).images[0].transform for step in range(200)}
    assert len(transforms) == 2 * len(SIZES)  # flip or not, at each size


def test_settings_that_cannot_be_are_refused_together():
    with pytest.raises(ValueError) as error:
        _plan([], batch_size=0, train_max_size=100, augmentation="mosaic")
    for part in ("no image", "batch_size", "train_max_size 100", "'mosaic'"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="multiple of the number of hosts"):
        _plan([(4, 4)]).batch(0, 0, 3)


def test_a_plan_of_a_data_set_keeps_its_sizes_up_to_the_recipes(tmp_path):
    data = draw_shapes_dataset(tmp_path / "data", 4, 1, image_size=(64, 96))
    dataset = load_coco(data / "train.json", data / "images/train")
    plan = TrainPlan.of(dataset, batch_size=2, seed=3)
    assert (plan.train_sizes, plan.train_max_size, plan.batch_size) == ((64,), 96, 2)
    assert {image.transform.size for image in plan.batch(0).images} <= {(64, 96), (96, 64)}
    assert TrainPlan.of(dataset, train_sizes=(32, 48)).train_sizes == (32, 48)
    (batch, other) = train_batches(dataset, plan)  # of one epoch
    assert batch.images.shape[1:] in ((64, 96, 3), (96, 64, 3)) and len(other.images) == 2
