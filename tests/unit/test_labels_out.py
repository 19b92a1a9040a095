"""Predictions as labels, tables and other libraries' objects: what is written reads back equal."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparseinst_jax import cli
from sparseinst_jax.data.coco import load_coco
from sparseinst_jax.data.importers.labelme import read_labelme
from sparseinst_jax.data.outlines import EXACT, outlines
from sparseinst_jax.data.segmentations import decode_mask
from sparseinst_jax.runner.prediction import Prediction
from sparseinst_jax.runner.run_lengths import encode_masks
from tests.unit.test_predictor import draw_image, predictor, weights  # noqa: F401

ROOT = Path(__file__).parents[2]
HEIGHT, WIDTH = 37, 52


def blob(rng) -> np.ndarray:
    """A smooth shape, perhaps of several parts or with holes, also at the border."""
    coarse = Image.fromarray(rng.normal(size=(6, 7)).astype(np.float32))
    return np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)) > 0.5


def special() -> dict[str, np.ndarray]:
    masks = {name: np.zeros((HEIGHT, WIDTH), bool) for name in ("dot", "two", "ring", "line")}
    masks["dot"][0, 0] = masks["two"][3:6, 2:9] = masks["two"][20:30, 30:40] = True
    masks["two"][6, 9] = True  # touches by a corner alone
    masks["ring"][5:15, 5:15], masks["line"][10, :] = True, True
    masks["ring"][8:12, 8:12] = False
    masks["all"] = np.ones((HEIGHT, WIDTH), bool)
    return masks


def prediction(masks) -> Prediction:
    number = len(masks)
    return Prediction(
        np.zeros((HEIGHT, WIDTH, 3), np.uint8),
        encode_masks(np.stack(masks)) if number else [],
        np.linspace(0.9, 0.3, number).astype(np.float32),
        np.arange(number) % 2,
        ("pear", "fig"),
        (7, 9),
    )


def test_outlines_enclose_the_same_pixels(rng):
    masks = [*special().values(), *(blob(rng) for _ in range(30))]
    traced = 0
    for mask in masks:
        polygons = outlines(mask)
        if polygons is None:
            continue
        traced += 1
        flat = [polygon.ravel().tolist() for polygon in polygons]
        np.testing.assert_array_equal(decode_mask(flat, HEIGHT, WIDTH), mask)
    assert traced >= 25 and outlines(special()["ring"]) is None


def test_a_tolerance_leaves_corners_out_and_little_of_the_shape(rng):
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    disc = (y - 18) ** 2 + (x - 25) ** 2 < 150
    (exact,), (coarse,) = outlines(disc), outlines(disc, 1.0)
    assert len(coarse) < 0.4 * len(exact)
    found = decode_mask([coarse.ravel().tolist()], HEIGHT, WIDTH)
    assert (found & disc).sum() / (found | disc).sum() > 0.9
    assert EXACT < 0.5


def test_labelme_reads_back_the_same_masks_classes_and_groups(tmp_path, rng):
    masks = [*special().values(), *(blob(rng) for _ in range(6))]
    found = prediction(masks)
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "a.png")
    content = found.to_labelme("a.png", score_threshold=0.35)
    (tmp_path / "a.json").write_text(json.dumps(content))
    kinds = {shape["shape_type"] for shape in content["shapes"]}
    assert kinds == {"polygon", "mask"} and content["imageData"] is None
    assert content["shapes"][0]["description"] == "score 0.90"
    read = read_labelme(tmp_path)
    assert read.faults.lines == []
    shown = found.above(0.35)
    assert len(read.images[0].objects) == len(shown) == len(masks) - 1
    for one, wanted in zip(read.images[0].objects, shown, strict=True):
        assert one.class_name == wanted.class_name
        np.testing.assert_array_equal(decode_mask(one.segmentation, HEIGHT, WIDTH), wanted.mask)


def test_a_table_holds_a_row_for_each_object():
    table = prediction(list(special().values())).to_table()
    assert list(table) == ["class_name", "score", "x0", "y0", "x1", "y1", "pixels"]
    rows = list(zip(*table.values(), strict=True))
    assert rows[2] == ("pear", pytest.approx(0.6), 5.0, 5.0, 15.0, 15.0, 84)
    assert prediction([]).to_table()["score"] == []
    json.dumps(table)


def test_supervision_gets_what_we_found(monkeypatch):
    pytest.importorskip("supervision")
    found = prediction(list(special().values()))
    detections = found.to_supervision()
    np.testing.assert_array_equal(detections.mask, found.masks)
    np.testing.assert_array_equal(detections.xyxy, found.boxes_xyxy)
    np.testing.assert_array_equal(detections.confidence, found.scores)
    assert detections.data["class_name"].tolist() == found.class_names
    assert detections.class_id.tolist() == found.labels.tolist()
    assert len(prediction([]).to_supervision()) == 0
    assert len(detections[detections.confidence > 0.5]) == 3
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ValueError, match="pip install"):
        found.to_supervision()


def test_the_documented_recipe_for_large_photos_runs(predictor, tmp_path, rng):  # noqa: F811
    """As docs/other_tools.md has it, with small slices."""
    pytest.importorskip("supervision")
    text = (ROOT / "docs/other_tools.md").read_text()
    (recipe,) = re.findall(r"```python\n(import numpy as np\nimport supervision.*?)```", text, re.S)
    Image.fromarray(draw_image(rng, 100, 240)).save(tmp_path / "large.png")
    recipe = recipe.replace("large.jpg", str(tmp_path / "large.png"))
    recipe = recipe.replace("(1024, 1024)", "(96, 64)").replace("(128, 128)", "(16, 16)")
    names = {"predictor": predictor}
    exec(recipe, names)
    detections = names["detections"]
    assert len(detections) > 3 and detections.mask.shape[1:] == (100, 240)
    assert detections.xyxy[:, 2].max() > 96  # of other slices than the first, too


def test_the_command_writes_labels_and_a_table(stored_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images = stored_run.parent / "data/images/train"
    output = ["--output", "out", "--score-threshold", "0.2"]
    forms = ["--to", "labelme", "--to", "coco", "--to", "table"]
    assert cli.main(["predict", "--workdir", str(stored_run), str(images), *output, *forms]) == 0
    said = capsys.readouterr().out
    assert "4 jsons of LabelMe: out/labelme" in said and "--to=labelme" in said
    results = [
        entry
        for entry in json.loads(Path("out/predictions.json").read_text())
        if entry["score"] >= 0.2
    ]
    assert results
    dataset = load_coco("out/annotations.json", images)
    wanted = [(e["image_id"] + 1, e["category_id"], e["segmentation"]) for e in results]
    read = [
        (record.image_id, dataset.category_ids[one.label], one.segmentation, record)
        for record in dataset.records
        for one in record.annotations
    ]
    assert [each[:2] for each in read] == [each[:2] for each in wanted]
    for (_, _, one, record), (_, _, rle) in zip(read, wanted, strict=True):
        height, width = record.height, record.width
        np.testing.assert_array_equal(
            decode_mask(one, height, width), decode_mask(rle, height, width)
        )
    back = read_labelme(Path("out/labelme"), images)
    assert back.faults.lines == [] and sum(len(i.objects) for i in back.images) == len(results)
    rows = list(csv.DictReader(Path("out/predictions.csv").open()))
    assert [float(row["score"]) for row in rows] == pytest.approx([e["score"] for e in results])
    assert rows[0]["file_name"] == "000001.png"
