"""The drawn demo data set."""

import numpy as np
import pytest

from sparseinst_jax.data.coco import decode_mask, load_coco, read_record
from sparseinst_jax.data.shapes import draw_image, draw_shapes_dataset


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
    from sparseinst_jax.data import shapes

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes, "draw_image", fail)
    with pytest.raises(KeyboardInterrupt):
        draw_shapes_dataset(tmp_path / "shapes", 2, 1)
    assert list(tmp_path.iterdir()) == []


def test_the_drawing_stays_the_same_over_releases():
    # Recorded values; arithmetic may differ in the last bit, so pixels are compared by their mean.
    image, labels, masks = draw_image(0, 3)
    content = {"labels": [1, 2, 1], "areas": [891, 946, 1277], "mean": [99.741, 95.886, 154.355]}
    assert labels.tolist() == content["labels"]
    assert masks.sum((1, 2)).tolist() == content["areas"]
    np.testing.assert_allclose(image.mean((0, 1)), content["mean"], atol=0.01)
