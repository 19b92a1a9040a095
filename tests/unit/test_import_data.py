"""The command `sparseinst import-data`: what it writes, says and refuses."""

import json
import shlex

import numpy as np
import pytest
from PIL import Image

from sparseinst_jax import cli
from sparseinst_jax.cli import next_command
from sparseinst_jax.cli.arguments import split_overrides
from sparseinst_jax.data.classes import choose_classes, warn_of_alike
from sparseinst_jax.data.coco import decode_mask, load_coco, read_record
from sparseinst_jax.data.importers.coco_content import make_content, split_images, write_jsons
from sparseinst_jax.data.importers.objects import LabelledImage, make_object
from sparseinst_jax.setup import config

BOX = "0.1 0.1 0.3 0.1 0.3 0.5 0.1 0.5"  # x 2..6, y 1..5 of 20 x 10


def _data_set(folder, num_images=10, line=f"0 {BOX}"):
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    (folder / "data.yaml").write_text("names: [pear, apple]")
    for i in range(num_images):
        Image.new("RGB", (20, 10)).save(folder / f"images/{i}.png")
        (folder / f"labels/{i}.txt").write_text(f"{line}\n1 {BOX}\n")
    return folder


def _run(*arguments):
    return cli.main(["import-data", *map(str, arguments)])


def test_the_json_is_coco_and_its_masks_are_those_drawn(tmp_path, capsys):
    source = tmp_path / "masks"
    drawn = np.zeros((10, 20), bool)
    drawn[2:5, 3:9] = True
    drawn[5:7, 3:4] = True
    for name in ("b", "a"):
        (source / name).mkdir(parents=True)
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.new("RGB", (20, 10)).save(tmp_path / f"photos/{name}.jpg")
        Image.fromarray(drawn).save(source / name / "pear_1.png")
        Image.fromarray(~drawn).save(source / name / "apple_1.png")
    output = tmp_path / "new/train.json"
    options = ("--layout", "objects", "--images", tmp_path / "photos", "--output", output)
    assert _run("masks", source, *options) == 0
    content = json.loads(output.read_text())
    assert content["categories"] == [{"id": 1, "name": "apple"}, {"id": 2, "name": "pear"}]
    assert content["images"] == [
        {"id": 1, "file_name": "a.jpg", "height": 10, "width": 20},
        {"id": 2, "file_name": "b.jpg", "height": 10, "width": 20},
    ]
    keys = ("id", "image_id", "category_id", "area", "bbox", "iscrowd")
    assert [[a[key] for key in keys] for a in content["annotations"]] == [
        [1, 1, 1, 180, [0, 0, 20, 10], 0],
        [2, 1, 2, 20, [3, 2, 6, 5], 0],
        [3, 2, 1, 180, [0, 0, 20, 10], 0],
        [4, 2, 2, 20, [3, 2, 6, 5], 0],
    ]
    dataset = load_coco(output, tmp_path / "photos", check_files=True)
    assert dataset.class_names == ("apple", "pear")
    for record in dataset.records:
        assert read_record(record).shape == (10, 20, 3)
        for annotation, expected in zip(record.annotations, (~drawn, drawn), strict=True):
            mask = decode_mask(annotation.segmentation, 10, 20)
            np.testing.assert_array_equal(mask, expected)
    assert f"{output}: 2 images (0 without objects), 4 objects" in capsys.readouterr().out


def test_each_format_comes_to_the_same_json(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (20, 10)).save(photos / "a.png")
    xs, ys = [2, 6, 6, 2], [1, 1, 5, 5]
    yolo = tmp_path / "yolo"
    yolo.mkdir()
    (yolo / "a.txt").write_text(f"0 {BOX}")
    labelme = tmp_path / "labelme"
    labelme.mkdir()
    points = [list(corner) for corner in zip(xs, ys, strict=True)]
    shapes = [{"label": "pear", "points": points, "shape_type": "polygon"}]
    labelled = {"imagePath": "a.png", "imageHeight": 10, "imageWidth": 20, "shapes": shapes}
    (labelme / "a.json").write_text(json.dumps(labelled))
    shape = {"name": "polygon", "all_points_x": xs, "all_points_y": ys}
    region = {"shape_attributes": shape, "region_attributes": {"class": "pear"}}
    (tmp_path / "via.json").write_text(
        json.dumps({"a.png1": {"filename": "a.png", "regions": [region]}})
    )
    texts = set()
    for arguments in (
        ("yolo", yolo, "--names", "pear"),
        ("labelme", labelme),
        ("via", tmp_path / "via.json"),
    ):
        output = tmp_path / f"from_{arguments[0]}.json"
        assert _run(*arguments, "--images", photos, "--output", output) == 0
        texts.add(output.read_text())
    assert len(texts) == 1
    (annotation,) = json.loads(texts.pop())["annotations"]
    assert annotation["segmentation"] == [[2, 1, 6, 1, 6, 5, 2, 5]]


def test_the_same_input_gives_the_same_bytes_and_another_seed_another_division(tmp_path):
    source = _data_set(tmp_path / "data")
    written = []
    for seed in (0, 0, 1):
        outputs = ("--output", tmp_path / "t.json", "--val-output", tmp_path / "v.json")
        assert _run("yolo", source, *outputs, "--val-share", 0.3, "--seed", seed) == 0
        written.append([(tmp_path / name).read_bytes() for name in ("t.json", "v.json")])
    assert written[0] == written[1] != written[2]
    train, val = (json.loads(text) for text in written[0])
    assert (len(train["images"]), len(val["images"])) == (7, 3)
    names = {image["file_name"] for part in (train, val) for image in part["images"]}
    assert names == {f"{i}.png" for i in range(10)}
    assert train["categories"] == val["categories"]
    assert [image["id"] for image in val["images"]] == [1, 2, 3]
    assert [a["image_id"] for a in val["annotations"]] == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("share", [0.001, 0.2, 0.5, 0.999])
@pytest.mark.parametrize("num_images", [2, 3, 11])
def test_neither_side_of_a_division_is_without_objects(share, num_images):
    square = make_object("pear", [[2, 1, 6, 1, 6, 5, 2, 5]], (10, 20))
    labelled = [LabelledImage(f"{i}.png", 10, 20, [square]) for i in range(num_images)]
    empty = [LabelledImage(f"empty{i}.png", 10, 20) for i in range(10)]
    train, val = split_images(labelled + empty, share, seed=3)
    expected = min(max(round(share * num_images), 1), num_images - 1)
    assert sum(bool(image.objects) for image in val) == expected
    assert sum(not image.objects for image in val) == round(share * 10)
    assert sorted(i.file_name for i in train + val) == sorted(i.file_name for i in labelled + empty)
    assert split_images((labelled + empty)[::-1], share, seed=3)[1] == val


def test_augmented_copies_of_a_photo_stay_on_one_side():
    square = make_object("pear", [[2, 1, 6, 1, 6, 5, 2, 5]], (10, 20))
    names = [f"s/{photo}_jpg.rf.{copy}.jpg" for photo in range(6) for copy in "abc"]
    images = [LabelledImage(name, 10, 20, [square]) for name in names]
    train, val = split_images(images, 0.34, seed=0)
    assert (len(train), len(val)) == (12, 6)
    photos = [{image.file_name[:3] for image in part} for part in (train, val)]
    assert photos[0].isdisjoint(photos[1])


def test_one_labelled_image_cannot_be_divided(tmp_path, capsys):
    source = _data_set(tmp_path / "data", num_images=1)
    outputs = ("--output", tmp_path / "t.json", "--val-output", tmp_path / "v.json")
    assert _run("yolo", source, *outputs) == 1
    assert "1 image(s) with objects cannot be divided" in capsys.readouterr().err
    assert not (tmp_path / "t.json").exists()


def test_faults_stop_the_import_and_nothing_is_written(tmp_path, capsys):
    source = _data_set(tmp_path / "data", num_images=22, line="0 0.5 0.5 0.2 0.2")
    assert _run("yolo", source, "--output", tmp_path / "out/t.json") == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {source}: 22 fault(s), so nothing was written:")
    assert error.count("5 numbers are a box") == 20
    assert "and 2 more" in error
    assert "--skip-faulty" in error
    assert not (tmp_path / "out").exists()


def test_faulty_objects_are_skipped_and_listed_when_asked(tmp_path, capsys):
    source = _data_set(tmp_path / "data", num_images=22, line="0 0.5 0.5 0.2 0.2")
    assert _run("yolo", source, "--output", tmp_path / "t.json", "--skip-faulty") == 0
    captured = capsys.readouterr()
    assert captured.err.count("skipped: ") == 22
    assert f"skipped: {source / 'labels' / '7.txt'}:1: 5 numbers" in captured.err
    assert "WARNING: no object of: pear" in captured.out
    content = json.loads((tmp_path / "t.json").read_text())
    assert (len(content["images"]), len(content["annotations"])) == (22, 22)


def test_an_import_without_any_object_is_refused(tmp_path, capsys):
    source = _data_set(tmp_path / "data", num_images=2)
    for path in (source / "labels").iterdir():
        path.write_text("0 0.5 0.5 0.2 0.2")
    assert _run("yolo", source, "--output", tmp_path / "t.json", "--skip-faulty") == 1
    assert "none of the 2 images has an object that can be read" in capsys.readouterr().err
    assert not (tmp_path / "t.json").exists()


def test_a_file_of_ones_own_is_not_overwritten_and_an_earlier_import_is(tmp_path, capsys):
    source = _data_set(tmp_path / "data", num_images=2)
    output = tmp_path / "t.json"
    for text in ("precious", '{"images": [], "info": {}}', "[]"):
        output.write_text(text)
        assert _run("yolo", source, "--output", output) == 1
        assert "exists and was not written by import-data" in capsys.readouterr().err
        assert output.read_text() == text
    output.unlink()
    assert _run("yolo", source, "--output", output) == 0
    (source / "labels/0.txt").unlink()
    assert _run("yolo", source, "--output", output) == 0
    assert len(json.loads(output.read_text())["annotations"]) == 2


def test_a_place_that_cannot_be_written_is_named_and_nothing_is_left(tmp_path, capsys):
    source = _data_set(tmp_path / "data", num_images=3)
    (tmp_path / "file").write_text("")
    outputs = ("--output", tmp_path / "t.json", "--val-output", tmp_path / "file/v.json")
    assert _run("yolo", source, *outputs) == 1
    error = capsys.readouterr().err
    assert "file cannot be written" in error
    assert "--val-output" in error
    assert "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "file"]


def test_two_jsons_are_written_both_or_not_at_all(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "t.json").write_text("before")
    with pytest.raises(ValueError, match=r"cannot be written.*--output"):
        write_jsons({tmp_path / "t.json": {}, tmp_path / "file/v.json": {}})
    assert (tmp_path / "t.json").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "t.json"]


@pytest.mark.parametrize(
    "variables, devices, has_lite0, offered",
    [
        ({"JAX_PLATFORMS": "cpu"}, True, False, "--config=finetune_small"),
        ({"JAX_PLATFORMS": "cuda,cpu"}, False, True, "--config=finetune --init-from=giam_r50"),
        ({}, True, True, "--config=finetune --init-from=giam_r50"),
        ({}, False, False, "--config=finetune_small"),
        ({}, False, True, "--config=finetune_lite"),
    ],
)
def test_a_network_that_the_machine_can_train_is_offered(
    monkeypatch, tmp_path, variables, devices, has_lite0, offered
):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "nvidia0").write_text("")
    monkeypatch.setattr(next_command, "_DEVICES", (str(tmp_path / "nvidia[0-9]*"),) * devices)
    monkeypatch.setattr(next_command.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(next_command, "has_lite0", lambda: has_lite0)
    command = next_command.train_command(["--config.data.train.annotations=a.json"])
    assert command.startswith(f"  sparseinst train {offered} \\\n    --config.data.train")
    assert "--init-from=giam_r50" in command and "sparseinst download" in command


def test_the_next_commands_are_ones_that_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(next_command, "has_lite0", lambda: False)
    source = _data_set(tmp_path / "my data")
    outputs = ("--output", tmp_path / "a train.json", "--val-output", tmp_path / "val.json")
    assert _run("yolo", source, *outputs) == 0
    text = capsys.readouterr().out.split("Next:\n")[1]
    check, train, rest = (
        shlex.split(line, comments=True) for line in text.replace("\\\n", "").splitlines()
    )
    assert rest == []  # a remark, which a shell passes over
    assert check[:3] == ["sparseinst", "check-data", str(outputs[1])]
    assert cli.main([*check[1:], "--output", str(tmp_path / "page")]) == 0
    assert "val.json: 2 images, 4 objects, 2 classes" in capsys.readouterr().out
    assert train[:2] == ["sparseinst", "train"]
    rest, overrides = split_overrides(train[2:])
    assert rest == ["--config=finetune_small"]  # what a CPU trains in minutes
    data = config.load_config(rest[0].removeprefix("--config="), overrides).data
    assert (data.train.annotations, data.val.annotations) == (str(outputs[1]), str(outputs[3]))
    assert data.train.images == data.val.images == str(source / "images")


def test_without_validation_data_the_next_command_does_not_evaluate(tmp_path, capsys):
    source = _data_set(tmp_path / "data", num_images=2)
    assert _run("yolo", source, "--output", tmp_path / "t.json") == 0
    text = capsys.readouterr().out.split("Next:\n")[1].replace("\\\n", "").splitlines()
    train = shlex.split(text[-2], comments=True)
    rest, overrides = split_overrides(train[2:])
    assert config.load_config(rest[0].removeprefix("--config="), overrides).train.eval_every == 0
    assert "--val-output" in text[-2]


def test_classes_that_differ_in_capitals_only_are_pointed_out(tmp_path, capsys):
    source = _data_set(tmp_path / "data", num_images=2)
    assert _run("yolo", source, "--output", tmp_path / "t.json", "--names", "Pear", "pear ") == 0
    assert "WARNING: the classes 'Pear', 'pear' differ only in capitals" in capsys.readouterr().out


def test_classes_that_differ_in_a_number_at_their_end_come_with_what_merges_them():
    (line,) = warn_of_alike(["person-1", "person-2", "level 1", "3", "4"])
    assert "'person-1', 'person-2' differ only in the number at their end" in line
    assert "--config.data.class_map=person-1=person,person-2=person" in line
    (line,) = warn_of_alike(["cat", "Cat "])
    (command,) = [word for word in shlex.split(line) if word.startswith("--config.")]
    config.load_config("tiny", split_overrides([command])[1])
    assert choose_classes({1: "cat", 2: "Cat "}, (), ("Cat =cat",)).names == ("cat",)


@pytest.mark.parametrize(
    ("shape", "number", "message"),
    [
        (BOX, 1, "all 2 objects have exactly 4 corners: are these boxes, or oriented boxes"),
        (f"{BOX} 0.2 0.2", 5, "all 10 objects have exactly 5 corners: are these boxes and keyp"),
        (f"{BOX} 0.2 0.2", 4, ""),
    ],
)
def test_objects_that_all_have_one_number_of_corners_are_pointed_out(
    tmp_path, capsys, shape, number, message
):
    source = _data_set(tmp_path / "data", num_images=number)
    for path in (source / "labels").iterdir():
        path.write_text(f"0 {shape}\n1 {shape}\n")
    assert _run("yolo", source, "--output", tmp_path / "t.json") == 0
    out = capsys.readouterr().out
    assert message in out if message else "corners" not in out


def _divided(folder, **parts):
    (folder / "data.yaml").parent.mkdir(parents=True)
    (folder / "data.yaml").write_text("names: [pear]")
    for part, number in parts.items():
        (folder / part / "images").mkdir(parents=True)
        (folder / part / "labels").mkdir()
        for i in range(number):
            Image.new("RGB", (20, 10)).save(folder / part / f"images/{i}.png")
            (folder / part / f"labels/{i}.txt").write_text(f"0 {BOX} 0.2 0.6\n")
    return folder


def _names(path):
    return [image["file_name"] for image in json.loads(path.read_text())["images"]]


def test_a_data_set_that_is_divided_already_stays_so(tmp_path, capsys):
    source = _divided(tmp_path / "data", train=3, valid=2, test=1)
    train, val, test = (tmp_path / f"{part}.json" for part in ("train", "val", "test"))
    assert _run("yolo", source, "--output", train) == 0
    assert _names(train) == [f"train/images/{i}.png" for i in range(3)]
    out = capsys.readouterr().out
    assert "stays so: train 3 images, val 2 images, test 1 image" in out
    assert "WARNING: val 2 images, test 1 image are in no json; --val-output JSON" in out
    outputs = ("--output", train, "--val-output", val, "--test-output", test)
    assert _run("yolo", source, *outputs) == 0
    assert _names(val) == [f"valid/images/{i}.png" for i in range(2)]
    assert _names(test) == ["test/images/0.png"]
    assert "WARNING" not in capsys.readouterr().out
    assert _run("yolo", source, *outputs[:4], "--val-share", 0.5) == 1
    error = capsys.readouterr().err
    assert "--val-share: the data set is divided already" in error and "--ignore-parts" in error
    assert _run("yolo", source, *outputs[:4], "--val-share", 0.5, "--ignore-parts") == 0
    assert len(_names(train)) == len(_names(val)) == 3
    assert _run("yolo", source, *outputs, "--ignore-parts") == 1
    assert "--test-output: the data set has no test part" in capsys.readouterr().err


def test_a_set_without_a_validation_part_is_divided_without_its_test_part(tmp_path):
    source = _divided(tmp_path / "data", train2017=4, test=2)
    outputs = ("--output", tmp_path / "t.json", "--val-output", tmp_path / "v.json")
    assert _run("yolo", source, *outputs) == 0
    assert (len(_names(tmp_path / "t.json")), len(_names(tmp_path / "v.json"))) == (3, 1)
    assert "test" not in (tmp_path / "t.json").read_text() + (tmp_path / "v.json").read_text()


def test_classes_are_left_out_by_one_option(tmp_path, capsys):
    source = _data_set(tmp_path / "data", num_images=2)
    assert _run("yolo", source, "--output", tmp_path / "t.json", "--exclude", "pear") == 0
    content = json.loads((tmp_path / "t.json").read_text())
    assert [category["name"] for category in content["categories"]] == ["apple"]
    assert len(content["annotations"]) == 2
    assert "2 objects of pear: left out, trained as background" in capsys.readouterr().out
    assert _run("yolo", source, "--output", tmp_path / "t.json", "--exclude", "plum") == 1
    assert "there is no class 'plum'; the classes: pear, apple" in capsys.readouterr().err


def test_a_coco_json_is_answered_with_the_command_that_takes_it(tmp_path, capsys):
    (tmp_path / "train").mkdir()
    (tmp_path / "train/_annotations.coco.json").write_text("{}")
    Image.new("RGB", (20, 10)).save(tmp_path / "train/a.JPG", "JPEG")
    assert _run("coco", tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith("A COCO json needs no import")
    path = tmp_path / "train/_annotations.coco.json"
    assert f"  sparseinst check-data {path} --images {path.parent}\n" in error
    assert _run("coco", "gone.json", "--output", "t.json") == 2
    assert "sparseinst check-data gone.json --images PHOTOS" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("voc", "x"), "invalid choice"),
        (("yolo", "x", "--attribute", "a"), "--attribute is for via, not for yolo"),
        (("labelme", "x", "--class", "a"), "--class is for via and masks, not for labelme"),
        (("via", "x", "--layout", "objects"), "--layout is for masks, not for via"),
        (("masks", "x"), "--layout objects (a folder for each image"),
        (("yolo", "x", "--val-share", "0.2"), "--val-share needs --val-output"),
        (("yolo", "x", "--val-output", "v", "--val-share", "1"), "between 0 and 1, got 1.0"),
        (("yolo", "x", "--val-output", "v", "--val-share", "nan"), "between 0 and 1, got nan"),
        (
            ("yolo", "x", "--val-output", "./t.json"),
            "--output, --val-output must be different files",
        ),
        (("yolo", "x", "--names", "a", "a"), "must be different and not empty"),
        (("yolo", "x", "--name", "a"), "unrecognized arguments"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        _run(*arguments, "--output", "t.json")
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_source_is_named_without_a_traceback(tmp_path, capsys):
    for name in ("yolo", "labelme", "via"):
        assert _run(name, tmp_path / "nowhere", "--output", tmp_path / "t.json") == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert "nowhere" in error


def test_ids_count_from_one_in_the_order_of_the_file_names():
    square = make_object("pear", [[2, 1, 6, 1, 6, 5, 2, 5]], (10, 20))
    images = [LabelledImage(name, 10, 20, [square]) for name in ("s/b.png", "a.png")]
    content = make_content(images, ["apple", "pear"])
    assert [(i["id"], i["file_name"]) for i in content["images"]] == [(1, "a.png"), (2, "s/b.png")]
    assert [(a["id"], a["image_id"], a["category_id"]) for a in content["annotations"]] == [
        (1, 1, 2),
        (2, 2, 2),
    ]
