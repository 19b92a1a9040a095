"""Large-scale jitter, copy-paste, labels that swap, ignored crowd regions: plan and images."""

import pickle

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from sparseinst_jax.data import transforms as T
from sparseinst_jax.data.classes import parse_flip_label_pairs
from sparseinst_jax.data.coco import Annotation, ImageRecord
from sparseinst_jax.data.loader import make_batch
from sparseinst_jax.data.plan import CHUNK_STEPS, ImagePlan, Paste, StepPlan, TrainPlan
from sparseinst_jax.data.target_masks import reduce_mask
from sparseinst_jax.data.train_image import load_train_image

STAY = T.Transform(False, None, None, (16, 16))
FLIP = STAY._replace(flip=True)
MIXED = [(480, 640)] * 10 + [(640, 480)] * 9


def _plan(sizes, counts=None, batch_size=4, **options):
    options = {"train_sizes": (416, 640), "train_max_size": 853, "seed": 0, **options}
    counts = np.full(len(sizes), 3) if counts is None else np.array(counts)
    return TrainPlan(sizes, counts, batch_size=batch_size, **options)


def _draws(**values):
    draws = np.full(T.NUM_DRAWS, 0.5)
    for name, value in values.items():
        draws[int(name[1:])] = value
    return draws


def _square(top, left, bottom, right):
    return [[left, top, right, top, right, bottom, left, bottom]]


def _record(tmp_path, number, grey, *annotations, size=(16, 16)):
    path = tmp_path / f"{number}.png"
    Image.new("RGB", size[::-1], (grey, grey, grey)).save(path)
    targets = [
        Annotation(label, segmentation, crowd, 0.0, 10 * number + index)
        for index, (label, segmentation, crowd) in enumerate(annotations)
    ]
    return ImageRecord(number, path.name, str(path), *size, targets)


# What the published recipes draw.

# From the plan as it was before any of these options existed.
RECORDED = [
    (2, False, (544, 725), None),
    (3, False, (480, 640), None),
    (10, False, (725, 544), None),
    (14, False, (683, 512), None),
    (6, True, (640, 853), None),
    (7, True, (576, 768), None),
]


def test_the_published_recipe_draws_what_it_always_drew():
    plan = _plan(MIXED, train_sizes=tuple(range(416, 641, 32)), batch_size=2)
    drawn = [
        (i.position, i.transform.flip, i.transform.size, i.paste)
        for step in (0, 1, 300)
        for i in plan.batch(step).images
    ]
    assert drawn == RECORDED
    step = plan.batch(300)
    assert (step.flip_labels, step.ignores_crowd, step.num_targets) == ((), False, 8)


# Large-scale jitter.


def test_the_jitter_scales_relative_to_the_largest_image_that_fits():
    def draw(size, factor, **draws):
        draws = _draws(d1=(factor - 0.1) / 1.9, **draws)
        return T.draw_transform(draws, size, T.Recipe((40, 50), 100, "lsj"))

    # 200x400 fits 50x100 at a quarter of its size.
    assert draw((200, 400), 0.5) == T.Transform(False, (25, 50), (0, 0, 25, 50), (25, 50))
    assert draw((200, 400), 1.0, d0=0.2).size == (50, 100)
    assert draw((200, 400), 1.0, d0=0.2).flip
    # Times 1.1 it is 55x110: 6 places down, 11 across; a draw of one half takes the middle ones.
    assert draw((200, 400), 1.1) == T.Transform(False, (55, 110), (3, 5, 50, 100), (50, 100))
    last = draw((200, 400), 1.1, d6=0.999, d7=0.999)
    assert last.crop == (5, 10, 50, 100)
    assert draw((200, 400), 1.1, d6=0.999, d7=0).crop == (5, 0, 50, 100)
    # The window lies as the image does; a long image leaves its short side unfilled.
    assert draw((400, 200), 2.0).size == (100, 50)
    assert draw((40, 400), 2.0) == T.Transform(False, (20, 200), (0, 50, 20, 100), (20, 100))
    recipe = T.Recipe((50,), 100, "lsj", (0.8, 1.2))
    narrow = T.draw_transform(_draws(d1=0.5), (200, 400), recipe)
    assert narrow.size == (50, 100) and narrow.first_size == (50, 100)


@pytest.mark.parametrize("as_polygon", [True, False])
def test_the_jitter_moves_images_and_masks_alike_and_pads_right_and_below(tmp_path, as_polygon):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    mask = np.zeros((64, 96), np.uint8)
    mask[8:40, 16:60] = 1
    polygon = _square(8, 16, 40, 60)
    segmentation = polygon if as_polygon else rle.encode(np.asfortranarray(mask))
    record = _record(tmp_path, 1, 0, (0, segmentation, False), size=(64, 96))
    Image.fromarray(pixels).save(record.path)
    # Enlarged to its own size and cut: no pixel changes.
    transform = T.Transform(True, (64, 96), (12, 20, 32, 48), (32, 48))
    step = StepPlan(0, 0, (64, 64), 8, (ImagePlan(0, transform),))
    batch = make_batch([record], step)
    np.testing.assert_array_equal(batch.images[0, :32, :48], pixels[:, ::-1][12:44, 20:68])
    assert not batch.images[0, 32:].any() and not batch.images[0, :, 48:].any()
    assert batch.valid_size.tolist() == [[32, 48]]
    expected = np.zeros((16, 16), np.uint8)
    expected[:8, :12] = reduce_mask(np.ascontiguousarray(mask[:, ::-1])[12:44, 20:68])
    np.testing.assert_array_equal(batch.masks[0, 0], expected)
    assert expected.any()


def test_a_jittered_plan_has_one_padded_size_for_each_way_an_image_lies():
    plan = _plan(MIXED, augmentation="lsj")
    steps = [plan.batch(step) for step in range(CHUNK_STEPS)]
    assert {step.padded_size for step in steps} == {(640, 864), (864, 640)}
    transforms = [image.transform for step in steps for image in step.images]
    factors = [t.first_size[0] * t.first_size[1] / (640 * 853) for t in transforms]
    assert 0.0099 < min(factors) < 0.02 and 3.8 < max(factors) <= 4.01  # 0.1² to 2²
    assert max(max(t.size) for t in transforms) == 853
    assert all(
        t.size[0] <= step.padded_size[0] and t.size[1] <= step.padded_size[1]
        for step in steps
        for t in (image.transform for image in step.images)
    )


# Copy-paste.


def test_pasted_objects_cover_the_ones_before_and_what_is_under_them_is_dropped(tmp_path):
    first = _record(
        tmp_path, 1, 10, (0, _square(0, 0, 8, 8), False), (1, _square(8, 8, 16, 16), False)
    )
    second = _record(
        tmp_path, 2, 200, (0, _square(0, 0, 4, 4), False), (2, _square(4, 4, 16, 16), False)
    )
    loaded = load_train_image([first, second], ImagePlan(0, STAY, Paste(1, STAY, (1,))))
    expected = np.full((16, 16, 3), 10, np.uint8)
    expected[4:, 4:] = 200
    np.testing.assert_array_equal(loaded.image, expected)
    # The first object keeps three of its four blocks, the second is covered, the other image's
    # first object was not chosen.
    assert loaded.labels == [0, 2]
    np.testing.assert_array_equal(loaded.masks[0][:2, :2], [[4, 4], [4, 0]])
    assert loaded.masks[0].sum() == 12
    assert loaded.masks[1].sum() == 9 * 4 and not loaded.masks[1][0].any()
    assert [a.id for a in loaded.covered] == [11] and not loaded.outside


def test_pasted_objects_are_moved_by_their_own_transform_and_cut_at_the_border(tmp_path):
    first = _record(tmp_path, 1, 10)
    second = _record(
        tmp_path, 2, 200, (2, _square(0, 4, 16, 8), False), (1, _square(12, 0, 16, 2), False)
    )
    doubled = T.Transform(True, None, None, (32, 32))  # x 4..8 of 16 is 8..12 flipped, 16..24
    small = T.Transform(False, None, None, (16, 24))
    first.width = 24
    Image.new("RGB", (24, 16), (10, 10, 10)).save(first.path)
    loaded = load_train_image([first, second], ImagePlan(0, small, Paste(1, doubled, (0, 1))))
    assert (loaded.image[:, 16:] == 200).all() and (loaded.image[:, :16] == 10).all()
    assert loaded.labels == [2]
    np.testing.assert_array_equal(loaded.masks[0], [[0, 0, 0, 0, 4, 4]] * 4)
    assert [a.id for a in loaded.outside] == [21]  # below the first image


def test_copy_paste_changes_nothing_else_of_the_plan():
    plain, pasting = _plan(MIXED), _plan(MIXED, copy_paste=0.5)
    pasted = 0
    for step in range(100):
        before, after = plain.batch(step), pasting.batch(step)
        assert [i[:2] for i in after.images] == [i[:2] for i in before.images]
        assert after.padded_size == before.padded_size
        pasted += sum(image.paste is not None for image in after.images)
    assert 160 < pasted < 240  # of 400


def test_copy_paste_stays_within_the_static_number_of_targets():
    counts = [0, 1, 2, 3, 40, 60, 5, 6]
    plan = _plan([(480, 640)] * 8, counts, copy_paste=1.0, batch_size=2)
    assert plan.target_levels == (32, 64) == _plan([(480, 640)] * 8, counts).target_levels
    seen = {}
    for step in range(200):
        planned = plan.batch(step)
        for image in planned.images:
            chosen = () if image.paste is None else image.paste.targets
            assert counts[image.position] + len(chosen) <= planned.num_targets
            assert image.paste is None or chosen
            if chosen:
                assert (
                    sorted(set(chosen)) == list(chosen)
                    and chosen[-1] < counts[image.paste.position]
                )
                seen.setdefault(image.paste.position, set()).add(len(chosen))
    assert 0 not in seen and seen[3] == {1, 2, 3}  # every number from one to all
    assert max(seen[5]) > 30
    # A small set gets room for twice its objects.
    assert _plan([(480, 640)] * 2, [5, 9], copy_paste=0.1).target_levels == (24,)


@pytest.mark.parametrize("options", [{"augmentation": "lsj"}, {}])
def test_the_new_draws_are_the_same_alone_in_order_on_any_host_and_after_pickling(options):
    make = lambda: _plan(MIXED, copy_paste=0.5, **options)  # noqa: E731
    plan = make()
    steps = [plan.batch(step) for step in range(CHUNK_STEPS + 2)]
    copied = pickle.loads(pickle.dumps(plan))
    for step in (CHUNK_STEPS + 1, CHUNK_STEPS - 1, 5):
        assert make().batch(step) == copied.batch(step) == steps[step]
        parts = [make().batch(step, host, 2) for host in range(2)]
        assert parts[0].images + parts[1].images == steps[step].images
        assert {(p.padded_size, p.num_targets) for p in parts} == {
            (steps[step].padded_size, steps[step].num_targets)
        }
    assert _plan(MIXED, copy_paste=0.5, seed=1, **options).batch(5) != steps[5]


def test_what_is_pasted_depends_on_the_seed_and_differs_from_epoch_to_epoch():
    def pasted(seed, first):
        plan = _plan([(480, 640)], [9], batch_size=1, copy_paste=0.5, seed=seed)
        return [plan.batch(step).images[0].paste for step in range(first, first + 20)]

    assert pasted(0, 0) == pasted(0, 0)
    assert pasted(0, 0) != pasted(1, 0)
    assert pasted(0, 0) != pasted(0, CHUNK_STEPS)


# Labels that swap in a mirrored image.


def test_labels_swap_in_flipped_images_and_only_there(tmp_path):
    names = ("face", "left hand", "right hand")
    flip_labels = parse_flip_label_pairs(("left hand = right hand",), names)
    assert flip_labels == (0, 2, 1)
    places = [(label, _square(0, 4 * label, 16, 4 * label + 4), False) for label in range(3)]
    records = [_record(tmp_path, 1, 10, *places), _record(tmp_path, 2, 10, places[1])]

    def labels(transform, paste=None):
        return load_train_image(records, ImagePlan(0, transform, paste), flip_labels).labels

    assert labels(STAY) == [0, 1, 2]
    assert labels(FLIP) == [0, 2, 1]
    assert labels(STAY, Paste(1, FLIP, (0,)))[-1] == 2
    assert labels(FLIP, Paste(1, STAY, (0,)))[-1] == 1
    assert _plan(MIXED, flip_labels=flip_labels).batch(0).flip_labels == (0, 2, 1)
    step = StepPlan(0, 0, (32, 32), 8, (ImagePlan(0, FLIP),), flip_labels)
    assert make_batch(records, step).labels[0, :3].tolist() == [0, 2, 1]


def test_pairs_that_cannot_be_are_refused_together_with_the_closest_name():
    names = ("left_hand", "right_hand", "nose")
    assert parse_flip_label_pairs((), names) == ()
    with pytest.raises(ValueError) as error:
        pairs = ("left_hand=right_hnad", "nose", "nose=nose", "left_hand=nose")
        parse_flip_label_pairs(pairs, names)
    message = str(error.value)
    assert "no class 'right_hnad' (did you mean 'right_hand'?)" in message
    assert "'nose': expected two different names" in message and "'nose=nose'" in message
    assert "'left_hand' is in another pair" in message
    assert "Classes: left_hand, right_hand, nose" in message


# Crowd regions.


def test_a_crowd_region_is_ignored_where_no_object_is_and_nothing_is_pasted(tmp_path):
    crowd = np.zeros((16, 16), np.uint8)
    crowd[:, 4:] = 1
    region = (0, rle.encode(np.asfortranarray(crowd)), True)
    first = _record(tmp_path, 1, 10, region, (1, _square(0, 4, 4, 8), False))
    second = _record(tmp_path, 2, 200, (0, _square(12, 12, 16, 16), False))
    loaded = load_train_image(
        [first, second], ImagePlan(0, FLIP, Paste(1, STAY, (0,))), ignores_crowd=True
    )
    expected = np.zeros((4, 4), bool)
    expected[:, :3] = True  # flipped
    expected[0, 2] = False  # the object
    np.testing.assert_array_equal(loaded.is_ignored, expected)  # the pasted one lies beside
    loaded = load_train_image(
        [first, second], ImagePlan(0, STAY, Paste(1, STAY, (0,))), ignores_crowd=True
    )
    expected = np.ones((4, 4), bool)
    expected[:, 0] = expected[0, 1] = expected[3, 3] = False
    np.testing.assert_array_equal(loaded.is_ignored, expected)
    assert loaded.labels == [1, 0]
    assert load_train_image([first], ImagePlan(0, STAY)).is_ignored is None


def test_a_batch_tells_ignored_pixels_only_when_asked(tmp_path):
    crowd = (0, _square(0, 0, 16, 8), True)
    records = [_record(tmp_path, 1, 10, crowd), _record(tmp_path, 2, 10)]
    images = (ImagePlan(0, STAY), ImagePlan(1, STAY))
    batch = make_batch(records, StepPlan(0, 0, (32, 32), 8, images, (), True))
    expected = np.zeros((2, 8, 8), bool)
    expected[0, :4, :2] = True
    np.testing.assert_array_equal(batch.is_ignored, expected)
    assert not batch.is_target.any()
    assert make_batch(records, StepPlan(0, 0, (32, 32), 8, images)).is_ignored is None
    assert _plan(MIXED, crowd="ignore").batch(0).ignores_crowd


def test_settings_of_the_augmentation_that_cannot_be_are_refused_together():
    with pytest.raises(ValueError) as error:
        _plan(MIXED, copy_paste=1.5, crowd="keep", lsj_range=(2.0, 0.1))
    for part in ("copy_paste", "1.5", "('drop', 'ignore'), got 'keep'", "lsj_range", "(2.0, 0.1)"):
        assert part in str(error.value)
