"""The drawn demo data set."""

import json

import numpy as np
import pytest

from sparseinst_jax.data import shapes
from sparseinst_jax.data.coco import decode_mask, load_coco, read_record
from sparseinst_jax.data.shapes import draw_if_missing, draw_image, draw_shapes_dataset


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return draw_shapes_dataset(tmp_path_factory.mktemp("data") / "shapes", 12, 5, seed=0)


def test_the_files_hold_what_was_drawn(drawn):
    dataset = load_coco(drawn / "train.json", drawn / "images/train", check_files=True)
    assert dataset.class_names == ("striped disc", "dotted square", "plain triangle")
    assert len(dataset.records) == 12
    for index, record in enumerate(dataset.records):
        image, labels, masks = draw_image(0, index)
        np.testing.assert_array_equal(read_record(record), image)
        assert [a.label for a in record.annotations] == labels.tolist()
        for annotation, mask in zip(record.annotations, masks, strict=True):
            decoded = decode_mask(annotation.segmentation, record.height, record.width)
            np.testing.assert_array_equal(decoded, mask)
            assert annotation.area == mask.sum()


def test_validation_images_come_from_another_seed(drawn):
    dataset = load_coco(drawn / "val.json", drawn / "images/val")
    assert len(dataset.records) == 5
    np.testing.assert_array_equal(read_record(dataset.records[0]), draw_image(1, 0)[0])
    assert not np.array_equal(draw_image(1, 0)[0], draw_image(0, 0)[0])


def test_the_images_are_as_hard_as_promised():
    images = [draw_image(5, index) for index in range(300)]
    counts = np.array([len(labels) for _, labels, _ in images])
    assert 0.02 < np.mean(counts == 0) < 0.09
    assert set(counts) == set(range(9))
    labels = np.concatenate([labels for _, labels, _ in images])
    assert np.bincount(labels).min() > 0.28 * len(labels)
    upright = np.mean([image.shape[0] > image.shape[1] for image, _, _ in images])
    assert 0.17 < upright < 0.33
    areas = np.concatenate([masks.sum((1, 2)) for _, _, masks in images if len(masks)])
    assert areas.min() >= 40 and np.percentile(areas, 10) < 400 and areas.max() > 3000
    for _, _, masks in images:
        assert masks.sum(0).max(initial=0) <= 1  # visible masks are disjoint
    assert min(image.std() for image, _, _ in images) > 8  # no flat background


def test_surfaces_tell_the_classes_apart():
    # Share of pixels whose right neighbour differs strongly: stripes and dots have edges inside.
    edges = {0: [], 1: [], 2: []}
    for index in range(60):
        image, labels, masks = draw_image(6, index)
        step = abs(np.diff(image.astype(int), axis=1)).sum(2) > 90
        for label, mask in zip(labels, masks.astype(bool), strict=True):
            inside = mask[:, 1:] & mask[:, :-1]
            if inside.sum() > 60:
                edges[int(label)].append(step[inside].mean())
    assert np.mean(edges[2]) < 0.03
    assert min(np.mean(edges[0]), np.mean(edges[1])) > 0.1


def test_drawing_again_changes_nothing_and_other_arguments_are_refused(drawn):
    before = (drawn / "train.json").stat().st_mtime_ns
    assert draw_shapes_dataset(drawn, 12, 5, seed=0) == drawn
    assert (drawn / "train.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="name another folder or remove it"):
        draw_shapes_dataset(drawn, 13, 5, seed=0)


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="other files"):
        draw_shapes_dataset(tmp_path, 1, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_killed_run_leaves_no_half_data_set(tmp_path, monkeypatch):
    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes, "draw_image", fail)
    with pytest.raises(KeyboardInterrupt):
        draw_shapes_dataset(tmp_path / "shapes", 2, 1)
    assert list(tmp_path.iterdir()) == []


def _draw_little(monkeypatch):
    """Let `draw_if_missing` draw one image of each split."""
    monkeypatch.setattr(
        shapes, "draw_shapes_dataset", lambda folder: draw_shapes_dataset(folder, 1, 1)
    )


@pytest.mark.parametrize("exists", [False, True])
def test_a_missing_or_empty_folder_is_drawn_into_once(tmp_path, monkeypatch, capsys, exists):
    _draw_little(monkeypatch)
    folder = tmp_path / "shapes"
    if exists:
        folder.mkdir()
    draw_if_missing(folder / "train.json", folder / "val.json")
    assert sorted(p.name for p in folder.iterdir()) == ["images", "train.json", "val.json"]
    assert capsys.readouterr().out == f"drawing the shapes data set in {folder}\n"
    before = (folder / "val.json").stat().st_mtime_ns
    draw_if_missing(str(folder / "train.json"), str(folder / "val.json"))
    assert (folder / "val.json").stat().st_mtime_ns == before
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("shapes/train.json", "other/val.json"),
        ("shapes/train.json", "shapes/vall.json"),
        ("shapes/mine.json", "shapes/val.json"),
        ("full/train.json", "full/val.json"),
        ("full/mine.txt/train.json", "full/mine.txt/val.json"),
    ],
)
def test_mistyped_paths_are_left_to_the_reader_of_the_json(tmp_path, train, val):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    draw_if_missing(tmp_path / train, tmp_path / val)
    assert [p.name for p in tmp_path.iterdir()] == ["full"]
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_coco(tmp_path / train, None)


@pytest.mark.parametrize("content", ["{", "[]", '{"info": {"settings": "mine"}}', "{}"])
def test_data_of_another_origin_is_not_spoken_about(tmp_path, content):
    (tmp_path / "val.json").write_text(content)
    draw_if_missing(tmp_path / "train.json", tmp_path / "val.json")
    assert (tmp_path / "val.json").read_text() == content


@pytest.mark.parametrize(("version", "named"), [(None, "an earlier version"), (99, "version 99")])
def test_shapes_of_another_version_are_refused_with_the_cure(tmp_path, version, named):
    folder = draw_shapes_dataset(tmp_path / "shapes", 1, 1)
    content = json.loads((folder / "val.json").read_text())
    assert content["info"]["settings"].pop("version") == shapes.DRAWING_VERSION
    if version is not None:
        content["info"]["settings"]["version"] = version
    (folder / "val.json").write_text(json.dumps(content))
    message = rf"shapes as {named} of the drawing.*remove the folder"
    with pytest.raises(ValueError, match=message):
        draw_if_missing(folder / "train.json", folder / "val.json")
    with pytest.raises(ValueError, match=message):
        draw_shapes_dataset(folder, 1, 1)


def test_the_drawing_stays_the_same_over_releases():
    # A new value here needs a new DRAWING_VERSION.
    # Recorded values; arithmetic may differ in the last bit, so pixels are compared by their mean.
    image, labels, masks = draw_image(0, 3)
    content = {"labels": [1, 2, 1], "areas": [891, 946, 1277], "mean": [99.741, 95.886, 154.355]}
    assert labels.tolist() == content["labels"]
    assert masks.sum((1, 2)).tolist() == content["areas"]
    np.testing.assert_allclose(image.mean((0, 1)), content["mean"], atol=0.01)


def test_the_empty_place_of_a_runs_data_is_not_drawn_into(tmp_path, monkeypatch):
    _draw_little(monkeypatch)
    folder = tmp_path / "shapes"
    folder.mkdir()
    jsons = folder / "train.json", folder / "val.json"
    with pytest.raises(ValueError, match=f"{folder} is empty, where the run had its"):
        draw_if_missing(*jsons, had_data=True)
    assert not any(folder.iterdir())
    folder.rmdir()  # nothing can be mounted there
    draw_if_missing(*jsons, had_data=True)
    assert (folder / "val.json").is_file()
