"""`sparseinst check-data` from its arguments to its exit code, its lines and its page."""

import html.parser
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparseinst_jax import cli
from sparseinst_jax.cli import check_data
from sparseinst_jax.data.check_report import sheet_records
from sparseinst_jax.data.coco import load_coco
from sparseinst_jax.drawing import data_page
from sparseinst_jax.setup.config import load_config

CONFIGS = Path(__file__).parents[2] / "configs"
HOSTILE = "<script>alert('x')</script>&\"\u202e\x1b[31m\n猫"
NOISE = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)


def square(x, y, side):
    return [[x, y, x + side, y, x + side, y + side, x, y + side]]


def cut_square(x, y, side):
    """A square without a corner: no box."""
    end = x + side, y + side
    return [[x, y, end[0], y, end[0], end[1] - 2, end[0] - 2, end[1], x, end[1]]]


def annotation(number, image, segmentation, category=1):
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "segmentation": segmentation,
        "iscrowd": 0,
    }


def content_of(names, objects, classes=("cat", "dog")):
    """A json of images 80 x 60; `objects` are annotations."""
    return {
        "images": [
            {"id": i, "file_name": name, "height": 60, "width": 80} for i, name in enumerate(names)
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes, start=1)],
        "annotations": objects,
    }


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Four good images, `0.png` to `3.png`, two objects on each, in a working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for i in range(4):
        Image.fromarray(np.roll(NOISE, i, 1)).save(tmp_path / f"photos/{i}.png")
    objects = [
        annotation(2 * i + k, i, outline(9 + 20 * k, 9, 15), k + 1)
        for i in range(4)
        for k, outline in enumerate((square, cut_square))
    ]
    write(tmp_path / "train.json", content_of([f"{i}.png" for i in range(4)], objects))
    return tmp_path


def write(path, content):
    path.write_text(json.dumps(content))


def read(path):
    return json.loads(path.read_text())


def run(capsys, *arguments):
    """Exit code, lines and messages of `sparseinst check-data`."""
    code = cli.main(["check-data", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


class Page(html.parser.HTMLParser):
    """Tags and text of a page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.sources = [], "", []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_good_data_pass_and_are_counted(folder, capsys):
    code, out, err = run(capsys, "train.json", "--images", "photos")
    assert code == 0
    for line in (
        "train: train.json: 4 images, 8 objects, 2 classes",
        "  objects per class: cat 4, dog 4",
        "  image sizes (width x height): 80 x 60 to 80 x 60, 1 different; 4 landscape or square, "
        "0 portrait",
        "  files: 4 PNG RGB",
        "training can start; 0 warning(s)",
    ):
        assert line in out.splitlines()
    assert "checked 4/4 images" in err
    *_, title, command, remark = out.splitlines()
    assert remark.startswith("  # a small network from random weights; far better is")
    assert [title, command] == [
        "Next:",
        "  sparseinst train --config=finetune_small --config.data.train.annotations=train.json "
        "--config.data.train.images=photos --config.train.eval_every=0",
    ]
    sheet = Image.open(folder / "runs/check/train" / data_page.SHEET)
    assert sheet.width == 4 * 480 + 3 * 6
    page = Page(folder / "runs/check/train" / data_page.PAGE)
    assert "Training can start; 0 warnings." in page.text
    # Self-contained: nothing is fetched from anywhere.
    assert [source[:23] for source in page.sources] == ["data:image/jpeg;base64,"]


def test_every_fault_is_told_with_its_id_none_is_cut_and_the_exit_code_is_1(folder, capsys):
    content = read(folder / "train.json")
    objects = content["annotations"]
    objects += [annotation(100 + i, 0, square(float("nan"), 5, 5)) for i in range(30)]
    objects += [
        annotation(200, 99, square(5, 5, 5)),
        annotation(201, 0, square(5, 5, 5), 42),
        annotation(202, 0, [[1, 1, 2, 2]]),
        annotation(203, 0, {"size": [9, 9], "counts": "04P1"}),
        annotation(0, 0, square(5, 5, 5)),
        annotation(204, 0, square(500, 500, 5)),
    ]
    content["images"] += [
        {"id": 10, "file_name": "gone.png", "height": 60, "width": 80},
        {"id": 11, "file_name": "cut.png", "height": 60, "width": 80},
        {"id": 12, "file_name": "small.png", "height": 60, "width": 80},
        {"id": 13, "file_name": "dark.png", "height": 60, "width": 80},
        {"id": 3, "file_name": "3.png", "height": 60, "width": 80},
    ]
    write(folder / "train.json", content)
    whole = (folder / "photos/0.png").read_bytes()
    (folder / "photos/cut.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(NOISE[:30]).save(folder / "photos/small.png")
    # Twelve bits in a file of sixteen.
    Image.fromarray(NOISE[..., 0].astype(np.uint16) * 16).save(folder / "photos/dark.png")
    code, out, _ = run(capsys, "train.json", "--images", "photos", "--output", "out")
    assert code == 1
    page = Page(folder / "out" / data_page.PAGE)
    for heading, message in (
        ("FAULT: NaN or infinity: 30", "annotation 100 (0.png): a coordinate is NaN or infinite"),
        ("FAULT: annotation of an unknown image: 1", "annotation 200: unknown image_id 99"),
        ("FAULT: unknown category: 1", "annotation 201 (0.png): unknown category_id 42"),
        ("FAULT: run lengths: 1", "annotation 203 (0.png): run lengths of size [9, 9]"),
        ("FAULT: duplicate id: 2", "annotation id 0 occurs more than once"),
        ("FAULT: duplicate id: 2", "image id 3 occurs more than once: 3.png and 3.png"),
        ("FAULT: missing image file: 1", "image 10: the file photos/gone.png does not exist"),
        ("FAULT: image that cannot be read: 1", "image 11: image photos/cut.png cannot be read"),
        (
            "FAULT: image of another size than the json's: 1",
            "image 12: image photos/small.png is (30, 80) (height, width), the json says (60, 80)",
        ),
        ("WARNING: polygon with fewer than 3 points: 1", "annotation 202 (0.png): 1 polygons"),
        ("WARNING: mask without a pixel: 1", "annotation 204 (0.png): its mask has no pixel"),
        ("WARNING: image of few levels: 1", "photos/dark.png (PNG I;16) has only 16 of 256"),
    ):
        assert heading in out and message in out and message in page.text
    assert "... and 20 more, all on the page" in out
    for i in range(30):
        assert f"annotation {100 + i} (0.png): a coordinate" in page.text
    assert "training would FAIL: 38 fault(s)" in out
    assert "Training would fail: 38 faults." in page.text


def test_warnings_alone_leave_the_exit_code_0(folder, capsys):
    content = read(folder / "train.json")
    content["annotations"].append(annotation(50, 0, [[1, 1, 2, 2]]))
    content["categories"].append({"id": 3, "name": "owl"})
    write(folder / "train.json", content)
    code, out, _ = run(capsys, "train.json", "--images", "photos", "--config.model.num_masks=1")
    assert code == 0
    assert "4 images have more objects than the model has masks (1)" in out
    assert "1 of 3 classes have no object and cannot be learned: owl" in out
    assert "training can start; 3 warning(s)" in out
    assert " --config.model.num_masks=1\n" in out
    in_parts = ("--config.model.num_masks=1", "--config.eval.zoom=4")
    _, out, _ = run(capsys, "train.json", "--images", "photos", *in_parts)
    assert "more objects than" not in out


def test_hostile_names_change_neither_the_page_nor_the_terminal(folder, capsys):
    content = read(folder / "train.json")
    content["categories"][0]["name"] = HOSTILE
    markup = "<script>alert('1')</script>&lt;"  # letters like any other: shown as they are
    content["categories"][1]["name"] = markup
    Image.fromarray(NOISE).save(folder / "photos/hostile.png")
    (folder / "photos/hostile.png").rename(folder / "photos" / HOSTILE.replace("/", "_"))
    content["images"] += [
        {"id": 20, "file_name": HOSTILE.replace("/", "_"), "height": 60, "width": 80},
        {"id": 21, "file_name": "../" + HOSTILE, "height": 60, "width": 80},
        {"id": 22, "file_name": "nul\0.png", "height": 60, "width": 80},
        {"id": 23, "file_name": "half a letter \ud83d.png", "height": 60, "width": 80},
    ]
    content["annotations"].append(annotation(70, 20, square(9, 9, 20)))
    write(folder / "train.json", content)
    code, out, _ = run(capsys, "train.json", "--images", "photos", "--output", "out")
    assert code == 1 and "FAULT: file_name: 4" in out and "FAULT: class name: 1" in out
    assert "half a letter \\ud83d.png' holds the control character" in out
    assert "\x1b" not in out and "\u202e" not in out
    page = Page(folder / "out" / data_page.PAGE)
    assert "script" not in page.tags and page.tags.count("img") == 1
    assert markup in page.text
    assert "\x1b" not in page.text and "\u202e" not in page.text


def test_shared_images_and_classes_of_validation_data_are_told(folder, capsys):
    (folder / "val").mkdir()
    (folder / "val/copy.png").write_bytes((folder / "photos/2.png").read_bytes())
    Image.fromarray(255 - NOISE).save(folder / "val/own.png")
    objects = [annotation(1, 0, square(9, 9, 15)), annotation(2, 1, square(9, 9, 15), 3)]
    val = content_of(["copy.png", "own.png"], objects, ("cat", "dog", "owl"))
    write(folder / "val.json", val)
    data = ("train.json", "--images", "photos", "--val-json", "val.json", "--val-images", "val")
    code, out, _ = run(capsys, *data)
    assert code == 0
    assert "1 of 2 validation images are training images, too: 2.png = copy.png" in out
    assert "val.json has objects of owl, which train.json has none of" in out
    assert "val.json has no object of dog" in out
    write(folder / "val.json", content_of(["copy.png", "own.png"], objects[:1], ("bird",)))
    code, out, _ = run(capsys, *data, "--config.data.class_map=dog=cat")
    assert code == 1 and "val.json has none of the classes of train.json: bird against cat" in out


def test_chosen_classes_are_what_is_checked(folder, capsys):
    choice = ("--config.data.class_map=cat=pet", "--config.data.classes=pet")
    code, out, _ = run(capsys, "train.json", "--images", "photos", *choice)
    assert code == 0
    assert "train.json: 4 images, 4 objects, 1 classes" in out and "per class: pet 4" in out
    assert "objects of classes that were not chosen: 4, left out" in out
    code, _, err = run(capsys, "train.json", "--images", "photos", "--config.data.classes=dgo")
    assert code == 1 and "there is no class 'dgo'; did you mean 'dog'?" in err


def test_data_without_an_object_would_fail(folder, capsys):
    write(folder / "train.json", content_of(["0.png"], []))
    code, out, _ = run(capsys, "train.json", "--images", "photos")
    assert code == 1 and "FAULT: nothing to learn: 1" in out


def test_a_configuration_names_the_data_and_the_sizes(folder, capsys):
    config = load_config(
        CONFIGS / "tiny.py",
        {
            "data.generator": "",
            "data.train.images": "photos",
            "data.train.annotations": "train.json",
            "data.val.images": "photos",
            "data.val.annotations": "train.json",
        },
    )
    (folder / "mine.json").write_text(json.dumps(config.to_dict()))
    code, out, _ = run(capsys, "--config", "mine.json")
    assert code == 0
    assert "objects at train size 64: median 16 x 16 pixels" in out  # 15 at 60, and rounding
    assert "4 of 4 validation images are training images, too" in out
    assert out.endswith("Next:\n  sparseinst train --config=mine.json\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no data named: give a COCO json and --images DIR, or --config FILE"),
        (("train.json",), "give the folder of the images of train.json: --images DIR"),
        (
            ("train.json", "--images", "photos", "--val-images", "a"),
            "--val-images needs --val-json",
        ),
        (("gone.json", "--images", "photos"), "annotations file gone.json does not exist"),
        (("train.json", "--images", "nowhere"), "image folder nowhere does not exist"),
        (("train.json", "--images", "photos", "--config.data.size=3"), "not a key of the config"),
        (("train.json", "--images", "photos", "--output", "train.json"), "cannot be written"),
        (
            ("train.json", "--images", "photos", "--config.data.train_sizes=(900,)"),
            "config.data.train_sizes must be pixels > 0, none above config.data.train_max_size",
        ),
    ],
)
def test_wrong_arguments_are_told_in_one_message(folder, capsys, arguments, message):
    code, _, err = run(capsys, *arguments)
    assert code == 1 and err.startswith("error: ") and message in err
    assert not (folder / "runs").exists()


def test_the_sheet_shows_the_fullest_image_and_others_from_the_whole_data_set(folder):
    names = [f"{i % 4}.png" for i in range(40)]
    objects = [annotation(i, i, square(5, 5, 9)) for i in range(0, 40, 2)]
    objects += [annotation(100 + i, 30, square(20, 5, 9)) for i in range(30)]
    write(folder / "many.json", content_of(names, objects))
    dataset = load_coco(folder / "many.json", folder / "photos")
    chosen = [record.image_id for record in sheet_records(dataset.records, 4)]
    assert chosen == [30, 0, 18, 38]  # the others from those with objects: 0, 2, ... without 30
    sheet = data_page.draw_sheet(dataset, sheet_records(dataset.records, 4))
    assert sheet is not None and sheet.size == (4 * 480 + 3 * 6, 26 + 360)
    # The outline of the square at 5...14 on image 0, the second one, six times larger.
    inside = np.asarray(sheet)[26 + 57, 486 + 57].astype(int)
    plain = np.asarray(Image.open(folder / "photos/0.png").resize((480, 360)))[57, 57].astype(int)
    assert np.abs(inside - plain).max() > 20


def test_images_that_cannot_be_drawn_leave_no_old_sheet(folder):
    named = {"data.train.annotations": "train.json", "data.train.images": "photos"}
    config = load_config("base", {**named, "data.val.annotations": ""})
    data_page.write_page(check_data.check(config), folder / "out")
    assert (folder / "out" / data_page.SHEET).is_file()
    for path in (folder / "photos").iterdir():
        path.write_bytes(b"")
    data_page.write_page(check_data.check(config), folder / "out")
    assert [path.name for path in (folder / "out").iterdir()] == [data_page.PAGE]
