"""The numbers are those of pycocotools, to the last bit."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from benchmarks.evaluation import with_pycocotools
from sparseinst_jax.evaluation import average_precision
from sparseinst_jax.evaluation.average_precision import curves
from sparseinst_jax.evaluation.coco_entries import IdPlaces, read_annotations, read_detections
from sparseinst_jax.evaluation.coco_metrics import CLASS_METRIC_NAMES, METRIC_NAMES, evaluate
from sparseinst_jax.runner.run_lengths import encode_masks

HEIGHT, WIDTH = 120, 150
CATEGORIES = (90, 3, 17)  # not sorted
# Sides of squares; 32 and 96 lie on the borders between the sizes.
SIDES = (5, 31, 32, 33, 96, 97)
# So few that many are equal.
SCORES = (0.0, 0.25, 0.5, 0.5, 0.75, 1, 1e-9)


def draw_mask(rng):
    mask = np.zeros((1, HEIGHT, WIDTH), bool)
    y, x, side = 8 * rng.integers(0, 12), 8 * rng.integers(0, 12), rng.choice(SIDES)
    mask[0, y : y + side, x : x + side] = True
    return encode_masks(mask)[0]


def shifted(rle, by):
    mask = np.roll(coco_mask.decode(rle), by, axis=1)
    return encode_masks(mask[None])[0]


def draw(seed, num_images, most_objects, most_detections):
    """Squares, some of them crowd regions or with an area of their own; the last class is bare."""
    rng = np.random.default_rng(seed)
    image_ids = rng.permutation(100)[:num_images].tolist()
    annotations, results = [], []
    for image_id in image_ids:
        # Equal masks make equal IoUs.
        masks = [draw_mask(rng) for _ in range(4)]
        for _ in range(rng.integers(0, most_objects + 1)):
            rle = masks[rng.integers(4)]
            area = rng.choice([float(coco_mask.area(rle)), 1024.0, 9216.0, 2e10])
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image_id, "segmentation": rle}
                | {"category_id": int(rng.choice(CATEGORIES[:2])), "area": float(area)}
                | {"iscrowd": int(rng.random() < 0.2)}
            )
        for _ in range(rng.integers(0, most_detections + 1)):
            results.append(
                {"image_id": image_id, "category_id": int(rng.choice(CATEGORIES))}
                | {"segmentation": shifted(masks[rng.integers(4)], rng.integers(0, 9))}
                | {"score": float(rng.choice(SCORES)) if rng.random() < 0.8 else rng.random()}
            )
    content = {
        "images": [{"id": i, "height": HEIGHT, "width": WIDTH} for i in image_ids],
        "categories": [{"id": i, "name": f"class {i}"} for i in CATEGORIES],
        "annotations": annotations,
    }
    return content, results


def assert_equal_to_pycocotools(content, results):
    places = IdPlaces(content)
    own = curves(
        read_annotations(content, places), read_detections(results, places), len(CATEGORIES)
    )
    reference = with_pycocotools(content, [dict(entry) for entry in results])
    np.testing.assert_array_equal(own.precision, reference.eval["precision"][..., -1])
    np.testing.assert_array_equal(own.recall, reference.eval["recall"])
    metrics = evaluate(content, results)
    assert [metrics[name] for name in METRIC_NAMES] == reference.stats.tolist()
    precision = reference.eval["precision"][:, :, :, 0, -1]
    np.testing.assert_array_equal(metrics.precision, precision)
    for place, category_id in enumerate(sorted(CATEGORIES)):
        entry = metrics.per_class[f"class {category_id}"]
        assert entry["instances"] == sum(
            a["category_id"] == category_id and not a["iscrowd"] for a in content["annotations"]
        )
        if entry["instances"]:
            assert entry["AP"] == precision[:, :, place].mean()
            assert entry["AR100"] == reference.eval["recall"][:, place, 0, -1].mean()
        else:
            assert all(entry[name] == -1 for name in CLASS_METRIC_NAMES)
    return metrics


@pytest.mark.parametrize("seed", range(12))
def test_crowds_equal_scores_and_empty_images_give_pycocotools_numbers(seed):
    content, results = draw(seed, num_images=5, most_objects=7, most_detections=25)
    metrics = assert_equal_to_pycocotools(content, results)
    assert 0 < metrics["AP"] < 1


def test_of_more_than_a_hundred_detections_the_surest_count():
    content, results = draw(1, num_images=2, most_objects=30, most_detections=0)
    rng = np.random.default_rng(2)
    every = [entry["segmentation"] for entry in content["annotations"]]
    results = [
        {"image_id": entry["image_id"], "category_id": 3, "score": float(rng.choice(SCORES))}
        | {"segmentation": every[rng.integers(len(every))]}
        for entry in content["annotations"][:1] * 140
    ]
    metrics = assert_equal_to_pycocotools(content, results)
    assert metrics != evaluate(content, sorted(results, key=lambda entry: entry["score"])[:100])


def test_no_detections_at_all_give_pycocotools_numbers():
    content, _ = draw(3, num_images=3, most_objects=4, most_detections=0)
    assert assert_equal_to_pycocotools(content, [])["AP"] == 0.0


def test_small_steps_of_the_matching_give_the_same_numbers(monkeypatch):
    content, results = draw(4, num_images=8, most_objects=9, most_detections=30)
    expected = evaluate(content, results)
    monkeypatch.setattr(average_precision, "MAX_CELLS", 1)  # one pair at a time
    assert evaluate(content, results) == expected


def test_the_order_of_equal_scores_is_that_of_the_results():
    square = np.zeros((2, HEIGHT, WIDTH), bool)
    square[0, :40, :40], square[1, 60:100, 60:100] = True, True
    right, wrong = encode_masks(square)
    content = {
        "images": [{"id": 1, "height": HEIGHT, "width": WIDTH}],
        "categories": [{"id": i, "name": f"class {i}"} for i in CATEGORIES],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 3, "segmentation": right, "area": 1600}
            | {"iscrowd": 0}
        ],
    }
    results = [
        {"image_id": 1, "category_id": 3, "segmentation": mask, "score": 0.5}
        for mask in (right, wrong)
    ]
    assert assert_equal_to_pycocotools(content, results)["AP"] == pytest.approx(1.0)
    assert assert_equal_to_pycocotools(content, results[::-1])["AP"] == pytest.approx(0.5)
