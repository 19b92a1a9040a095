"""Images that cannot be used: what stands in for them, what is listed, when it is too much."""

import numpy as np
import pytest

from sparseinst_jax.data.coco import load_coco
from sparseinst_jax.data.failures import Skip, SkippedImages, load_or_skip
from sparseinst_jax.data.loader import make_batch, train_batches
from sparseinst_jax.data.plan import ImagePlan, Paste, StepPlan, TrainPlan
from sparseinst_jax.data.rules import ORIGINAL_PROTOCOL
from sparseinst_jax.data.shapes import draw_shapes_dataset
from sparseinst_jax.data.target_masks import QUARTER_LEVELS
from sparseinst_jax.data.train_image import load_train_image
from sparseinst_jax.data.transforms import Transform
from sparseinst_jax.evaluation.evaluator import evaluate_dataset
from sparseinst_jax.runner.predictor import FoundInstances


@pytest.fixture
def damaged(tmp_path):
    """Five images; the file of the third is cut off."""
    root = draw_shapes_dataset(tmp_path / "shapes", 5, 1, seed=2, image_size=(64, 64))
    dataset = load_coco(root / "train.json", root / "images/train")
    path = dataset.records[2].path
    with open(path, "rb") as file:
        start = file.read(200)
    with open(path, "wb") as file:
        file.write(start)
    return dataset


def plan_of(dataset, **options):
    sizes = {"seed": 1, "batch_size": 2, "train_sizes": (64,), "train_max_size": 64}
    return TrainPlan(dataset.image_sizes, dataset.num_targets, **sizes, **options)


def assert_equal(first, second):
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_empty_image_of_the_planned_size_stands_in_and_the_others_are_as_they_were(damaged):
    images = tuple(ImagePlan(p, Transform(False, None, None, (48, 32))) for p in (1, 2, 0))
    skips = []
    batch = make_batch(damaged.records, StepPlan(0, 0, (64, 64), 8, images, (), True), skips)
    alone = make_batch(
        damaged.records, StepPlan(0, 0, (64, 64), 8, (images[0], images[2]), (), True)
    )
    assert_equal([array[[0, 2]] for array in batch], alone)
    assert batch.valid_size[1].tolist() == [48, 32]
    for array in (batch.images, batch.labels, batch.masks, batch.is_target, batch.is_ignored):
        assert not array[1].any()
    (skip,) = skips
    record = damaged.records[2]
    assert (skip.image_id, skip.source) == (record.image_id, record.path)
    assert "cannot be read" in skip.reason
    with pytest.raises(ValueError, match="cannot be read"):
        make_batch(damaged.records, StepPlan(0, 0, (64, 64), 8, images))


def test_where_only_the_pasted_image_is_broken_nothing_is_pasted(damaged):
    stay = Transform(False, None, None, (64, 64))
    plan, skips = ImagePlan(0, stay, Paste(2, stay, (0,))), []
    loaded = load_or_skip(damaged.records, plan, (), False, QUARTER_LEVELS, skips)
    alone = load_train_image(damaged.records, plan._replace(paste=None))
    np.testing.assert_array_equal(loaded.image, alone.image)
    assert loaded.labels == alone.labels and len(loaded.labels) > 0
    assert [skip.image_id for skip in skips] == [damaged.records[2].image_id]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_skipping_is_told_with_its_step_and_a_resumed_run_gets_the_same(damaged, num_workers):
    def run(first, number):
        told = []
        batches = train_batches(
            damaged, plan_of(damaged), first, number, 0, 1, num_workers, lambda *a: told.append(a)
        )
        return list(batches), told

    whole, told = run(0, 6) if num_workers == 0 else run(2, 4)
    plan, broken = plan_of(damaged), damaged.records[2].image_id
    for step, skips in told:
        positions = [image.position for image in plan.batch(step - 1).images]
        assert [s.image_id for s in skips] == [broken] * positions.count(2)
    assert sum(len(skips) for _, skips in told) > 0
    if num_workers == 0:
        again, _ = run(2, 4)
        assert [s for s, _ in told] == [1, 2, 3, 4, 5, 6]
    else:
        again, _ = list(train_batches(damaged, plan_of(damaged), 2, 4, on_step=lambda *_: None)), 0
        whole = [None, None, *whole]
    for a, b in zip(whole[2:], again, strict=True):
        assert_equal(a[:6], b[:6])


SKIP = Skip(7, "a.jpg", 'it is "cut", sadly')


def test_what_was_skipped_is_listed_once_also_by_a_resumed_run(tmp_path):
    path = tmp_path / "skipped.csv"
    listed = SkippedImages(path, 0, 4)
    assert listed.summary() == [] and not path.exists()
    listed.add(1, [SKIP])
    listed.add(2, [])
    listed.add(3, [Skip(8, "b.jpg", "gone"), SKIP])
    lines = listed.add_evaluated([SKIP], 100)
    assert "1 of 100 images of the validation data cannot be used" in lines[0]
    with path.open("a") as file:
        file.write("4,train,9,c.j")  # the computer went down in the middle of a line
    resumed = SkippedImages(path, 2, 4)
    resumed.add(3, [Skip(8, "b.jpg", "gone"), SKIP])
    assert path.read_text().splitlines() == [
        "step,part,image_id,file,reason",
        '1,train,7,a.jpg,"it is ""cut"", sadly"',
        "3,train,8,b.jpg,gone",
        '3,train,7,a.jpg,"it is ""cut"", sadly"',
    ]
    first, *rest = resumed.summary()
    assert first.startswith("WARNING: 2 images could not be used, 3 times; listed in")
    assert rest == ["  train image 7: a.jpg", "  train image 8: b.jpg"]


def test_more_than_a_twentieth_of_the_last_thousand_images_stops_the_run(tmp_path):
    listed = SkippedImages(tmp_path / "skipped.csv", 0, 10)  # 1000 images are 100 steps
    for step in range(1, 51):
        listed.add(step, [SKIP])
    listed.add(101, [SKIP])  # the first is forgotten: 50 of 1000
    resumed = SkippedImages(tmp_path / "skipped.csv", 101, 10)
    with pytest.raises(ValueError, match=r"51 of 1000 images lately cannot be used, more than 5%"):
        resumed.add(101, [SKIP])
    assert len((tmp_path / "skipped.csv").read_text().splitlines()) == 1 + 52
    with pytest.raises(ValueError, match=r"2 of 39 images of the validation data"):
        listed.add_evaluated([SKIP, SKIP], 39)
    listed.add_evaluated([SKIP, SKIP], 40)


def test_a_run_that_reads_nothing_but_faulty_images_stops_at_once(tmp_path):
    listed = SkippedImages(tmp_path / "skipped.csv", 0, 4)
    listed.add(1, [SKIP] * 4)
    with pytest.raises(ValueError, match="8 of 8 images lately cannot be used"):
        listed.add(2, [SKIP] * 4)
    luckier = SkippedImages(tmp_path / "other.csv", 0, 4)
    for step in range(1, 13):
        luckier.add(step, [SKIP])  # a quarter of them: few images, of which some are broken


class FindsOneSquare:
    """A predictor that finds the left upper corner of every image."""

    num_together, eval_size = 2, (64, 64)
    protocol = ORIGINAL_PROTOCOL

    def __init__(self, dataset):
        self.class_names, self.given = dataset.class_names, []

    def prepare(self, image):
        return image.shape[:2]

    def start(self, items):
        self.given.append(len(items))
        return items

    def finish(self, pending):
        for height, width in pending:
            mask = np.zeros((1, width, height), np.uint8)
            mask[:, :4, :4] = 1
            chunks = iter([(mask, np.array([0.5], np.float32))])
            yield FoundInstances(np.array([0]), np.array([0]), chunks, (height, width))


def test_an_evaluation_counts_an_unreadable_image_as_one_without_detections(damaged):
    skips, predictor = [], FindsOneSquare(damaged)
    results, metrics = evaluate_dataset(predictor, damaged, skips=skips)
    ids = [record.image_id for record in damaged.records]
    assert [entry["image_id"] for entry in results] == [i for i in ids if i != ids[2]]
    assert [skip.image_id for skip in skips] == [ids[2]]
    assert metrics is not None and 0 <= metrics["AP"] < 1
    assert sorted(predictor.given) == [1, 1, 2]
    with pytest.raises(ValueError, match="cannot be read"):
        evaluate_dataset(FindsOneSquare(damaged), damaged)
