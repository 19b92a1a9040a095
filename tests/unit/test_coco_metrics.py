"""COCO numbers of small cases worked out by hand."""

import copy
import json

import numpy as np
import pytest

from sparseinst_jax.evaluation.coco_metrics import CLASS_METRIC_NAMES, METRIC_NAMES, evaluate
from sparseinst_jax.runner.prediction import coco_results
from sparseinst_jax.runner.run_lengths import encode_masks

HEIGHT, WIDTH = 200, 220


def rectangle(x, y, width, height):
    mask = np.zeros((1, HEIGHT, WIDTH), bool)
    mask[0, y : y + height, x : x + width] = True
    return encode_masks(mask)[0]


def polygon(x, y, width, height):
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def annotations_of(*boxes, first_id=1):
    """Give a json of one image with one rectangle for each (category id, x, y, width, height)."""
    return {
        "images": [{"id": 7, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}],
        "categories": [{"id": 3, "name": "square"}, {"id": 90, "name": "bar"}],
        "annotations": [
            {
                "id": number,
                "image_id": 7,
                "category_id": category_id,
                "segmentation": polygon(*box),
                "area": box[2] * box[3],
                "bbox": list(box),
                "iscrowd": 0,
            }
            for number, (category_id, *box) in enumerate(boxes, start=first_id)
        ],
    }


def detection(category_id, score, *box, image_id=7):
    return {
        "image_id": image_id,
        "category_id": category_id,
        "score": score,
        "segmentation": rectangle(*box),
    }


def test_truth_given_back_as_detections_scores_one():
    truth = annotations_of((3, 10, 10, 40, 40), (90, 100, 20, 100, 120))
    metrics = evaluate(
        truth, [detection(3, 0.9, 10, 10, 40, 40), detection(90, 0.8, 100, 20, 100, 120)]
    )
    for name in ("AP", "AP50", "AP75", "APm", "APl", "AR1", "AR100"):
        assert metrics[name] == pytest.approx(1.0)
    assert metrics["APs"] == -1.0  # no such object
    assert metrics.per_class["bar"] == pytest.approx(
        {"category_id": 90, "instances": 1, "AP": 1.0, "AP50": 1.0, "AP75": 1.0, "AR100": 1.0}
        | {"APs": -1.0, "APm": -1.0, "APl": 1.0}  # 100 x 120 pixels
    )


def test_one_found_one_missed_and_one_false_detection():
    # Two squares. Scores: false 0.9, right 0.8, so the precision is 1/2 up to recall 1/2 (51 of
    # the 101 recalls) and 0 beyond.
    truth = annotations_of((3, 10, 10, 40, 40), (3, 100, 100, 40, 40))
    false, right = detection(3, 0.9, 60, 10, 30, 30), detection(3, 0.8, 10, 10, 40, 40)
    metrics = evaluate(truth, [false, right])
    assert metrics["AP"] == pytest.approx(0.5 * 51 / 101)
    assert metrics["AP50"] == pytest.approx(0.5 * 51 / 101)
    assert metrics["AR1"] == 0.0  # the surest detection is the false one
    assert metrics["AR100"] == pytest.approx(0.5)
    right_first = evaluate(truth, [false, {**right, "score": 0.95}])
    assert right_first["AP"] == pytest.approx(51 / 101)
    assert right_first["AR1"] == pytest.approx(0.5)


def test_average_over_ten_overlaps():
    # 31 of 50 columns: IoU 0.62 counts at 0.50, 0.55 and 0.60.
    metrics = evaluate(annotations_of((3, 0, 0, 50, 40)), [detection(3, 0.5, 0, 0, 31, 40)])
    assert metrics["AP"] == pytest.approx(0.3)
    assert metrics["AP50"] == pytest.approx(1.0)
    assert metrics["AP75"] == 0.0
    square, bar = metrics.per_class["square"], metrics.per_class["bar"]
    assert (square["AP"], square["AP50"], square["AP75"]) == pytest.approx((0.3, 1.0, 0.0))
    assert (square["APm"], square["AR100"]) == pytest.approx((0.3, 0.3))
    assert square["instances"] == 1 and bar["instances"] == 0
    assert all(bar[name] == -1.0 for name in CLASS_METRIC_NAMES)


def test_no_detections_score_zero():
    metrics = evaluate(annotations_of((3, 10, 10, 40, 40)), [])
    assert metrics["AP"] == metrics["AP50"] == metrics["AR100"] == 0.0
    assert metrics.per_class["square"]["AP"] == 0.0


def test_areas_are_those_of_the_masks_not_of_given_boxes():
    # A false detection of medium size: with the area of its own box it would count as large and
    # be left out of APm.
    truth = annotations_of((3, 10, 10, 40, 40))
    false = detection(3, 0.9, 100, 100, 40, 40) | {"bbox": [0, 0, 120, 120], "area": 14400.0}
    metrics = evaluate(truth, [false, detection(3, 0.8, 10, 10, 40, 40)])
    assert metrics["APm"] == pytest.approx(0.5)


def test_an_annotation_with_the_id_zero_is_matched():
    truth = annotations_of((3, 10, 10, 40, 40), first_id=0)
    assert evaluate(truth, [detection(3, 0.9, 10, 10, 40, 40)])["AP"] == pytest.approx(1.0)


def test_annotations_without_area_and_crowd_flag_are_scored():
    truth = annotations_of((3, 10, 10, 40, 40))
    del truth["annotations"][0]["area"], truth["annotations"][0]["iscrowd"]
    assert evaluate(truth, [detection(3, 0.9, 10, 10, 40, 40)])["APm"] == pytest.approx(1.0)


def test_polygons_and_uncompressed_runs_are_read_as_detections():
    truth = annotations_of((3, 10, 10, 40, 40), (90, 0, 0, 1, 50))
    runs = {"size": [HEIGHT, WIDTH], "counts": [0, 50, HEIGHT * WIDTH - 50]}
    found = [
        detection(3, 0.9, 0, 0, 1, 1) | {"segmentation": polygon(10, 10, 40, 40)},
        detection(90, 0.9, 0, 0, 1, 1) | {"segmentation": runs},
    ]
    assert evaluate(truth, found)["AP"] == pytest.approx(1.0)


def test_files_are_read_arguments_are_left_alone_and_nothing_is_printed(tmp_path, capfd):
    truth, found = annotations_of((3, 10, 10, 40, 40)), [detection(3, 0.9, 10, 10, 40, 40)]
    before = copy.deepcopy((truth, found))
    metrics = evaluate(truth, found)
    assert (truth, found) == before
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "found.json").write_text(json.dumps(found))
    from_files = evaluate(tmp_path / "truth.json", str(tmp_path / "found.json"))
    assert from_files == metrics
    assert capfd.readouterr().out == ""
    content = json.loads(json.dumps(metrics.as_dict()))
    assert list(content) == [*METRIC_NAMES, "per_class"]


def test_table_shows_percent_and_a_dash_for_what_is_not_defined():
    metrics = evaluate(annotations_of((3, 0, 0, 50, 40)), [detection(3, 0.5, 0, 0, 31, 40)])
    lines = [line.split() for line in metrics.table().splitlines()]
    assert ["AP", "30.0"] in [line[:2] for line in lines]
    assert ["APs", "-"] in [line[:2] for line in lines]
    assert ["class", "objects", *CLASS_METRIC_NAMES] in lines
    assert ["square", "1", "30.0", "100.0", "0.0", "-", "30.0", "-", "30.0"] in lines
    assert ["bar", "0", *"-------"] in lines


def test_every_detection_that_does_not_fit_is_named_at_once():
    found = [
        detection(3, 0.5, 0, 0, 9, 9, image_id=8),
        detection(3, 0.5, 0, 0, 9, 9) | {"segmentation": {"size": [5, 5], "counts": "0T1"}},
        {"image_id": 7, "category_id": 3, "bbox": [0, 0, 1, 1], "score": 0.1},
    ]
    with pytest.raises(ValueError, match="3 of 3 detections") as error:
        evaluate(annotations_of((3, 10, 10, 40, 40)), found)
    for part in ("image 8, not in the json", "(5, 5)", "lacks segmentation"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"score": "0.5"}, "detection 0 has the score '0.5', not a number"),
        ({"score": float("nan")}, "detection 0 has the score nan, not a number"),
        ({"image_id": "7"}, "detection 0 has the image_id '7', not an integer"),
        ({"category_id": [3]}, r"detection 0 has the category_id \[3\], not an integer"),
        ({"segmentation": None}, "neither run lengths nor polygons"),
        ({"segmentation": {"size": [200, 220]}}, "mask that cannot be read"),
        ({"segmentation": [["x"] * 6]}, "mask that cannot be read"),
    ],
)
def test_a_detection_that_cannot_be_read_is_told_in_words(change, message):
    found = detection(3, 0.5, 0, 0, 9, 9) | change
    with pytest.raises(ValueError, match=rf"1 of 2 detections[\s\S]*{message}"):
        evaluate(annotations_of((3, 10, 10, 40, 40)), [found, detection(3, 0.5, 0, 0, 9, 9)])
    with pytest.raises(ValueError, match="detection 1 is a str, not an object"):
        evaluate(annotations_of((3, 10, 10, 40, 40)), [detection(3, 0.5, 0, 0, 9, 9), "x"])


def test_lists_without_annotations_and_wrong_files_are_refused(tmp_path):
    truth = annotations_of((3, 10, 10, 40, 40))
    with pytest.raises(ValueError, match="can be predicted but not scored"):
        evaluate({**truth, "annotations": []}, [])
    with pytest.raises(ValueError, match="is it an annotation file"):
        evaluate(truth, truth)
    with pytest.raises(FileNotFoundError, match=r"json file .*missing\.json does not exist"):
        evaluate(tmp_path / "missing.json", [])
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="ends in the middle"):
        evaluate(tmp_path / "broken.json", [])


def test_results_leave_out_classes_without_a_category():
    rles = [rectangle(0, 0, 5, 5), rectangle(1, 1, 5, 5)]
    entries = coco_results(7, rles, np.float32([0.5, 0.25]), np.array([1, 0]), [None, 90])
    assert entries == [{"image_id": 7, "category_id": 90, "segmentation": rles[0], "score": 0.5}]


def test_a_results_file_that_covers_few_images_says_so(tmp_path, caplog):
    truth = annotations_of((3, 10, 10, 40, 40))
    for image_id in (8, 9, 10):
        truth["images"].append({**truth["images"][0], "id": image_id})
        truth["annotations"].append(
            {**truth["annotations"][0], "id": image_id, "image_id": image_id}
        )
    truth["images"].append({**truth["images"][0], "id": 11})  # without an object: nothing is missed
    (tmp_path / "found.json").write_text(json.dumps([detection(3, 0.9, 10, 10, 40, 40)]))
    evaluate(truth, tmp_path / "found.json")
    (line,) = caplog.messages
    assert line.startswith(
        f"{tmp_path / 'found.json'} has detections in 1 of the 4 images with objects; all objects "
        "of the other 3 (image ids 8, 9, 10) count as missed"
    )
    caplog.clear()
    evaluate(truth, [])  # what a model has found is no file
    assert caplog.messages == []


def test_sizes_of_detections_are_those_of_masks_and_the_table_says_so():
    found = detection(3, 0.9, 10, 10, 40, 40) | {"bbox": [0, 0, 200, 200], "area": 4e4}
    metrics = evaluate(annotations_of((3, 10, 10, 40, 40)), [found])
    assert (metrics["APm"], metrics["APl"]) == (pytest.approx(1.0), -1)
    assert "the pixels of a detection's mask" in metrics.table().splitlines()[-1]


def test_what_cannot_be_scored_names_its_file(tmp_path):
    truth = annotations_of((3, 10, 10, 40, 40))
    found = detection(3, 0.9, 10, 10, 40, 40) | {"segmentation": [[1, 2]]}
    (tmp_path / "found.json").write_text(json.dumps([found]))
    with pytest.raises(ValueError, match=r"found\.json: 1 of 1 detections do not fit"):
        evaluate(truth, tmp_path / "found.json")
    truth["annotations"][0]["segmentation"] = [[0, 0, 9e9, 0, 9, 9]]
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    with pytest.raises(
        ValueError, match=r"truth\.json: 1 of 1 .*\n +annotation 1 \(a\.png\) has a"
    ):
        evaluate(tmp_path / "truth.json", [])
