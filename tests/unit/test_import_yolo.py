"""YOLO segmentation labels to COCO."""

import numpy as np
import pytest
import yaml
from PIL import Image

from sparseinst_jax.data.coco import decode_mask
from sparseinst_jax.data.importers.yolo import read_yolo
from sparseinst_jax.data.importers.yolo_set import read_names

# x 2..6 and y 1..5 of an image of 20 x 10 (width x height): 4 x 4 pixels.
SQUARE = "0.1 0.1 0.3 0.1 0.3 0.5 0.1 0.5"


def _image(path, size=(10, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1]).save(path)


def _label(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _data_set(tmp_path, text=f"1 {SQUARE}\n"):
    _image(tmp_path / "images/a.png")
    _label(tmp_path / "labels/a.txt", text)
    (tmp_path / "data.yaml").write_text("names: [pear, 'apple']\n")
    return tmp_path


def test_a_line_becomes_a_polygon_in_pixels_with_the_area_and_box_of_its_mask(tmp_path):
    found = read_yolo(_data_set(tmp_path))
    assert found.faults.lines == []
    assert found.class_names == ("pear", "apple")
    assert found.images_dir == tmp_path / "images"
    (image,) = found.images
    assert (image.file_name, image.height, image.width) == ("a.png", 10, 20)
    (square,) = image.objects
    assert square == ("apple", [[2, 1, 6, 1, 6, 5, 2, 5]], 16, [2, 1, 4, 4])
    expected = np.zeros((10, 20), bool)
    expected[1:5, 2:6] = True
    np.testing.assert_array_equal(decode_mask(square.segmentation, 10, 20), expected)


def test_shares_are_of_the_image_as_it_is_seen_not_as_it_is_stored(tmp_path):
    _data_set(tmp_path)
    stored = Image.new("RGB", (10, 20))  # seen: 20 wide
    exif = stored.getexif()
    exif[0x0112] = 6
    stored.save(tmp_path / "images/a.png", exif=exif)
    (image,) = read_yolo(tmp_path).images
    assert (image.height, image.width) == (10, 20)
    assert image.objects[0].segmentation == [[2, 1, 6, 1, 6, 5, 2, 5]]


@pytest.mark.parametrize(
    ("image", "label", "source", "images_dir", "name"),
    [
        ("train/images/s/a.jpg", "train/labels/s/a.txt", ".", None, "train/images/s/a.jpg"),
        ("images/train/a.jpg", "labels/train/a.txt", ".", None, "train/a.jpg"),
        ("images/train/a.jpg", "labels/train/a.txt", ".", "images/train", "a.jpg"),
        ("images/train/a.jpg", "labels/train/a.txt", "labels/train", "images/train", "a.jpg"),
        ("d/a.jpg", "d/a.txt", "d", None, "a.jpg"),
        ("photos/a.jpg", "text/a.txt", "text", "photos", "a.jpg"),
    ],
)
def test_labels_are_found_in_the_usual_places(tmp_path, image, label, source, images_dir, name):
    _image(tmp_path / image)
    _label(tmp_path / label, f"0 {SQUARE}")
    (tmp_path / "data.yaml").write_text("names:\n  0: pear\n")
    found = read_yolo(tmp_path / source, images_dir and tmp_path / images_dir)
    assert found.faults.lines == []
    assert [(i.file_name, len(i.objects)) for i in found.images] == [(name, 1)]


def test_an_image_without_a_label_file_has_no_objects_and_this_is_said(tmp_path):
    _image(_data_set(tmp_path) / "images/b.png")
    found = read_yolo(tmp_path)
    assert [(i.file_name, len(i.objects)) for i in found.images] == [("a.png", 1), ("b.png", 0)]
    assert found.notes == [
        f"class names from {tmp_path / 'data.yaml'}: 0 pear, 1 apple",
        "1 images have no label file: taken as without objects",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.2 0.2", "5 numbers are a box, not an outline"),
        ("2 " + SQUARE, "class 2 has no name: the names are 0 pear, 1 apple"),
        ("0.5 " + SQUARE, "class 0.5 has no name"),
        ("0 0.1 0.1 0.3 0.1 0.3", "5 numbers after the class"),
        ("0 0.1 0.1 0.3 0.1 0.3 0.2 0.7", "7 numbers after the class"),
        ("0 0.1 0.1", "2 numbers after the class"),
        ("0 10 10 30 10 30 50", "shares of width and height, 0 ... 1, got 50"),
        ("0 0.1 0.1 0.3 -0.2 0.3 0.5", "got -0.2"),
        ("0 0.1 0.1 nan 0.1 0.3 0.5", "a coordinate must be a finite number"),
        ("0 0.1 0.1 inf 0.1 0.3 0.5", "a coordinate must be a finite number"),
        ("apple " + SQUARE, "expected numbers, class x y x y ..., got 'apple 0.1"),
        ("0 0.1 0.1 0.1 0.1 0.1 0.1", "covers no pixel"),
    ],
)
def test_a_line_that_cannot_be_read_is_told_with_file_and_line(tmp_path, line, message):
    found = read_yolo(_data_set(tmp_path, f"0 {SQUARE}\r\n\r\n{line}\r\n1 {SQUARE}\r\n"))
    (fault,) = found.faults.lines
    assert fault.startswith(f"{tmp_path / 'labels' / 'a.txt'}:3: ")
    assert message in fault
    assert [o.class_name for o in found.images[0].objects] == ["pear", "apple"]


def test_corners_a_little_outside_are_kept_and_counted_inside_only(tmp_path):
    found = read_yolo(_data_set(tmp_path, "0 -0.01 0.1 0.2 0.1 0.2 0.5 -0.01 0.5"))
    (found_object,) = found.images[0].objects
    assert found_object.segmentation[0][:2] == [-0.2, 1]
    assert (found_object.area, found_object.bbox) == (16, [0, 1, 4, 4])


def test_broken_images_and_files_that_belong_to_nothing_are_told(tmp_path):
    _data_set(tmp_path)
    (tmp_path / "images/b.png").write_bytes(b"not an image")
    _label(tmp_path / "labels/b.txt", f"0 {SQUARE}")
    _label(tmp_path / "labels/gone.txt", f"0 {SQUARE}")
    _label(tmp_path / "labels/README.txt", "Labels of our orchard")
    (tmp_path / "labels/c.txt").write_bytes(b"\xff\xfe0\x00")
    for name in ("c.png", "twice.png", "twice.jpg"):
        _image(tmp_path / "images" / name)
    _label(tmp_path / "labels/twice.txt", f"0 {SQUARE}")
    found = read_yolo(tmp_path)
    assert [image.file_name for image in found.images] == ["a.png"]
    text = "\n".join(found.faults.lines)
    for part in (
        r"b.png cannot be read",
        "c.txt: cannot be read as text",
        "gone.txt: no image of this name",
        "twice.txt: belongs to several images",
    ):
        assert part in text
    assert len(found.faults.lines) == 5  # twice.txt for each of its images


def test_what_is_missing_altogether_is_said_with_the_cure(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_yolo(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no class names.*data\.yaml.*--names"):
        read_yolo(tmp_path)
    with pytest.raises(ValueError, match=r"no image in or below.*--images"):
        read_yolo(tmp_path, names=["pear"])
    _image(tmp_path / "images/a.png")
    with pytest.raises(ValueError, match=r"no label file for any of the 1 images.*labels.a\.txt"):
        read_yolo(tmp_path, names=["pear"])


def test_images_and_labels_that_lie_elsewhere_in_the_set_are_pointed_out(tmp_path):
    _data_set(tmp_path)
    _image(tmp_path / "more/images/b.png")
    _label(tmp_path / "labels/val/c.txt", f"0 {SQUARE}")
    _label(tmp_path / "notes/README.txt", "Labels of our orchard")
    found = read_yolo(tmp_path)
    assert [image.file_name for image in found.images] == ["a.png"]
    images, labels = found.notes[1:]
    assert images.startswith(
        f"WARNING: 1 images are left out, such as {tmp_path / 'more/images/b.png'}"
    )
    assert labels.startswith(
        f"WARNING: 1 label files are left out, such as {tmp_path / 'labels/val/c.txt'}"
    )
    assert len(read_yolo(tmp_path, tmp_path / "images").notes) == 1


def test_a_label_file_in_capitals_is_found(tmp_path):
    _data_set(tmp_path)
    (tmp_path / "labels/a.txt").rename(tmp_path / "labels/a.TXT")
    found = read_yolo(tmp_path)
    assert len(found.images[0].objects) == 1 and len(found.notes) == 1


def test_two_label_files_of_one_image_are_refused_unless_they_are_equal(tmp_path):
    _label(_data_set(tmp_path) / "images/a.txt", f"0 {SQUARE}\n")
    (fault,) = read_yolo(tmp_path).faults.lines
    assert fault.startswith(f"{tmp_path / 'labels/a.txt'}: and {tmp_path / 'images/a.txt'} both")
    _label(tmp_path / "images/a.txt", f"1 {SQUARE}\n")
    assert read_yolo(tmp_path).faults.lines == []
    _label(tmp_path / "labels/a.TXT", f"0 {SQUARE}\n")
    assert "a.TXT: and " in read_yolo(tmp_path).faults.lines[0]


def test_hidden_files_and_checkpoints_of_notebooks_are_no_data(tmp_path):
    _data_set(tmp_path)
    _image(tmp_path / "images/.ipynb_checkpoints/a-checkpoint.png")
    _label(tmp_path / "labels/._a.txt", f"0 {SQUARE}")
    (tmp_path / "images/._a.png").write_bytes(b"\0")
    found = read_yolo(tmp_path)
    assert [image.file_name for image in found.images] == ["a.png"] and not found.faults.lines
    assert "hidden or made by the system: 2" in found.notes[1]


def test_images_that_training_would_refuse_to_open_are_refused_here(tmp_path):
    _image(tmp_path / "store/b.png")
    _data_set(tmp_path / "set")
    (tmp_path / "set/images/b.png").symlink_to(tmp_path / "store/b.png")
    (fault,) = read_yolo(tmp_path / "set").faults.lines
    assert "leads by a symbolic link" in fault


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat\n\ndog\n", ":2: the line is empty.*numbered by their lines"),
        ("\ncat", ":1: the line is empty"),
        ("# animals\ncat", ":1: the line is a comment"),
        ("0: cat\n0: dog", "gives a number to several names"),
    ],
)
def test_lines_that_would_shift_the_numbers_of_classes_are_refused(tmp_path, text, message):
    path = tmp_path / "classes.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_names(path)


def test_numbers_before_names_are_their_numbers(tmp_path):
    path = tmp_path / "Classes.TXT"
    path.write_text("2: cat\n1 : dog\n")
    assert read_names(path) == {1: "dog", 2: "cat"}
    path.write_text("0 cat\n1 dog\n")
    assert read_names(path) == {0: "cat", 1: "dog"}
    path.write_text("1 euro\n2 euro\n")
    assert read_names(path) == {0: "1 euro", 1: "2 euro"}


def test_the_names_beside_the_labels_count_and_files_that_disagree_are_refused(tmp_path):
    source = tmp_path / "above/set"
    _image(source / "images/a.png")
    _label(source / "labels/a.txt", f"1 {SQUARE}")
    _label(source / "labels/classes.txt", "cat\ndog")
    (tmp_path / "above/data.yaml").write_text("names: [pear, apple]")
    found = read_yolo(source)
    assert found.images[0].objects[0].class_name == "dog"
    assert found.notes == [
        f"class names from {source / 'labels/classes.txt'}: 0 cat, 1 dog",
        f"WARNING: {tmp_path / 'above/data.yaml'} is not used and names the classes differently",
    ]
    (source / "data.yaml").write_text("names: [cat, dog]")
    assert read_yolo(source).class_names == ("cat", "dog")
    (source / "data.yaml").write_text("names: [dog, cat]")
    with pytest.raises(ValueError, match=r"data.yaml and .*classes.txt name the classes"):
        read_yolo(source)
    assert read_yolo(source, names=["x", "y"]).notes[0] == "class names from --names: 0 x, 1 y"


@pytest.mark.parametrize("entry", ["kpt_shape: [17, 3]", "task: pose", "task: obb"])
@pytest.mark.parametrize("names", [None, ["person"]])
def test_labels_of_another_task_are_refused(tmp_path, entry, names):
    _data_set(tmp_path)
    (tmp_path / "data.yaml").write_text(f"names: [person]\n{entry}\n")
    with pytest.raises(ValueError, match=r"data.yaml has (kpt_shape|task).*another task.*polygons"):
        read_yolo(tmp_path, names=names)


def test_labels_that_read_as_boxes_and_keypoints_are_pointed_out(tmp_path):
    pose = "0 0.5 0.5 0.4 0.4 0.4 0.5 0.5 0.6 0 0 0.6 0.4"
    assert "as pose labels do" in read_yolo(_data_set(tmp_path, pose)).notes[-1]
    assert len(read_yolo(_data_set(tmp_path, f"{pose}\n0 {SQUARE}")).notes) == 1


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ("train: ../train/images\nval: ../valid/images\ntest: ../test/images", "train val test"),
        ("path: .\ntrain: [train, test]\nval: valid", "train val train"),
        ("train: list.txt\nval: test/images", "train  val"),
        ("train: https://example.org/a.zip\nval: 7", "  "),
    ],
)
def test_the_parts_of_a_data_set_are_those_of_its_yaml(tmp_path, entries, expected):
    for part in ("train", "valid", "test"):
        _image(tmp_path / part / "images/a.png")
        _label(tmp_path / part / "labels/a.txt", f"0 {SQUARE}")
    (tmp_path / "list.txt").write_text("./train/images/a.png\n")
    (tmp_path / "data.yaml").write_text(f"names: [pear]\n{entries}\n")
    parts = {image.file_name.split("/")[0]: image.part for image in read_yolo(tmp_path).images}
    assert [parts[part] for part in ("train", "valid", "test")] == expected.split(" ")


FORMS = [
    "names: [pear, 'an apple', \"plum, ripe\", it's]",
    "path: x\nnc: 4\nnames: ['pear', 'an apple', 'plum, ripe', \"it's\"] # four\ntrain: a",
    "names: [\n  pear,\n  'an apple',  # red\n  'plum, ripe', 'it''s'\n]\nnc: 4",
    "train: a\nnames:\n  - pear\n  - 'an apple'\n  - plum, ripe\n\n  - it's  # last\nval: b",
    'names:\n- pear\n- an apple\n- "plum, ripe"\n- it\'s\nnc: 4',
    "names:\n  0: pear\n  1: an apple\n  2: 'plum, ripe'\n  3: it's",
    "# names: [no]\nnames: {0: pear, 1: an apple, 2: 'plum, ripe', 3: it's}",
]


@pytest.mark.parametrize("text", FORMS)
def test_the_forms_of_names_are_read_as_yaml_reads_them(tmp_path, text):
    path = tmp_path / "data.yaml"
    path.write_text(text)
    expected = {0: "pear", 1: "an apple", 2: "plum, ripe", 3: "it's"}
    assert read_names(path) == expected
    by_library = yaml.safe_load(text)["names"]
    assert (by_library if isinstance(by_library, dict) else dict(enumerate(by_library))) == expected


def test_names_stay_as_they_are_written_and_an_anchor_is_read_once(tmp_path):
    path = tmp_path / "data.yaml"
    path.write_text("names: [yes, 007, 2012-01-01, null, ~, &a pear]\nx: [*a, *a]")
    names = ["yes", "007", "2012-01-01", "null", "~", "pear"]
    assert read_names(path) == dict(enumerate(names))
    # Each line ten of the one before: nothing is written out.
    bomb = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 40)]
    path.write_text("\n".join(["a0: &a0 [x, x]", *bomb, "names: [pear]"]))
    assert read_names(path) == {0: "pear"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: a", "0 entries 'names:'"),
        ("names: [a]\nnames: [b]", "2 entries 'names:'"),
        ("names: []", "no class names"),
        ("names:\ntrain: a", "no class names"),
        ("names: pear", "is not read"),
        ("names: *classes", "is not read"),
        ("names: [a, [b]]", "is not read"),
        ("names: [a, b", "is not read"),
        ("names: [a,, b]", "is not read"),
        ("names:\n  - a\n  - key: b", ":3: .*quote it"),
        ("names:\n  - a\n  - key:", ":3: .*quote it"),
        ("names:\n  - a\n  0: b", ":3: is not read as YAML"),
        ("names:\n  pear: 0", ":2: .*is not read"),
        ("names: " + "[" * 5000, "nested too deeply"),
        ("#" * (1 << 20) + "\nnames: [a]", "more than 1048576 bytes"),
        ("names:\n  0: a\n  0: b", "class 0 occurs more than once"),
        ("names: [a, '']", "empty name"),
        ("names: [a, b, a]", "gives the name 'a' to several classes"),
        ("nc: 3\nnames: [a, b]", "nc: 3 and has 2 names"),
    ],
)
def test_names_that_are_not_clear_are_refused_not_guessed(tmp_path, text, message):
    path = tmp_path / "data.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_names(path)
    assert str(path) in str(error.value)


def test_a_list_of_lines_names_the_classes_too(tmp_path):
    _data_set(tmp_path)
    (tmp_path / "data.yaml").rename(tmp_path / "unused")
    (tmp_path / "classes.txt").write_text("plum\n quince \n\n")
    assert read_yolo(tmp_path).class_names == ("plum", "quince")
    assert read_yolo(tmp_path, names=["x", "y"]).images[0].objects[0].class_name == "y"


def test_a_wrong_image_folder_is_recognised_and_the_right_one_named(tmp_path):
    _image(tmp_path / "photos/train/a.jpg")
    _label(tmp_path / "text/a.txt", f"0 {SQUARE}")
    with pytest.raises(ValueError, match=r"no label file.*is --images .*photos.train meant\?"):
        read_yolo(tmp_path / "text", tmp_path / "photos", names=["pear"])
