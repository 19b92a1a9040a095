"""LabelMe jsons to COCO."""

import base64
import io
import json
import math

import numpy as np
import pytest
from PIL import Image

from sparseinst_jax.data.coco import decode_mask
from sparseinst_jax.data.importers.labelme import read_labelme

SQUARE = [[2, 1], [6, 1], [6, 5], [2, 5]]
HEIGHT, WIDTH = 30, 40


def _shape(label="pear", points=SQUARE, shape_type="polygon", **more):
    return {"label": label, "points": points, "shape_type": shape_type, "flags": {}, **more}


def _png(mask):
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _write(folder, shapes, name="a", **content):
    folder.mkdir(parents=True, exist_ok=True)
    image = folder / f"{name}.png"
    if not image.exists():
        Image.new("RGB", (WIDTH, HEIGHT)).save(image)
    stated = {"imagePath": image.name, "imageHeight": HEIGHT, "imageWidth": WIDTH}
    text = json.dumps({"version": "5.4.1", "shapes": shapes, "imageData": "!", **stated, **content})
    (folder / f"{name}.json").write_text(text)


def _objects(tmp_path, *shapes):
    _write(tmp_path, list(shapes))
    found = read_labelme(tmp_path)
    assert found.faults.lines == []
    return found.images[0].objects


def _rectangle(rows, columns):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[rows, columns] = True
    return mask


def _decoded(found_object):
    return decode_mask(found_object.segmentation, HEIGHT, WIDTH)


def test_polygons_and_rectangles_stay_polygons_with_area_and_box_of_their_pixels(tmp_path):
    objects = _objects(
        tmp_path,
        _shape(),
        _shape("apple", [[20, 10], [10, 4]], "rectangle"),  # drawn from below
        _shape("apple", SQUARE, "rectangle"),
        {"label": "pear", "points": SQUARE},  # as old versions wrote them
    )
    assert objects[0] == ("pear", [[2, 1, 6, 1, 6, 5, 2, 5]], 16, [2, 1, 4, 4])
    assert objects[1] == ("apple", [[10, 4, 20, 4, 20, 10, 10, 10]], 60, [10, 4, 10, 6])
    assert objects[2][1:] == objects[0][1:]
    assert objects[3] == objects[0]
    np.testing.assert_array_equal(_decoded(objects[1]), _rectangle(slice(4, 10), slice(10, 20)))


def test_a_circle_is_given_by_its_centre_and_a_point_on_it(tmp_path):
    (circle,) = _objects(tmp_path, _shape(points=[[20, 15], [20 + 6, 15 + 8]], shape_type="circle"))
    assert circle.bbox == [10, 5, 20, 20]
    assert circle.area == pytest.approx(math.pi * 100, rel=0.02)
    corners = np.array(circle.segmentation).reshape(-1, 2)
    radii = np.hypot(*(corners - [20, 15]).T)
    np.testing.assert_allclose(radii, 10, atol=0.01)
    # Sides nowhere further than a twentieth of a pixel from the circle.
    middles = np.hypot(*((corners + np.roll(corners, 1, 0)) / 2 - [20, 15]).T)
    assert 10 - 0.06 < middles.min() < 10


@pytest.mark.parametrize("last", [0, 1])  # boxes end with the last pixel, or after it
def test_a_mask_lies_at_the_corner_of_its_box(tmp_path, last):
    drawn = np.array([[1, 0, 1], [1, 1, 0]], bool)
    points = [[5.0, 7.0], [7.0 + last, 8.0 + last]]
    (found,) = _objects(tmp_path, _shape("pear", points, "mask", mask=_png(drawn)))
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[7:9, 5:8] = drawn
    np.testing.assert_array_equal(_decoded(found), expected)
    assert set(found.segmentation) == {"size", "counts"}
    assert (found.area, found.bbox) == (4, [5, 7, 3, 2])


def test_the_part_of_a_mask_outside_the_image_is_cut_off(tmp_path):
    drawn = np.ones((4, 4), np.uint8) * 255
    objects = _objects(
        tmp_path,
        _shape(points=[[-2, -1], [1, 2]], shape_type="mask", mask=_png(drawn)),
        _shape(points=[[38, 29], [41, 32]], shape_type="mask", mask=_png(drawn)),
    )
    np.testing.assert_array_equal(_decoded(objects[0]), _rectangle(slice(0, 3), slice(0, 2)))
    np.testing.assert_array_equal(_decoded(objects[1]), _rectangle(slice(29, 30), slice(38, 40)))


def test_shapes_of_one_group_and_label_are_one_object(tmp_path):
    other = [[10, 10], [12, 10], [12, 14], [10, 14]]
    objects = _objects(
        tmp_path,
        _shape(group_id=3),
        _shape("apple", group_id=3),
        _shape(points=other, group_id=3),
        _shape(points=other, group_id=4),
        _shape(points=other),
        _shape(points=other, group_id=None),
    )
    assert [(o.class_name, o.area) for o in objects] == [
        ("pear", 16 + 8),
        ("apple", 16),
        ("pear", 8),
        ("pear", 8),
        ("pear", 8),
    ]
    assert objects[0].segmentation == [[2, 1, 6, 1, 6, 5, 2, 5], [10, 10, 12, 10, 12, 14, 10, 14]]
    assert objects[0].bbox == [2, 1, 10, 13]


def test_a_group_with_a_mask_becomes_the_union_of_its_pixels(tmp_path):
    drawn = np.ones((2, 3), np.uint8)
    mask = _shape(points=[[5, 4], [7, 5]], shape_type="mask", mask=_png(drawn), group_id=1)
    (found,) = _objects(tmp_path, _shape(group_id=1), mask)
    expected = _rectangle(slice(1, 5), slice(2, 6)) | _rectangle(slice(4, 6), slice(5, 8))
    np.testing.assert_array_equal(_decoded(found), expected)
    assert found.area == 16 + 6 - 1


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (_shape(shape_type="linestrip"), "a linestrip has no area; draw a polygon"),
        (_shape(points=[[1, 1]], shape_type="point"), "a point has no area"),
        (_shape(shape_type="line"), "a line has no area"),
        (_shape(shape_type="star"), "shape_type 'star' is not read; expected polygon"),
        (_shape(points=[[1, 1], [2, 2]]), "needs three corners or more, got 2"),
        (_shape(points=[[1, 1], [2, 2], [3, 3]]), "covers no pixel"),
        (_shape(points=[[1, 1], [2, math.nan], [3, 1]]), "must be a finite number of pixels"),
        (_shape(points=[[1, 1], [2, 10**30], [3, 1]]), "must be a finite number of pixels"),
        (_shape(points=[[1, 1], [2, 1e8], [3, 1]]), "y = 1e+08 lies far outside of the image"),
        (_shape(points=[[1, 1], [2, "3"], [3, 1]]), "y of a point must be a number, got '3'"),
        (_shape(points=[[1, 1], [2], [3, 1]]), "points must be a list of [x, y]"),
        (_shape(points=None), "points must be a list of [x, y]"),
        (_shape(points=[[1, 1], [1, 9]], shape_type="rectangle"), "a width and a height > 0"),
        (_shape(points=[[1, 1]], shape_type="rectangle"), "a rectangle has two points, got 1"),
        (_shape(points=[[1, 1], [1, 1]], shape_type="circle"), "needs radii > 0"),
        (_shape(points=[[1, 1], [9, 999]], shape_type="circle"), "more than twice the image"),
        (_shape(label=""), "the class must be a text that is not empty, got ''"),
        (_shape(label=None), "the class must be a text that is not empty, got None"),
        ("pear", "is not an object with label"),
        (_shape(points=SQUARE[:2], shape_type="mask"), "needs 'mask', the text of a PNG"),
        (_shape(points=SQUARE[:2], shape_type="mask", mask="?!"), "the mask is not base64"),
        (_shape(points=SQUARE[:2], shape_type="mask", mask="AAAA"), "of the mask cannot be read"),
        (
            _shape(points=[[1, 1], [9, 9]], shape_type="mask", mask=_png(np.ones((3, 3), bool))),
            "the mask is 3 x 3 (height x width), its box is 9 x 9",
        ),
        (
            _shape(
                points=[[90, 90], [92, 92]], shape_type="mask", mask=_png(np.ones((3, 3), bool))
            ),
            "covers no pixel",
        ),
    ],
)
def test_a_shape_that_cannot_be_read_is_told_with_file_and_place(tmp_path, shape, message):
    _write(tmp_path, [_shape(), shape, _shape("apple")])
    found = read_labelme(tmp_path)
    (fault,) = found.faults.lines
    assert fault.startswith(f"{tmp_path / 'a.json'}: shapes[1]")
    assert message in fault
    assert [o.class_name for o in found.images[0].objects] == ["pear", "apple"]


def test_an_object_with_a_part_that_cannot_be_read_is_left_out_whole(tmp_path):
    _write(tmp_path, [_shape(group_id=1), _shape(points=[[1, 1]], group_id=1), _shape("apple")])
    found = read_labelme(tmp_path)
    faulty, lost = found.faults.lines
    assert "shapes[1] (pear): a polygon needs three corners" in faulty
    assert "shapes[0] (pear): belongs to one object with" in lost and "a.json: shapes[1]" in lost
    assert [o.class_name for o in found.images[0].objects] == ["apple"]


def test_image_paths_are_found_beside_the_json_in_the_image_folder_and_with_any_slashes(tmp_path):
    photos, labels = tmp_path / "photos", tmp_path / "labels"
    _write(photos / "s", [_shape()], "a", imagePath="a.png")
    _write(photos / "s", [_shape()], "b", imagePath="C:\\Users\\me\\b.png")
    _write(photos / "s", [_shape()], "c", imagePath="..\\photos\\s\\c.png")
    _write(photos / "s", [_shape()], "d", imagePath="../../photos/s/d.png")
    assert [i.file_name for i in read_labelme(photos).images][:2] == ["s/a.png", "s/b.png"]
    (labels / "s").mkdir(parents=True)
    for path in photos.rglob("*.json"):
        path.rename(labels / "s" / path.name)
    found = read_labelme(labels, photos)
    assert found.faults.lines == []
    assert [i.file_name for i in found.images] == [f"s/{name}.png" for name in "abcd"]
    outside = read_labelme(labels)
    assert any("is not below the image folder" in line for line in outside.faults.lines)


def test_an_image_of_another_size_than_the_json_says_is_told(tmp_path):
    _write(tmp_path, [_shape()], imageHeight=WIDTH, imageWidth=HEIGHT)
    (fault,) = read_labelme(tmp_path).faults.lines
    assert "says 40 x 30 (height x width), the image is 30 x 40" in fault
    assert "without the EXIF rotation" in fault
    _write(tmp_path, [_shape()], imageHeight=60, imageWidth=80)
    (fault,) = read_labelme(tmp_path).faults.lines
    assert "says 60 x 80 (height x width), the image is 30 x 40; label this very file" in fault
    _write(tmp_path, [_shape()], imageHeight=None, imageWidth=None)
    assert read_labelme(tmp_path).faults.lines == []


def test_files_that_are_not_labels_or_label_twice_are_told(tmp_path):
    _write(tmp_path, [_shape()])
    _write(tmp_path, [_shape()], "b", imagePath="a.png")
    _write(tmp_path, [_shape()], "c", imagePath="gone.png")
    _write(tmp_path, [_shape()], "d", imagePath=None)
    (tmp_path / "e.json").write_text('{"images": []}')
    (tmp_path / "f.json").write_text('{"shapes": [\n}')
    (tmp_path / "g.json").write_text("[" * 100_000)
    (tmp_path / "out.json").write_text("{}")
    found = read_labelme(tmp_path, excluded=[tmp_path / "out.json"])
    faults = {line.split(".json")[0][-1]: line for line in found.faults.lines}
    assert sorted(faults) == ["b", "c", "d", "e", "f", "g"]
    assert "labels a.png, as" in faults["b"]
    assert "the image gone.png is neither beside the json nor below" in faults["c"]
    assert "imagePath must name the image, got None" in faults["d"]
    assert "is not a LabelMe file" in faults["e"]
    assert "line 2" in faults["f"]
    assert "cannot be read as json" in faults["g"]
    assert len(found.images) == 1
    assert found.notes == [f"3 images below {tmp_path} have no json: left out"]


def test_classes_follow_the_alphabet_or_the_names_given(tmp_path):
    _write(tmp_path, [_shape(" pear "), _shape("apple"), _shape("aple")])
    assert read_labelme(tmp_path).class_names == ("aple", "apple", "pear")
    found = read_labelme(tmp_path, names=["pear", "apple", "plum"])
    assert found.class_names == ("pear", "apple", "plum")
    (fault,) = found.faults.lines
    assert (
        "the class 'aple' is not among the names pear, apple, plum; did you mean 'apple'" in fault
    )


def test_a_folder_without_jsons_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no \.json in or below"):
        read_labelme(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_labelme(tmp_path / "nowhere")


def test_an_image_that_is_not_where_the_json_says_is_found_by_its_name_if_it_is_the_only_one(
    tmp_path,
):
    photos, labels = tmp_path / "photos", tmp_path / "labels"
    _write(labels, [_shape()])
    (photos / "train").mkdir(parents=True)
    (labels / "a.png").rename(photos / "train/a.png")
    found = read_labelme(labels, photos)
    assert found.faults.lines == []
    assert [image.file_name for image in found.images] == ["train/a.png"]
    (photos / "val").mkdir()
    Image.new("RGB", (WIDTH, HEIGHT)).save(photos / "val/a.png")
    (fault,) = read_labelme(labels, photos).faults.lines
    assert "the image a.png is neither beside the json nor below" in fault


def test_labels_of_no_objects_are_left_out_and_counted(tmp_path):
    _write(tmp_path, [_shape(), _shape("__ignore__"), _shape("_background_"), _shape("__ignore__")])
    found = read_labelme(tmp_path)
    assert found.class_names == ("pear",) and len(found.images[0].objects) == 1
    assert [note.split(" are")[0] for note in found.notes] == [
        "2 shapes labelled __ignore__",
        "1 shapes labelled _background_",
    ]


def test_hidden_jsons_are_no_labels_and_linked_folders_are_told(tmp_path):
    _write(tmp_path / "set", [_shape("new")])
    _write(tmp_path / "set/.ipynb_checkpoints", [_shape("old")], "a-checkpoint", imagePath="a.png")
    _write(tmp_path / "store", [_shape()], "b")
    (tmp_path / "set/linked").symlink_to(tmp_path / "store")
    (tmp_path / "set/a.json").rename(tmp_path / "set/a.JSON")
    found = read_labelme(tmp_path / "set")
    assert found.class_names == ("new",) and found.faults.lines == []
    text = "\n".join(found.notes)
    assert f"{tmp_path / 'set/linked'} -> {tmp_path / 'store'}" in text
    assert f"hidden or made by the system: 1: {tmp_path / 'set/.ipynb_checkpoints'}" in text


def test_an_image_of_another_spelling_is_named_and_a_coco_json_is_recognised(tmp_path):
    _write(tmp_path, [_shape()], imagePath="A%20b.png")
    (tmp_path / "a.png").rename(tmp_path / "a b.png")
    (tmp_path / "coco.json").write_text('{"images": [], "annotations": []}')
    spelling, coco = read_labelme(tmp_path).faults.lines
    assert (
        f"there is {tmp_path / 'a b.png'}: it differs in codes such as %20 and capital" in spelling
    )
    assert "is not a LabelMe file: a COCO json, which needs no import" in coco


def test_a_json_that_names_another_image_than_its_own_is_pointed_out(tmp_path):
    _write(tmp_path, [_shape()], "a")
    _write(tmp_path, [_shape()], "b")
    _write(tmp_path, [_shape()], "a", imagePath="c.png")
    (fault,) = read_labelme(tmp_path).faults.lines
    assert f"there is {tmp_path / 'a.png'}, called as the json is" in fault
    (tmp_path / "b.png").rename(tmp_path / "c.png")
    (tmp_path / "b.json").unlink()
    found = read_labelme(tmp_path)
    assert [image.file_name for image in found.images] == ["c.png"]
    assert found.notes[0].startswith("WARNING: 1 jsons name another image")
    assert f"{tmp_path / 'a.json'} labels c.png" in found.notes[0]
