"""Cityscapes and ADE20K, as they are downloaded, to COCO."""

import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sparseinst_jax import cli
from sparseinst_jax.data.coco import decode_mask, load_coco
from sparseinst_jax.data.importers.cityscapes_ade20k import (
    ADE20K_CLASSES,
    CITYSCAPES_CLASSES,
    read_published,
)

SIZE = 20, 40  # height, width


def _rectangle(left, top, right, bottom):
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


def _pixels(left, top, right, bottom):
    """Of a rectangle whose corners are pixels: shifted and widened by half a pixel."""
    mask = np.zeros(SIZE, bool)
    mask[top : bottom + 1, left : right + 1] = True
    return mask


def _photo(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE[::-1]).save(path)


def _city(root, objects, name="aachen_000000_000019", part="train", **more):
    """One image of Cityscapes; objects are pairs of a label and a polygon."""
    city = name.split("_")[0]
    _photo(root / f"leftImg8bit/{part}/{city}/{name}_leftImg8bit.png")
    labels = root / f"gtFine/{part}/{city}/{name}_gtFine_polygons.json"
    labels.parent.mkdir(parents=True, exist_ok=True)
    entries = [{"label": label, "polygon": polygon} for label, polygon in objects]
    labels.write_text(json.dumps(dict(imgHeight=20, imgWidth=40, objects=entries) | more))
    for kind in ("instanceIds", "labelIds", "color"):  # lie beside the jsons, and are not read
        _photo(labels.with_name(f"{name}_gtFine_{kind}.png"))


def _objects(root, *objects):
    _city(root, objects)
    found = read_published("cityscapes", root)
    assert found.faults.lines == []
    (image,) = found.images
    kinds = (False, image.objects), (True, image.crowd)
    return [(o.class_name, crowd, _decoded(o)) for crowd, kind in kinds for o in kind], found.notes


def _decoded(found_object):
    return decode_mask(found_object.segmentation, *SIZE)


def test_later_polygons_of_any_label_are_cut_out_of_earlier_ones(tmp_path):
    found, notes = _objects(
        tmp_path,
        ("sky", _rectangle(0, 0, 39, 19)),
        ("car", _rectangle(2, 3, 12, 9)),
        ("person", _rectangle(10, 3, 14, 9)),
        ("pole", _rectangle(2, 3, 3, 9)),
        ("license plate", _rectangle(5, 9, 7, 9)),
        ("bus", _rectangle(20, 5, 24, 9)),
        ("vegetation", _rectangle(19, 4, 25, 10)),
    )
    assert [name for name, *_ in found] == ["person", "car"]
    np.testing.assert_array_equal(found[0][2], _pixels(10, 3, 14, 9))
    np.testing.assert_array_equal(found[1][2], _pixels(4, 3, 9, 9))
    assert "1 object wholly covered by others: left out" in notes


def test_parts_stay_one_object_and_what_an_outline_encloses_is_filled(tmp_path):
    found, _ = _objects(
        tmp_path,
        ("train", _rectangle(0, 2, 39, 8)),
        ("person", _rectangle(5, 4, 7, 6)),  # enclosed by the train
        ("pole", _rectangle(20, 0, 22, 19)),  # cuts the train in two
    )
    (_, _, person), (name, _, train) = found
    assert name == "train"
    np.testing.assert_array_equal(person, _pixels(5, 4, 7, 6))
    np.testing.assert_array_equal(train, _pixels(0, 2, 19, 8) | _pixels(23, 2, 39, 8))


def test_groups_are_crowd_and_only_eight_labels_are_classes(tmp_path):
    found, _ = _objects(
        tmp_path,
        *((name, _rectangle(4 * i, 0, 4 * i + 2, 2)) for i, name in enumerate(CITYSCAPES_CLASSES)),
        ("cargroup", _rectangle(0, 5, 9, 9)),
        ("polegroup", _rectangle(0, 12, 2, 15)),
        ("caravan", _rectangle(5, 12, 7, 15)),
        ("caravangroup", _rectangle(10, 12, 12, 15)),
    )
    assert [(name, crowd) for name, crowd, _ in found] == [
        *((name, False) for name in reversed(CITYSCAPES_CLASSES)),
        ("car", True),
    ]


def test_slanted_polygons_and_those_over_the_border_are_drawn_as_a_whole_image_would(tmp_path):
    """The reference is drawn as cityscapesScripts draws: on a canvas of the image's size."""
    for corners in (
        [[3, 2], [30, 7], [17, 18]],
        [[-4, 5], [12, -3], [60, 30], [8, 15]],
        [[35, 15], [45, 12], [39, 25]],
        [[6, 6], [6, 6], [9, 6]],
    ):
        canvas = Image.new("L", SIZE[::-1])
        ImageDraw.Draw(canvas).polygon([tuple(corner) for corner in corners], fill=1)
        found, _ = _objects(tmp_path, ("car", corners))
        np.testing.assert_array_equal(found[0][2], np.array(canvas) > 0)


def test_cityscapes_faults_are_listed_with_file_and_place(tmp_path):
    square = _rectangle(1, 1, 5, 5)
    _city(
        tmp_path, [("car", square), ("dragon", square), ("bus", square[:2]), ("bus", "x"), (3, [])]
    )
    _city(tmp_path, [("car", square)], "bonn_1", imgWidth=41)
    _city(tmp_path, [("car", square)], "bonn_2")
    (tmp_path / "gtFine/train/bonn/bonn_2_gtFine_polygons.json").write_text('{"objects": null}')
    _city(tmp_path, [("car", square)], "bonn_3")
    (tmp_path / "gtFine/train/bonn/bonn_3_gtFine_polygons.json").unlink()
    _city(tmp_path, [("car", square)], "bonn_4")
    (tmp_path / "leftImg8bit/train/bonn/bonn_4_leftImg8bit.png").unlink()
    _city(tmp_path, [("car", [[1, 1], [900, 1], [1, 5]])], "bonn_5")
    found = read_published("cityscapes", tmp_path)
    for message in (
        "objects[1]: 'dragon' is none of Cityscapes' labels",
        "objects[2]: a polygon needs three corners or more, got 2",
        "objects[3]: 'polygon' must be a list of corners [x, y], got 'x'",
        "objects[4]: 3 is none of Cityscapes' labels",
        "bonn_1_gtFine_polygons.json: the label file says 20 x 41",
        "bonn_2_gtFine_polygons.json: expected an object with the list 'objects'",
        "bonn_3_gtFine_polygons.json do not exist",
        "objects[0]: x = 900 lies far outside of the image",
    ):
        (line,) = [line for line in found.faults.lines if message in line]
        assert str(tmp_path) in line
    assert len(found.faults.lines) == 8
    assert [len(image.objects) for image in found.images] == [1, 0]
    (note,) = [note for note in found.notes if "label files have no image" in note]
    assert note.startswith("WARNING: 1 label files have no image: left out: ")
    assert note.endswith("bonn_4_gtFine_polygons.json")


def test_the_command_writes_both_parts_and_leaves_the_unlabelled_out(tmp_path, capsys):
    root = tmp_path / "cityscapes"
    _city(root, [("car", _rectangle(1, 1, 5, 5)), ("persongroup", _rectangle(8, 1, 12, 5))])
    _city(root, [("train", _rectangle(1, 1, 5, 5))], "lindau_1", "val")
    _city(root, [("out of roi", _rectangle(0, 0, 39, 19))], "berlin_1", "test")
    _photo(root / "leftImg8bit/train_extra/bonn/bonn_1_leftImg8bit.png")
    outputs = tmp_path / "train.json", tmp_path / "val.json"
    options = ["--output", str(outputs[0]), "--val-output", str(outputs[1])]
    assert cli.main(["import-data", "cityscapes", str(root), *options]) == 0
    printed = capsys.readouterr().out
    assert "WARNING: 1 image of test without published labels" in printed
    assert "WARNING: 1 image of train_extra without published labels" in printed
    assert "class names from the list of cityscapes" in printed
    assert "--config=fastinst_r50_x1_cityscapes --init-from=fastinst_r50_x1" in printed
    assert "1 images (0 without objects), 1 objects, 1 crowd regions" in printed
    content = json.loads(outputs[0].read_text())
    assert [c["name"] for c in content["categories"]] == list(CITYSCAPES_CLASSES)
    assert [(a["category_id"], a["iscrowd"]) for a in content["annotations"]] == [(3, 0), (1, 1)]
    for output, crowds in zip(outputs, ([False, True], [False]), strict=True):
        dataset = load_coco(output, root / "leftImg8bit", check_files=True)
        assert dataset.class_names == CITYSCAPES_CLASSES
        assert [a.iscrowd for r in dataset.records for a in r.annotations] == crowds
    with pytest.raises(SystemExit):
        cli.main(["import-data", "cityscapes", str(root), *options, "--names", "car"])
    assert "--names is for yolo and labelme" in capsys.readouterr().err


def _ade(root, objects, name="ADE_train_00000001", part="training"):
    """One image of ADE20K; objects are (category, number, box of pixels)."""
    _photo(root / f"images/{part}/{name}.jpg")
    _photo(root / f"annotations/{part}/{name}.png")  # scene parsing's, which are not read
    values = np.zeros((*SIZE, 3), np.uint8)
    for category, number, box in objects:
        values[_pixels(*box)] = category, number, 7
    path = root / f"annotations_instance/{part}/{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


def test_ade20k_has_its_category_in_red_and_its_number_in_green(tmp_path):
    objects = [(1, 3, (0, 0, 3, 3)), (100, 1, (10, 2, 12, 5)), (5, 255, (20, 0, 29, 9))]
    _ade(tmp_path, [*objects, (1, 3, (0, 8, 3, 9)), (12, 0, (30, 10, 35, 12))])
    _ade(tmp_path, [], "ADE_train_00000002")
    _ade(tmp_path, [(4, 1, (0, 0, 3, 3))], "ADE_val_00000001", "validation")
    outputs = tmp_path / "train.json", tmp_path / "val.json"
    options = ["--output", str(outputs[0]), "--val-output", str(outputs[1])]
    assert cli.main(["import-data", "ade20k", str(tmp_path), *options]) == 0
    content = json.loads(outputs[0].read_text())
    assert [(c["id"], c["name"]) for c in content["categories"]] == list(
        enumerate(ADE20K_CLASSES, 1)
    )
    assert [image["file_name"] for image in content["images"]] == [
        "training/ADE_train_00000001.jpg",
        "training/ADE_train_00000002.jpg",
    ]
    masks = [_pixels(10, 2, 12, 5), _pixels(0, 0, 3, 3) | _pixels(0, 8, 3, 9)]
    masks.append(_pixels(20, 0, 29, 9))
    annotations = content["annotations"]
    assert [(a["image_id"], a["category_id"], a["iscrowd"]) for a in annotations] == [
        (1, 100, 0),
        (1, 1, 0),
        (1, 5, 0),
    ]
    for annotation, mask in zip(annotations, masks, strict=True):
        assert annotation["area"] == mask.sum()
        np.testing.assert_array_equal(decode_mask(annotation["segmentation"], *SIZE), mask)
    dataset = load_coco(outputs[1], tmp_path / "images", check_files=True)
    assert [a.label for r in dataset.records for a in r.annotations] == [3]


def test_ade20k_names_are_a_hundred_in_the_order_of_their_numbers():
    assert len(set(ADE20K_CLASSES)) == 100
    some = {1: "bed", 4: "person", 18: "wardrobe", 57: "booth", 78: "step", 100: "flag"}
    assert {number: ADE20K_CLASSES[number - 1] for number in some} == some


def test_ade20k_faults_are_listed_with_file_and_object(tmp_path):
    first = _ade(tmp_path, [(1, 1, (0, 0, 3, 3)), (2, 1, (5, 5, 6, 6)), (9, 2, (9, 9, 9, 9))])
    second = _ade(tmp_path, [(101, 1, (0, 0, 3, 3)), (0, 2, (5, 5, 6, 6))], "ADE_train_00000002")
    third = _ade(tmp_path, [], "ADE_train_00000003")
    Image.new("L", SIZE[::-1]).save(third)
    fourth = _ade(tmp_path, [], "ADE_train_00000004")
    Image.new("RGB", (9, 9)).save(fourth)
    _ade(tmp_path, [], "ADE_train_00000005").write_bytes(b"no image")
    found = read_published("ade20k", tmp_path)
    wanted = (
        f"{first}, object 1: its category must be one of 1 to 100, got 1, 2;",
        f"{second}, object 1: its category must be one of 1 to 100, got 101;",
        f"{second}, object 2: its category must be one of 1 to 100, got 0;",
        f"{third}: expected three channels",
        f"{fourth}: the map says 9 x 9",
        f"{fourth.with_name('ADE_train_00000005.png')}: ",
    )
    assert len(found.faults.lines) == len(wanted)
    for line, start in zip(found.faults.lines, wanted, strict=True):
        assert line.startswith(start)
    assert [[o.class_name for o in image.objects] for image in found.images] == [["car"], []]


@pytest.mark.parametrize(
    ("folder", "message"),
    [("gtFine", "the folder of the labels"), ("leftImg8bit", "the image folder")],
)
def test_a_folder_that_is_missing_is_named(tmp_path, folder, message):
    _city(tmp_path, [("car", _rectangle(1, 1, 5, 5))])
    (tmp_path / folder).rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"{message} .*{folder} does not exist"):
        read_published("cityscapes", tmp_path)
