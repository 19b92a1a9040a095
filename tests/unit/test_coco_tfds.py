"""The TFDS data set of COCO instances."""

import dataclasses
import sys

import numpy as np
import pytest

tfds = pytest.importorskip("tensorflow_datasets")
# TFDS 4.9.10 needs it and relies on etils to bring it, which etils 1.15 no longer does.
pytest.importorskip("importlib_resources")

from sparseinst_jax.data.coco import load_coco, read_record  # noqa: E402
from sparseinst_jax.data.coco_tfds import build, record_of  # noqa: E402
from sparseinst_jax.data.shapes import draw_shapes_dataset  # noqa: E402


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = draw_shapes_dataset(tmp_path_factory.mktemp("data") / "shapes", 4, 2, seed=26)
    return {
        split: load_coco(root / f"{split}.json", root / "images" / split)
        for split in ("train", "val")
    }


def test_records_and_pixels_come_back_as_they_went_in(drawn, tmp_path):
    polygon = [[1.5, 2.0, 30.0, 2.0, 30.0, 40.25]]
    drawn["train"].records = list(drawn["train"].records)
    first = drawn["train"].records[0]
    first.annotations[0] = first.annotations[0]._replace(segmentation=polygon, iscrowd=True)
    build(tmp_path, drawn)
    source = tfds.data_source("coco_instances", split="train", data_dir=str(tmp_path))
    assert len(source) == 4
    read = {
        record.image_id: (record, example) for example in source for record in [record_of(example)]
    }
    for record in drawn["train"].records:
        back, example = read[record.image_id]
        assert back == dataclasses.replace(record, path=None)
        np.testing.assert_array_equal(example["image"], read_record(record))
    builder = build(tmp_path, drawn)
    assert builder.info.features["objects"]["label"].names == list(drawn["val"].class_names)
    assert builder.info.metadata["category_ids"] == [1, 2, 3]
    assert "tensorflow" not in sys.modules


def test_splits_of_different_categories_are_refused(drawn, tmp_path):
    other = dataclasses.replace(drawn["val"], category_ids=(4, 5, 6))
    with pytest.raises(ValueError, match="different categories"):
        build(tmp_path, {"train": drawn["train"], "val": other})
