"""Choosing, merging and renaming classes, from the json to the AP."""

import json

import numpy as np
import pytest
from PIL import Image

from sparseinst_jax.cli import eval as eval_command
from sparseinst_jax.data.classes import choose_classes, map_categories
from sparseinst_jax.data.coco import decode_mask, load_coco
from sparseinst_jax.data.rules import ORIGINAL_PROTOCOL
from sparseinst_jax.evaluation.coco_metrics import evaluate
from sparseinst_jax.evaluation.evaluator import evaluate_dataset, match_categories
from sparseinst_jax.runner.predictor import FoundInstances
from sparseinst_jax.setup import datasets
from sparseinst_jax.setup.config import load_config
from sparseinst_jax.setup.loading import choose_known_classes

CATEGORIES = {2: "bus", 3: "car", 5: "van", 7: "ped", 9: "cat"}


def names_and_ids(*arguments, **options):
    chosen = choose_classes(CATEGORIES, *arguments, **options)
    return dict(zip(chosen.names, chosen.category_ids, strict=True)), chosen.kept_id


def test_without_a_choice_every_class_stays_in_the_order_of_its_id():
    names, kept = names_and_ids()
    assert list(names.items()) == [("bus", 2), ("car", 3), ("van", 5), ("ped", 7), ("cat", 9)]
    assert kept == {2: 2, 3: 3, 5: 5, 7: 7, 9: 9}


def test_the_labels_of_chosen_classes_follow_the_json_and_not_the_choice():
    names, kept = names_and_ids(("cat", "car"))
    assert list(names.items()) == [("car", 3), ("cat", 9)]
    assert kept == {2: None, 3: 3, 5: None, 7: None, 9: 9}


def test_a_merged_class_has_the_id_of_the_category_that_bears_its_name():
    names, kept = names_and_ids((), ("bus=car", "van=car"))
    assert list(names.items()) == [("car", 3), ("ped", 7), ("cat", 9)]
    assert kept == {2: 3, 3: 3, 5: 3, 7: 7, 9: 9}


def test_a_merged_class_of_a_new_name_has_the_smallest_id_of_its_members():
    names, kept = names_and_ids(("vehicle",), ("van=vehicle", "car=vehicle", "ped=person"))
    assert names == {"vehicle": 3}
    assert kept == {2: None, 3: 3, 5: 3, 7: None, 9: None}


def test_classes_are_left_out_by_name_after_they_are_merged():
    names, kept = names_and_ids((), ("van=car",), ("car", "ped"))
    assert names == {"bus": 2, "cat": 9}
    assert kept == {2: 2, 3: None, 5: None, 7: None, 9: 9}
    with pytest.raises(ValueError, match=r"exclude_classes: there is no class 'Car'; did you mean"):
        choose_classes(CATEGORIES, exclude=("Car",))
    with pytest.raises(ValueError, match="none but those excluded"):
        choose_classes({1: "cat"}, exclude=("cat",))


def test_a_choice_that_a_model_was_trained_with_is_not_made_twice():
    data = {"classes": (), "class_map": ("ped=cat", "cat=ped"), "exclude_classes": ()}
    names, ids = ("ped", "cat"), (7, 9)
    assert choose_known_classes(names, ids, data, data) == (["ped", "cat"], [7, 9])
    assert choose_known_classes(names, ids, data, {}) == (["cat", "ped"], [7, 9])


def test_names_are_exchanged_all_at_once():
    names, _ = names_and_ids(("ped", "cat"), ("ped=cat", "cat=ped"))
    assert names == {"cat": 7, "ped": 9}


def test_every_wrong_name_is_told_in_one_message_with_what_was_meant():
    with pytest.raises(ValueError) as error:
        choose_classes(
            CATEGORIES,
            ("Cat", "bus", "dog"),
            ("vam=car", "bus=car", "bus=cat", "car"),
            path="a.json",
        )
    assert str(error.value).splitlines() == [
        "the classes of a.json cannot be chosen:",
        "  config.data.class_map: there is no class 'vam'; did you mean 'van'?",
        "  config.data.class_map: 'bus' occurs more than once",
        "  config.data.class_map: expected \"old=new\", got 'car'",
        "  config.data.classes: there is no class 'Cat'; did you mean 'cat'?",
        "  config.data.classes: 'bus' is called 'car' by config.data.class_map; give that",
        "  config.data.classes: there is no class 'dog'; the classes: 'car', 'cat', 'ped', 'van'",
    ]


def test_a_validation_json_may_lack_classes_but_not_all():
    names, _ = names_and_ids(("dog", "cat"), ("lorry=dog",), all_known=False)
    assert names == {"cat": 9}
    with pytest.raises(ValueError, match=r"none of \['dog'\] is among 'bus', 'car'"):
        choose_classes(CATEGORIES, ("dog",), all_known=False)


def test_classes_called_by_numbers_can_be_chosen():
    # The command line reads 1 as a number.
    assert choose_classes({4: "1", 6: "2"}, (2,)).names == ("2",)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("cat,traffic light", ("cat", "traffic light")),
        ("cat", ("cat",)),
        ('("cat", "a,b")', ("cat", "a,b")),
        ("van=car,bus=car", ("van=car", "bus=car")),
        ("()", ()),
    ],
)
def test_the_command_line_takes_names_with_commas_between(text, value):
    config = load_config({"data": {"classes": ()}}, {"data.classes": text})
    assert config.data.classes == value


def _square(x, y, side):
    return [[x, y, x + side, y, x + side, y + side, x, y + side]]


@pytest.fixture
def folder(tmp_path):
    """Two images; the pixel in the corner is the image's id."""
    squares = [  # annotation id, image, category, x, y, side
        (1, 1, 2, 2, 2, 10),
        (2, 1, 3, 20, 4, 8),
        (3, 1, 9, 4, 20, 12),
        (4, 2, 5, 6, 6, 14),
        (5, 2, 7, 24, 24, 9),
    ]
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 40, "width": 48} for i in (1, 2)],
        "categories": [{"id": i, "name": name} for i, name in CATEGORIES.items()],
        "annotations": [
            {
                "id": i,
                "image_id": image,
                "category_id": category,
                "segmentation": _square(x, y, side),
                "area": side**2,
                "iscrowd": 0,
            }
            for i, image, category, x, y, side in squares
        ],
    }
    (tmp_path / "val.json").write_text(json.dumps(content))
    for i in (1, 2):
        Image.fromarray(np.full((40, 48, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
    return tmp_path


class Oracle:
    """Predicts the annotations of a data set."""

    eval_size, batch_size, num_together = (40, 48), 1, 1
    protocol = ORIGINAL_PROTOCOL

    def __init__(self, dataset):
        self.class_names = dataset.class_names
        self.records = {record.image_id: record for record in dataset.records}

    def prepare(self, image):
        return self.records[int(image[0, 0, 0])]

    def start(self, items):
        return items

    def finish(self, pending):
        for record in pending:
            masks = [decode_mask(a.segmentation, 40, 48).T for a in record.annotations]
            labels = np.array([a.label for a in record.annotations])
            masks = np.array(masks, np.uint8).reshape(-1, 48, 40)
            scores = np.linspace(1, 0.5, len(labels))
            yield FoundInstances(labels, labels, iter([(masks, scores)]), (40, 48))


@pytest.mark.parametrize(
    ("classes", "class_map", "expected"),
    [
        ((), (), ("bus", "car", "van", "ped", "cat")),
        ((), ("van=car", "bus=car"), ("car", "ped", "cat")),
        (("vehicle", "cat"), ("van=vehicle", "bus=vehicle"), ("vehicle", "cat")),
        (("person",), ("ped=person",), ("person",)),
    ],
)
def test_the_annotations_as_predictions_have_ap_1_under_every_choice(
    folder, classes, class_map, expected
):
    dataset = load_coco(folder / "val.json", folder, classes=classes, class_map=class_map)
    assert dataset.class_names == expected
    results, metrics = evaluate_dataset(Oracle(dataset), dataset)
    assert {entry["category_id"] for entry in results} == set(dataset.category_ids)
    assert metrics is not None
    assert metrics["AP"] == pytest.approx(1) and metrics["AR100"] == pytest.approx(1)
    assert {name: value["AP"] for name, value in metrics.per_class.items()} == pytest.approx(
        dict.fromkeys(expected, 1.0)
    )


def test_results_with_the_jsons_own_ids_are_mapped_like_the_annotations(folder):
    dataset = load_coco(folder / "val.json", folder)
    results, _ = evaluate_dataset(Oracle(dataset), dataset)
    # A van that is taken for a bus is wrong, unless both are vehicles.
    for entry in results:
        entry["category_id"] = {5: 2}.get(entry["category_id"], entry["category_id"])
    plain = evaluate(folder / "val.json", results)
    assert plain.per_class["van"]["AP"] == 0 and plain["AP"] < 0.9
    merged = load_coco(folder / "val.json", None, class_map=("van=vehicle", "bus=vehicle"))
    metrics = evaluate(folder / "val.json", results, merged.classes)
    assert metrics.per_class["vehicle"]["AP"] == pytest.approx(1)
    assert metrics["AP"] == pytest.approx(1)
    only = load_coco(folder / "val.json", None, classes=("car", "cat"))
    metrics = evaluate(folder / "val.json", results, only.classes)
    assert metrics.per_class.keys() == {"car", "cat"} and metrics["AP"] == pytest.approx(1)


def test_a_model_of_merged_classes_is_matched_by_its_new_names(folder):
    trained = load_coco(folder / "val.json", None, class_map=("van=car", "bus=car"))
    assert match_categories(trained.class_names, trained) == [3, 7, 9]
    plain = load_coco(folder / "val.json", None, classes=("cat", "bus"))
    assert match_categories(trained.class_names, plain) == [None, None, 9]


def test_objects_of_classes_left_out_are_counted_and_their_images_become_empty(folder):
    dataset = load_coco(folder / "val.json", None, classes=("cat",), keep_empty=False)
    assert [record.image_id for record in dataset.records] == [1]
    assert [(a.id, a.label) for a in dataset.records[0].annotations] == [(3, 0)]
    assert dataset.num_left_out == 4
    content = json.loads((folder / "val.json").read_text())
    assert dataset.classes is not None
    mapped = map_categories(content, dataset.classes)
    assert mapped["categories"] == [{"id": 9, "name": "cat"}]
    assert [entry["id"] for entry in mapped["annotations"]] == [3]
    assert len(content["annotations"]) == 5  # the original stays


def test_eval_scores_a_results_file_under_the_configured_classes(folder):
    dataset = load_coco(folder / "val.json", folder)
    results, _ = evaluate_dataset(Oracle(dataset), dataset)
    (folder / "results.json").write_text(json.dumps(results))
    config = load_config("configs/tiny.py").to_dict()
    config["data"]["val"].update(images=str(folder), annotations=str(folder / "val.json"))
    config["data"].update(generator="", class_map=("van=car", "bus=car"), classes=("car",))
    (folder / "config.json").write_text(json.dumps(config))
    arguments = ["--workdir", folder, "--predictions", folder / "results.json"]
    assert eval_command.main([*map(str, arguments), "--output", str(folder / "out")]) == 0
    metrics = json.loads((folder / "out/metrics.json").read_text())
    assert metrics["AP"] == pytest.approx(1) and metrics["per_class"].keys() == {"car"}


def test_training_and_validation_data_get_the_same_classes_from_a_configuration(folder):
    text = (folder / "val.json").read_text()
    (folder / "train.json").write_text(text.replace('"name": "ped"', '"name": "dog"'))
    config = load_config(
        "configs/tiny.py",
        {
            "data.train.annotations": str(folder / "train.json"),
            "data.val.annotations": str(folder / "val.json"),
            "data.train.images": str(folder),
            "data.val.images": str(folder),
            "data.classes": "dog,vehicle,cat",
            "data.class_map": "van=vehicle,bus=vehicle",
        },
    )
    train, val = datasets.load_train(config), datasets.load_val(config)
    assert train.class_names == ("vehicle", "dog", "cat")
    assert val.class_names == ("vehicle", "cat")  # it has no dog
    assert match_categories(train.class_names, val) == [2, None, 9]


def test_categories_of_one_name_are_refused_unless_they_are_merged(folder):
    content = json.loads((folder / "val.json").read_text())
    content["categories"][4]["name"] = "car"
    (folder / "val.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"categories 3, 9 are all called 'car'.*class_map"):
        load_coco(folder / "val.json", None)
    dataset = load_coco(folder / "val.json", None, class_map=("car=car",))
    assert dataset.class_names == ("bus", "car", "van", "ped")
    assert sorted(a.id for r in dataset.records for a in r.annotations if a.label == 1) == [2, 3]
