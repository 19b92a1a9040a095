"""`sparseinst start`: the labels of every tool are found, and one command leads to a run."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from sparseinst_jax import cli
from sparseinst_jax.cli import start
from sparseinst_jax.data.importers import detect
from sparseinst_jax.runtime.files import write_json
from sparseinst_jax.setup import published
from sparseinst_jax.setup.config import load_config
from tests import smallest

pytestmark = pytest.mark.usefixtures("quick_compilation")

NUMBER, HEIGHT, WIDTH = 5, 48, 64
CORNERS = [(8, 6), (40, 6), (40, 30), (8, 30)]  # x, y


def draw_photos(folder):
    folder.mkdir(parents=True)
    for i in range(NUMBER):
        pixels = np.full((HEIGHT, WIDTH, 3), 20 * i, np.uint8)
        pixels[6:30, 8:40] = 255
        Image.fromarray(pixels).save(folder / f"{i}.png")


def write_labelme(folder):
    draw_photos(folder)
    for i in range(NUMBER):
        shape = dict(label="box", points=CORNERS, shape_type="polygon", group_id=None)
        content = dict(shapes=[shape], imagePath=f"{i}.png", imageHeight=HEIGHT, imageWidth=WIDTH)
        (folder / f"{i}.json").write_text(json.dumps(content))


def write_yolo(folder):
    draw_photos(folder / "images")
    (folder / "labels").mkdir()
    (folder / "classes.txt").write_text("box\n")
    words = " ".join(f"{x / WIDTH} {y / HEIGHT}" for x, y in CORNERS)
    for i in range(NUMBER):
        (folder / "labels" / f"{i}.txt").write_text(f"0 {words}\n")


def write_via(folder):
    draw_photos(folder)
    xs, ys = zip(*CORNERS, strict=True)
    shape = dict(name="polygon", all_points_x=xs, all_points_y=ys)
    regions = [dict(shape_attributes=shape, region_attributes={"kind": "box"})]
    entries = {
        f"{i}.png": dict(filename=f"{i}.png", size=-1, regions=regions, file_attributes={})
        for i in range(NUMBER)
    }
    (folder / "via.json").write_text(json.dumps({"_via_img_metadata": entries}))


def coco_content(numbers):
    outline = [float(n) for corner in CORNERS for n in corner]
    entry = dict(category_id=7, iscrowd=0, segmentation=[outline], area=768, bbox=[8, 6, 32, 24])
    return {
        "images": [dict(id=i, file_name=f"{i}.png", height=HEIGHT, width=WIDTH) for i in numbers],
        "annotations": [dict(entry, id=i + 1, image_id=i) for i in numbers],
        "categories": [dict(id=7, name="box"), dict(id=8, name="never seen")],
    }


def write_coco(folder):
    draw_photos(folder / "photos of mine")
    (folder / "labels.json").write_text(json.dumps(coco_content(range(NUMBER))))


def write_divided_coco(folder):
    draw_photos(folder / "images")
    (folder / "my_train.json").write_text(json.dumps(coco_content(range(3))))
    (folder / "my_val.json").write_text(json.dumps(coco_content(range(3, NUMBER))))


WRITERS = {
    "LabelMe": write_labelme,
    "YOLO": write_yolo,
    "VIA": write_via,
    "COCO": write_coco,
    "COCO divided": write_divided_coco,
}


@pytest.fixture
def on_a_laptop(monkeypatch):
    monkeypatch.setattr(start, "may_have_accelerator", lambda: False)
    monkeypatch.setattr(start, "find_weights", lambda: ("", "WARNING: from random weights"))


@pytest.mark.parametrize("name", WRITERS)
def test_labels_of_every_tool_become_a_plan(name, tmp_path, on_a_laptop):
    folder, output = tmp_path / "mine", tmp_path / "out"
    WRITERS[name](folder)
    plan = start.make_plan(folder, output, 20)
    assert plan.lines[0] == f"{name.split()[0]} labels in {folder}: 5 objects: box 5"
    held_out = 2 if name == "COCO divided" else 1
    assert plan.lines[1] == f"{NUMBER - held_out} photos to learn from, {held_out} to test on"
    assert len(plan.lines) <= 10
    assert (output / "check" / "index.html").is_file()
    parts = [json.loads((output / f"{part}.json").read_text()) for part in ("train", "val")]
    names = [{image["file_name"] for image in part["images"]} for part in parts]
    assert not names[0] & names[1] and len(names[0] | names[1]) == NUMBER
    assert plan.config == "finetune_small"
    left_out = "never seen" if name.startswith("COCO") else None
    assert plan.overrides.get("data.exclude_classes") == left_out


def test_the_plan_follows_objects_minutes_and_the_machine(monkeypatch, on_a_laptop):
    monkeypatch.setattr(start.os, "sched_getaffinity", lambda _: range(2))
    monkeypatch.setattr(start, "_probe", lambda: start.PROBE_SECONDS)

    def chosen(side, number, minutes):
        image = dict(id=1, height=320, width=427)
        entries = [dict(image_id=1, category_id=1, area=side**2)] * number
        content = {"images": [image], "annotations": entries}
        return start.choose(content, minutes)[1]

    large = chosen(40, 10, 20)
    assert large["data.eval_size"] == "(320, 427)" and large["model.num_masks"] == "50"
    assert int(large["train.num_steps"]) == 20 * 60 * 2 / (0.12 * 4)
    few = chosen(13, 10, 20)
    assert few["data.eval_size"] == "(416, 555)" and "eval.zoom" not in few
    assert int(few["train.num_steps"]) == round(5000 / 1.3**2)
    assert chosen(2, 10, 20)["data.eval_size"] == "(512, 683)"
    assert chosen(30, 90, 20)["model.num_masks"] == "120"
    many = chosen(15, 90, 20)  # in parts, three times as large
    assert many["eval.zoom"] == "3.0" and many["data.lsj_range"] == "(2.25, 3.90)"
    assert many["data.eval_size"] == "(320, 427)" and many["model.num_masks"] == "50"
    monkeypatch.setattr(start, "_probe", lambda: 2 * start.PROBE_SECONDS)
    assert int(chosen(40, 10, 20)["train.num_steps"]) == 2500


def test_a_run_is_trained_evaluated_and_continued(tmp_path, on_a_laptop, capsys):
    folder, output = tmp_path / "mine", tmp_path / "out"
    write_labelme(folder)
    command = ["start", str(folder), f"--output={output}"]
    assert cli.main(command) == 2  # nobody can be asked
    assert not (output / "plan.json").exists()
    plan = start.make_plan(folder, output, 20)
    data = {key: value for key, value in plan.overrides.items() if key.endswith(("ons", "images"))}
    overrides = data | {"data.generator": ""}
    small = dataclasses.replace(plan, config=smallest.__file__, overrides=overrides)
    write_json(output / "plan.json", dataclasses.asdict(small))
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert f"continuing {output}" in printed
    assert printed.rstrip().splitlines()[-4] == "Next:"
    assert (output / "run" / "eval" / "plots" / "per_class.csv").is_file()
    steps = (output / "run" / "metrics.csv").read_text()
    assert cli.main(command) == 0  # nothing is left to train
    assert (output / "run" / "metrics.csv").read_text() == steps


def test_folders_without_labels_are_refused_in_words(tmp_path, capsys):
    draw_photos(tmp_path / "photos")
    (tmp_path / "photos" / "readme.txt").write_text("hello\n")
    assert cli.main(["start", str(tmp_path / "photos"), f"--output={tmp_path / 'out'}"]) == 1
    assert "holds 5 photos and no labels that can be read" in capsys.readouterr().err
    assert cli.main(["start", str(tmp_path / "nothing"), f"--output={tmp_path / 'out'}"]) == 1
    assert "is no folder" in capsys.readouterr().err


def test_weights_of_the_installed_package_come_first(tmp_path, monkeypatch):
    folder = tmp_path / published.LITE0_PACKAGE / "models"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "lite.pth").touch()
    monkeypatch.syspath_prepend(tmp_path)
    source, words = start.find_weights()
    backbone, decoder = published.local_sources(source)
    assert backbone == folder / "lite.pth" and "of the installed" in words
    assert decoder.is_file()  # in the package, as its configuration fits it
    assert load_config("finetune_lite").train.init_from == source


def test_without_any_weights_the_cost_is_said(monkeypatch):
    def refuse(name):
        raise ValueError(f"{name} could not be downloaded")

    monkeypatch.setattr(start, "local_weights", refuse)
    path, words = start.find_weights()
    assert path == "" and "several times as many" in words and "-pytorch-model" in words


def test_names_of_parts_are_seen(tmp_path):
    paths = [tmp_path / name for name in ("train/a.json", "valid/a.json", "test/a.json")]
    for path in paths:
        path.parent.mkdir()
        path.write_text("{}")
    train, val, rest = detect.coco_parts(paths, tmp_path)
    assert (train, val, rest) == (paths[0], paths[1], [paths[2]])
