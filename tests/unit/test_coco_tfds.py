"""The TFDS data set of COCO instances: built from a folder, the same as the folder."""

import json
import os
import pickle
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

tfds = pytest.importorskip("tensorflow_datasets")
# TFDS 4.9.10 needs it and relies on etils to bring it, which etils 1.15 no longer does.
pytest.importorskip("importlib_resources")

from sparseinst_jax.data import tfds as our_tfds  # noqa: E402
from sparseinst_jax.data._index import cache as index_cache  # noqa: E402
from sparseinst_jax.data.coco import DatasetSelection, load_coco, read_record, without_empty  # noqa: E402
from sparseinst_jax.data.loader import train_batches  # noqa: E402
from sparseinst_jax.data.plan import TrainPlan  # noqa: E402
from sparseinst_jax.data.shapes import draw_shapes_dataset  # noqa: E402
from sparseinst_jax.data.tfds import SplitSource, build, index_tfds, record_of  # noqa: E402
from sparseinst_jax.evaluation.coco_metrics import evaluate  # noqa: E402

POLYGON = [[1.5, 2.0, 30.0, 2.0, 30.0, 40.25]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Drawn images, of which some are JPEG turned by EXIF, grey, and without objects."""
    root = draw_shapes_dataset(tmp_path_factory.mktemp("data") / "shapes", 9, 3, seed=26)
    content = json.loads((root / "train.json").read_text())
    content["images"].reverse()  # neither ids nor names are sorted
    first, turned, grey, empty = content["images"][:4]
    photo = Image.open(root / "images/train" / turned["file_name"])
    exif = Image.Exif()
    exif[0x0112] = 6
    turned["file_name"] = "turned.jpg"
    turned["height"], turned["width"] = turned["width"], turned["height"]
    photo.save(root / "images/train/turned.jpg", exif=exif)
    Image.open(root / "images/train" / grey["file_name"]).convert("L").save(
        root / "images/train" / grey["file_name"]
    )
    away = {empty["id"], turned["id"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] not in away]
    own = [a for a in content["annotations"] if a["image_id"] == first["id"]]
    own[0]["segmentation"], own[0]["area"] = POLYGON, None
    own.append(own[0] | {"id": 900, "image_id": turned["id"], "area": 3.25})
    own.append(own[0] | {"id": 901, "iscrowd": 1, "segmentation": _runs(first)})
    content["annotations"] += own[-2:]
    (root / "train.json").write_text(json.dumps(content))
    return root


def _runs(image):
    number = image["height"] * image["width"]
    return {"size": [image["height"], image["width"]], "counts": [5, 40, number - 45]}


@pytest.fixture(scope="module")
def sources(folder):
    return {
        split: SplitSource(folder / f"{split}.json", folder / "images" / split)
        for split in ("train", "val")
    }


@pytest.fixture(scope="module")
def built(sources, tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    before = our_tfds.SHARD_SIZE
    our_tfds.SHARD_SIZE = 4000  # bytes: several shards
    try:
        build(root, sources)
    finally:
        our_tfds.SHARD_SIZE = before
    return root


def _from_folder(folder, split="train", **options):
    return load_coco(folder / f"{split}.json", folder / "images" / split, **options)


def test_tfds_alone_reads_records_and_pixels_as_they_went_in_and_in_their_order(folder, built):
    source = tfds.data_source("coco_instances", split="train", data_dir=str(built))
    records = list(_from_folder(folder).records)
    assert len(source) == len(records) == 9
    assert len(list((built / "coco_instances/1.0.0").glob("*train*array_record*"))) > 1
    for record, example in zip(records, source, strict=True):
        back = record_of(example)
        assert (back.image_id, back.file_name) == (record.image_id, record.file_name)
        assert (back.annotations, back.path) == (record.annotations, None)
        if record.file_name != "turned.jpg":  # TFDS does not turn
            pixels = np.broadcast_to(example["image"], (record.height, record.width, 3))
            np.testing.assert_array_equal(pixels, read_record(record))
    builder = tfds.builder_from_directory(str(built / "coco_instances/1.0.0"))
    val = _from_folder(folder, "val")
    assert builder.info.features["objects"]["label"].names == list(val.class_names)
    assert builder.info.metadata["category_ids"] == [1, 2, 3]
    assert "tensorflow" not in sys.modules


def _from_shards(name, data_dir, *, keep_empty=True, **selection):
    dataset, faults = index_tfds(name, data_dir, DatasetSelection(**selection))
    faults.raise_if_fatal()
    return dataset if keep_empty else without_empty(dataset)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("keep_empty", [True, False])
def test_every_image_and_record_equals_that_of_the_folder(folder, built, split, keep_empty):
    expected = _from_folder(folder, split, keep_empty=keep_empty)
    found = _from_shards(f"coco_instances/{split}", built, keep_empty=keep_empty)
    assert len(found.records) == len(expected.records)
    for one, other in zip(found.records, expected.records, strict=True):
        assert (one.image_id, one.file_name, one.annotations, one.height, one.width) == (
            other.image_id, other.file_name, other.annotations, other.height, other.width
        )  # fmt: skip
        np.testing.assert_array_equal(read_record(one), read_record(other))
    for name in ("class_names", "category_ids", "has_annotations"):
        assert getattr(found, name) == getattr(expected, name)
    np.testing.assert_array_equal(found.num_targets, expected.num_targets)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_training_batches_equal_those_of_the_folder(folder, built, num_workers):
    selection = {
        "classes": ("striped disc", "plain triangle"),
        "annotation_filter": "paddledetection",
    }
    options = {"augmentation": "flip_resize_crop", "copy_paste": 0.5, "crowd": "ignore"}
    batches = []
    for dataset, workers in (  # of processes that read a folder: `test_loader`
        (_from_folder(folder, keep_empty=False, **selection), 0),
        (_from_shards("coco_instances/train", built, keep_empty=False, **selection), num_workers),
    ):
        plan = TrainPlan(
            dataset.image_sizes, dataset.num_targets, seed=1, batch_size=4, train_sizes=(64, 96),
            train_max_size=128, **options,
        )  # fmt: skip
        batches.append(list(train_batches(dataset, plan, 3, 4, num_workers=workers)))
    assert batches[0][0].is_target.any()
    for first, second in zip(*batches, strict=True):
        for a, b in zip(first, second, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"classes": ("striped disc",)},
        {"class_map": ("striped disc=round", "dotted square=round")},
    ],
)
def test_detections_have_the_scores_that_they_have_against_the_json(folder, built, choice):
    json_set = _from_folder(folder, **choice)
    stored, _ = index_tfds("coco_instances/train", built, DatasetSelection(**choice))
    rng = np.random.default_rng(0)
    results = [
        {"image_id": record.image_id, "category_id": json_set.category_ids[annotation.label],
         "segmentation": annotation.segmentation, "score": float(rng.random())}
        for record in json_set.records
        for annotation in record.annotations
        if rng.random() < 0.7
    ]  # fmt: skip
    expected = evaluate(json_set.truth, results, json_set.classes)
    assert json_set.truth == str(folder / "train.json")
    assert evaluate(stored.truth, results, stored.classes).as_dict() == expected.as_dict()
    assert 0 < expected["AP"] < 1


def test_opening_a_split_reads_no_shard_and_goes_to_workers_by_name(built, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(built, copy)
    for shard in (copy / "coco_instances/1.0.0").glob("*array_record*"):
        shard.write_bytes(b"")
    dataset = _from_shards("coco_instances/train", copy)
    assert len(dataset.records) == 9 and dataset.num_targets.sum() > 0
    assert len(pickle.dumps(dataset.records)) < 2000
    with pytest.raises(ValueError, match=r"image \d+ of coco_instances/train in .* its shard"):
        read_record(dataset.records[0])


def test_shards_of_another_data_set_than_the_index_are_refused(built, tmp_path):
    shutil.copytree(built, tmp_path / "copy")
    directory = tmp_path / "copy/coco_instances/1.0.0"
    first, *_, last = sorted(directory.glob("*train*array_record*"))
    content = first.read_bytes()
    first.write_bytes(last.read_bytes())
    last.write_bytes(content)
    dataset = _from_shards("coco_instances/train", tmp_path / "copy")
    with pytest.raises(ValueError, match=r"the shards hold image .* build the data set again"):
        read_record(dataset.records[0])


def test_a_large_index_is_mapped_from_the_cache_into_the_data_set(
    sources, built, tmp_path, monkeypatch
):
    monkeypatch.setattr(index_cache, "MIN_SIZE", 0)
    monkeypatch.setenv(index_cache.VARIABLE, str(tmp_path / "cache"))
    folder = build(tmp_path / "again", sources)
    for split in ("train", "val"):
        for file in (built / f"coco_instances/1.0.0/index-{split}").iterdir():
            assert (folder / f"index-{split}" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("coco", "must be such as \"coco_instances/train\", got 'coco'; only coco_instances has"),
        ("coco/train", "only coco_instances has masks"),
        ("coco_instances", "must be such as"),
        ("coco_instances/test", "has no split 'test'; it has train, val; build it by"),
        ("coco_instances:2.0.0/train", "is of version 2.0.0, this program reads 1.0.0"),
    ],
)
def test_a_wrong_name_is_refused_with_the_cure(built, name, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        index_tfds(name, built, DatasetSelection())


def test_what_is_missing_or_damaged_is_named(built, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no coco_instances/train in .*config.data.tfds"):
        index_tfds("coco_instances/train", tmp_path / "nowhere", DatasetSelection())
    shutil.copytree(built, tmp_path / "copy")
    directory = tmp_path / "copy/coco_instances/1.0.0"
    shard = sorted(directory.glob("*train*array_record*"))[0]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=rf"1 of \d+ shards .*{shard.name}"):
        index_tfds("coco_instances/train", tmp_path / "copy", DatasetSelection())
    (directory / "index-val/image_ids.bin").unlink()
    with pytest.raises(ValueError, match=r"the index of coco_instances/val .* is damaged"):
        index_tfds("coco_instances/val", tmp_path / "copy", DatasetSelection())
    (directory / "dataset_info.json").unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        index_tfds("coco_instances/train", tmp_path / "copy", DatasetSelection())
    directory.rename(directory.with_name("0.9.0"))
    with pytest.raises(FileNotFoundError, match=r"there is version 0\.9\.0"):
        index_tfds("coco_instances/train", tmp_path / "copy", DatasetSelection())


def test_nothing_half_written_is_left_behind(folder, sources, built, tmp_path):
    with pytest.raises(ValueError, match="exists already"):
        build(built, sources)
    other = json.loads((folder / "val.json").read_text())
    for entry in other["categories"]:
        entry["name"] += "s"
    (tmp_path / "other.json").write_text(json.dumps(other))
    val = SplitSource(tmp_path / "other.json", folder / "images/val")
    with pytest.raises(ValueError, match="different categories"):
        build(tmp_path / "new", {**sources, "val": val})
    shutil.copytree(folder / "images/train", tmp_path / "images")
    broken = load_coco(folder / "train.json", tmp_path / "images").records[-1]
    with open(broken.path, "wb") as file:
        file.write(b"broken")
    with pytest.raises(ValueError, match=rf"{broken.file_name} cannot be read"):
        build(tmp_path / "new", {"train": SplitSource(folder / "train.json", tmp_path / "images")})
    os.unlink(broken.path)
    with pytest.raises(ValueError, match=rf"the file .*{broken.file_name} does not exist"):
        build(tmp_path / "new", {"train": SplitSource(folder / "train.json", tmp_path / "images")})
    left = [path for path in (tmp_path / "new").rglob("*") if path.is_file()]
    assert left == []
