"""Objects found, confused, missed and false detections of small images, counted by hand."""

import csv

import numpy as np
import pytest
from PIL import Image

from sparseinst_jax.data.coco import Annotation, CocoDataset, ImageRecord, encode_segmentation
from sparseinst_jax.evaluation import report
from sparseinst_jax.evaluation.coco_metrics import evaluate
from sparseinst_jax.evaluation.errors import (
    ImageErrors,
    confusion_matrix,
    find_errors,
    worst_images,
)

HEIGHT, WIDTH = 60, 100
CAT, DOG, COW = 3, 7, 9


def square(x, y, side=20):
    return [[x, y, x + side, y, x + side, y + side, x, y + side]]


def record(image_id, *objects):
    """Make an image with (label, x, y) squares; a fourth value of 1 makes a crowd region."""
    annotations = [
        Annotation(label, square(x, y), bool(crowd), 400.0, number)
        for number, (label, x, y, *crowd) in enumerate(objects, start=100 * image_id)
    ]
    return ImageRecord(image_id, f"{image_id}.png", None, HEIGHT, WIDTH, annotations)


def dataset_of(*records):
    names, ids = ("cat", "dog", "cow"), (CAT, DOG, COW)
    return CocoDataset(list(records), names, ids, True, "val.json")


def found(image_id, category_id, score, x, y, side=20):
    mask = encode_segmentation(square(x, y, side), HEIGHT, WIDTH)
    return {
        "image_id": image_id,
        "category_id": category_id,
        "score": score,
        "segmentation": {**mask, "counts": mask["counts"].decode()},
    }


def test_the_confusion_matrix_of_five_objects():
    dataset = dataset_of(
        record(1, (0, 0, 0), (0, 30, 0), (1, 60, 0), (2, 0, 30)),
        record(2, (1, 30, 30)),
    )
    results = [
        found(1, CAT, 0.9, 0, 0),  # right
        found(1, CAT, 0.8, 0, 2),  # the same cat again: false
        found(1, DOG, 0.7, 30, 2),  # a cat taken for a dog
        found(1, DOG, 0.6, 60, 15),  # IoU 5/35 with the dog: false, and the dog is missed
        found(1, COW, 0.3, 0, 30),  # below the threshold: the cow is missed
        found(2, DOG, 0.5, 30, 30),  # exactly at the threshold: right
    ]
    counts = confusion_matrix(find_errors(dataset, results, 0.5), 3)
    np.testing.assert_array_equal(
        counts,
        [
            [1, 1, 0, 0],  # cats: one found, one taken for a dog
            [0, 1, 0, 1],  # dogs: one found, one missed
            [0, 0, 0, 1],  # cows
            [1, 1, 0, 0],  # false positives
        ],
    )


def test_a_detection_takes_its_own_class_before_a_better_fitting_other_one():
    # A cat and a dog lie 4 columns apart (IoU 2/3); the cat detection fits the dog exactly.
    dataset = dataset_of(record(1, (0, 4, 0), (1, 0, 0)))
    (image,) = find_errors(dataset, [found(1, CAT, 0.9, 0, 0)], 0.1)
    assert (image.found, image.confused, image.false, image.missed) == (((0, 0),), (), (), (1,))


def test_the_surer_detection_chooses_first_and_the_best_free_object():
    # Objects 4 columns apart; the surer one fits the second, the other one has to take the first.
    dataset = dataset_of(record(1, (0, 0, 0), (0, 4, 0)))
    results = [found(1, CAT, 0.5, 3, 0), found(1, CAT, 0.9, 4, 0)]
    (image,) = find_errors(dataset, results, 0.1)
    assert [entry["score"] for entry in image.detections] == [0.9, 0.5]
    assert image.found == ((0, 1), (1, 0))


def test_detections_in_a_crowd_of_their_class_are_dropped_and_others_are_not():
    dataset = dataset_of(record(1, (0, 0, 0, 1), (1, 60, 30)))
    results = [
        found(1, CAT, 0.9, 0, 0, 10),  # inside the crowd: IoU 1/4, but all of it lies inside
        found(1, CAT, 0.8, 15, 0),  # a quarter of it lies inside: false
        found(1, DOG, 0.7, 0, 0),  # a crowd of another class: false
        found(1, CAT, 0.6, 60, 30),  # a dog taken for a cat
    ]
    (image,) = find_errors(dataset, results, 0.1)
    assert image.false == (1, 2) and image.confused == ((3, 0),) and image.missed == ()
    counts = confusion_matrix([image], 3)
    assert counts[3].tolist() == [1, 1, 0, 0] and counts[1].tolist() == [1, 0, 0, 0]
    assert counts[0].sum() == 0  # the crowd region is no object


def test_the_diagonal_is_what_coco_counts_as_true_at_iou_one_half(rng):
    """With all scores counted, found / objects is COCO's recall at IoU 0.5 (here: AR of it)."""
    records, results = [], []
    for image_id in range(1, 7):
        cells = [(x, y) for x in range(0, 80, 25) for y in (0, 30)]
        records.append(record(image_id, *((int(rng.integers(3)), x, y) for x, y in cells)))
        for x, y in cells:
            category, dx = int(rng.choice([CAT, DOG, COW])), int(rng.integers(0, 12))
            results.append(found(image_id, category, float(rng.random()), x + dx, y))
    dataset = dataset_of(*records)
    content = {
        "images": [{"id": r.image_id, "height": HEIGHT, "width": WIDTH} for r in records],
        "categories": [{"id": i, "name": str(i)} for i in (CAT, DOG, COW)],
        "annotations": [
            {
                "id": a.id,
                "image_id": r.image_id,
                "category_id": (CAT, DOG, COW)[a.label],
                "segmentation": a.segmentation,
            }
            for r in records
            for a in r.annotations
        ],
    }
    metrics = evaluate(content, results)
    # The precision is above 0 up to the recall that is reached.
    reached = [np.count_nonzero(metrics.precision[0, :, label]) for label in range(3)]
    counts = confusion_matrix(find_errors(dataset, results, 0.0), 3)
    for label in range(3):
        recall = counts[label, label] / counts[label].sum()
        assert reached[label] == np.floor(recall * 100 + 1e-9) + 1


def test_worst_images_come_first_and_flawless_ones_never():
    dataset = dataset_of(
        record(1, (0, 0, 0)),  # found
        record(2, (0, 0, 0), (1, 30, 0)),  # both missed: 2 errors
        record(3, (0, 0, 0)),  # taken for a dog: a miss and a false positive, 2 errors
        record(4, (0, 0, 0), (0, 30, 0)),  # 1 found, 1 missed, 2 false: 3 errors
        record(5, (0, 0, 0), (0, 30, 0), (0, 60, 0)),  # 1 found, 2 missed: 2 errors
    )
    results = [
        found(1, CAT, 0.9, 0, 0),
        found(3, DOG, 0.9, 0, 0),
        found(4, CAT, 0.9, 0, 0),
        found(4, COW, 0.9, 70, 30),
        found(4, COW, 0.8, 60, 30),
        found(5, CAT, 0.9, 30, 0),
    ]
    errors = find_errors(dataset, results, 0.4)
    assert [image.num_errors for image in errors] == [0, 2, 2, 3, 2]
    order = [image.record.image_id for image in worst_images(errors, 10)]
    assert order == [4, 2, 3, 5]  # of equal numbers, those with the least found first
    assert [image.record.image_id for image in worst_images(errors, 2)] == [4, 2]


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


@pytest.fixture
def scored():
    """One cat found exactly, one with IoU 0.6, a dog missed; no cow."""
    dataset = dataset_of(record(1, (0, 0, 0), (0, 60, 0), (1, 0, 30)))
    content = {
        "images": [{"id": 1, "height": HEIGHT, "width": WIDTH}],
        "categories": [
            {"id": CAT, "name": 'cat, "tabby"'},
            {"id": DOG, "name": "dog"},
            {"id": COW, "name": "cow"},
        ],
        "annotations": [
            {
                "id": a.id,
                "image_id": 1,
                "category_id": (CAT, DOG, COW)[a.label],
                "segmentation": a.segmentation,
            }
            for a in dataset.records[0].annotations
        ],
    }
    results = [found(1, CAT, 0.9, 0, 0), found(1, CAT, 0.8, 65, 0)]  # the second: IoU 15/25
    return dataset, results, evaluate(content, results)


def test_the_class_table_holds_fractions_and_nothing_where_nothing_is_defined(scored, tmp_path):
    report.write_class_table(scored[2], tmp_path / "new" / "per_class.csv")
    heads, cat, dog, cow = read_csv(tmp_path / "new" / "per_class.csv")
    assert heads == "class category_id instances AP AP50 AP75 APs APm APl AR100".split()
    assert cat[:3] == ['cat, "tabby"', "3", "2"]
    # IoU 0.6 counts at 0.50, 0.55 and 0.60; at the seven others recall 1/2: 51 of 101 recalls.
    expected = (3 + 7 * 51 / 101) / 10
    assert [float(cell) for cell in cat[3:7]] == pytest.approx([expected, 1, 51 / 101, expected])
    assert cat[7:9] == ["", ""] and float(cat[9]) == pytest.approx((3 + 7 * 0.5) / 10)
    assert dog == ["dog", "7", "1", *["0.000000"] * 4, "", "", "0.000000"]
    assert cow == ["cow", "9", "0", *[""] * 7]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["per_class.csv"]


def test_curves_are_means_over_classes_and_thresholds(scored):
    metrics = scored[2]
    curves = report.mean_precision(metrics.precision[:, :, [0]])
    np.testing.assert_allclose(curves["AP50"], [1.0] * 101)
    np.testing.assert_allclose(curves["AP75"], [1.0] * 51 + [0.0] * 50)
    np.testing.assert_allclose(curves["AP"], [1.0] * 51 + [0.3] * 50)
    both = report.mean_precision(metrics.precision[:, :, [0, 1]])  # of the dog nothing is found
    np.testing.assert_allclose(both["AP75"], [0.5] * 51 + [0.0] * 50)
    assert both["AP"].mean() == pytest.approx(metrics["AP"])


def test_tables_of_the_confusion_and_of_the_images(scored, tmp_path):
    dataset, results, _ = scored
    errors = find_errors(dataset, results, 0.85)
    counts = confusion_matrix(errors, 3)
    report.write_confusion_table(counts, dataset.class_names, tmp_path / "m.csv")
    assert read_csv(tmp_path / "m.csv") == [
        ["annotated \\ predicted", "cat", "dog", "cow", "background"],
        ["cat", "1", "0", "0", "1"],
        ["dog", "0", "0", "0", "1"],
        ["cow", "0", "0", "0", "0"],
        ["background", "0", "0", "0", "0"],
    ]
    report.write_image_table(errors, tmp_path / "i.csv")
    heads, row = read_csv(tmp_path / "i.csv")
    assert dict(zip(heads, row, strict=True)) == {
        "file_name": "1.png",
        "image_id": "1",
        "objects": "3",
        "found": "1",
        "wrong_class": "0",
        "false_positives": "0",
        "missed": "2",
        "errors": "2",
    }


def test_of_very_many_classes_the_most_confused_are_drawn_and_no_count_is_lost():
    counts = np.diag(np.full(301, 5))
    counts[-1, -1] = 0
    counts[250, 260], counts[7, -1], counts[-1, 8] = 3, 2, 1
    merged, chosen, num_others = report._merged(counts)
    assert merged.shape == (101, 101) and len(chosen) == 99 and num_others == 201
    assert {7, 8, 250, 260} <= set(chosen)
    assert merged.sum() == counts.sum()
    assert merged[chosen.index(250), chosen.index(260)] == 3
    assert merged[chosen.index(7), -1] == 2 and merged[-1, chosen.index(8)] == 1
    assert merged[-2, -2] == 201 * 5  # the others with one another


def test_charts_are_written_for_any_class_names(scored, tmp_path):
    dataset, results, metrics = scored
    counts = confusion_matrix(find_errors(dataset, results, 0.5), 3)
    names = ["кошка\n苹果", "", "x" * 300]
    report.draw_confusion(counts, names, dataset.category_ids, 0.5, tmp_path / "m.png")
    report.draw_precision_recall(metrics, tmp_path / "p.png")
    assert Image.open(tmp_path / "m.png").width < 900
    assert 800 < Image.open(tmp_path / "p.png").width < 950


def test_many_false_positives_leave_the_photo_and_the_labels_readable():
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 400, (60, 2)).tolist()
    squares = [[[x, y, x + 60, y, x + 60, y + 60, x, y + 60]] for x, y in corners]
    detections = tuple(
        {"segmentation": square, "score": 0.4 + 0.01 * place}
        for place, square in enumerate(squares)
    )
    record = ImageRecord(5, "a.png", None, 480, 640, [])
    errors = ImageErrors(record, detections, (0,) * 60, (), (), tuple(range(60)), ())
    white = np.full((480, 640, 3), 255, np.uint8)
    pixels = np.asarray(report.draw_errors(white, errors, ("cat",)))[:, :640]
    red = np.array((213, 94, 0))
    solid = (pixels == red).all(axis=2).sum() / (480 * 640)  # outlines and labels
    once = (np.abs(pixels - (0.55 * 255 + 0.45 * red)) <= 1).all(axis=2).sum() / (480 * 640)
    assert solid < 0.2 and once > 0.25, "what lies below several masks is tinted once"
