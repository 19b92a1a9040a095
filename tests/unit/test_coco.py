"""Reading COCO jsons, masks and images."""

import json
import struct

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from sparseinst_jax.data import check_dataset
from sparseinst_jax.data.coco import decode_mask, load_coco, read_image, read_record

SQUARE = [[2, 1, 6, 1, 6, 5, 2, 5]]  # x 2..6, y 1..5


def _content():
    return {
        "images": [
            {"id": 7, "file_name": "a.png", "height": 10, "width": 12},
            {"id": 3, "file_name": "sub/b.png", "height": 8, "width": 8},
        ],
        "categories": [{"id": 90, "name": "pear"}, {"id": 0, "name": "apple"}],
        "annotations": [
            _annotation(1, 7, 90, SQUARE),
            _annotation(2, 7, 0, {"size": [10, 12], "counts": [20, 5, 95]}, iscrowd=1),
        ],
    }


def _annotation(annotation_id, image_id, category_id, segmentation, iscrowd=0):
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": category_id,
        "segmentation": segmentation,
        "iscrowd": iscrowd,
        "area": 16,
    }


def _write(tmp_path, content):
    path = tmp_path / "train.json"
    path.write_text(json.dumps(content))
    return path


def test_labels_follow_the_sorted_category_ids_and_names_come_from_the_json(tmp_path):
    dataset = load_coco(_write(tmp_path, _content()), tmp_path)
    assert dataset.class_names == ("apple", "pear")
    assert dataset.category_ids == (0, 90)
    assert dataset.has_annotations
    assert [record.image_id for record in dataset.records] == [7, 3]
    assert dataset.records[1].path == str(tmp_path / "sub/b.png")
    first = dataset.records[0].annotations
    assert [(a.label, a.iscrowd, a.area, a.id) for a in first] == [
        (1, False, 16.0, 1),
        (0, True, 16.0, 2),
    ]
    assert [a.id for a in dataset.records[0].targets] == [1]
    assert dataset.num_targets.tolist() == [1, 0]
    assert dataset.image_sizes.tolist() == [[10, 12], [8, 8]]


def test_images_without_objects_are_dropped_when_asked(tmp_path):
    content = _content()
    content["annotations"].append(
        _annotation(3, 3, 90, {"size": [8, 8], "counts": [4, 60]}, iscrowd=1)
    )
    path = _write(tmp_path, content)
    assert len(load_coco(path, None).records) == 2
    # Image 3 has a crowd region only, which nothing is learnt from.
    assert [r.image_id for r in load_coco(path, None, keep_empty=False).records] == [7]


def test_dropping_every_image_is_refused(tmp_path):
    content = _content()
    content["annotations"] = []
    with pytest.raises(ValueError, match="nothing to learn: none of the 2 images"):
        load_coco(_write(tmp_path, content), None, keep_empty=False)


def test_a_list_without_annotations_is_accepted(tmp_path):
    content = _content()
    del content["annotations"]
    dataset = load_coco(_write(tmp_path, content), None, keep_empty=False)
    assert not dataset.has_annotations
    assert len(dataset.records) == 2
    assert check_dataset.describe(dataset)[-1].startswith(
        "no annotations: the file can be predicted, not"
    )
    assert check_dataset.warn(dataset, 100) == []


def test_all_faults_are_told_at_once_with_their_ids(tmp_path):
    content = _content()
    content["images"].append({"id": 7, "file_name": "c.png", "height": 4, "width": 4})
    content["images"].append({"id": 11, "file_name": "d.png", "width": 4})
    content["categories"].append({"id": 90, "name": "plum"})
    content["annotations"] += [
        _annotation(1, 3, 90, SQUARE),
        _annotation(4, 99, 90, SQUARE),
        _annotation(5, 3, 13, SQUARE),
        _annotation(6, 3, 90, {"size": [9, 9], "counts": "abc"}),
        _annotation(8, 3, 90, {"size": [8, 8], "counts": [1, 2]}),
        {"id": 9, "image_id": 3, "category_id": 90},
        _annotation("10", 3, 90, SQUARE),
    ]
    with pytest.raises(ValueError) as error:
        load_coco(_write(tmp_path, content), None)
    text = str(error.value)
    for part in (
        "train.json",
        "image id 7 occurs more than once: a.png and c.png",
        "images[3] (id 11): no height",
        "category id 90 occurs more than once",
        "annotation id 1 occurs more than once",
        "annotation 4: unknown image_id 99",
        "annotation 5 (sub/b.png): unknown category_id 13; the categories are 0, 90",
        "annotation 6 (sub/b.png): run lengths of size [9, 9]",
        "annotation 8 (sub/b.png): run lengths sum to 3",
        "(id 9): no segmentation",
        "annotations[8]: id must be an integer, got '10'",
        "10 fault(s)",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "ends in the middle"), ("[]", "results file"), ('{"images": []}', "categories")],
)
def test_a_file_that_is_not_coco_is_refused(tmp_path, content, message):
    path = tmp_path / "train.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_coco(path, None)


def test_missing_files_and_folders_are_named_with_the_cure(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.data\.train\.annotations"):
        load_coco(tmp_path / "none.json", None)
    path = _write(tmp_path, _content())
    with pytest.raises(FileNotFoundError, match=r"nowhere.*config\.data\.train\.images"):
        load_coco(path, tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match=r"none of the 2 image files is in .*a\.png does not exist"
    ):
        load_coco(path, tmp_path, check_files=True)


def test_polygons_without_three_corners_are_left_out_and_counted(tmp_path):
    content = _content()
    content["annotations"] += [
        _annotation(3, 3, 0, [[1, 1, 2, 2]]),
        _annotation(4, 3, 0, []),
        _annotation(5, 3, 0, [[1, 1, 2, 2], SQUARE[0]]),
    ]
    dataset = load_coco(_write(tmp_path, content), None)
    assert [a.id for a in dataset.records[1].annotations] == [5]
    assert dataset.records[1].annotations[0].segmentation == SQUARE
    assert dataset.num_without_mask == 2
    assert check_dataset.warn_of_unusable(dataset)[0].startswith(
        "2 objects have no polygon of three"
    )


def test_the_three_forms_of_a_mask_decode_to_the_same_pixels():
    expected = np.zeros((10, 12), bool)
    expected[1:5, 2:6] = True
    compressed = rle.encode(np.asfortranarray(expected.astype(np.uint8)))
    text = {"size": [10, 12], "counts": compressed["counts"].decode()}
    # Column-major runs: 21 pixels down to (row 1, column 2), then 4 on and 6 off per column.
    uncompressed = {"size": [10, 12], "counts": [21, 4, 6, 4, 6, 4, 6, 4, 65]}
    for segmentation in (SQUARE, compressed, text, uncompressed):
        mask = decode_mask(segmentation, 10, 12)
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, expected)


def _pixels():
    return np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 10


def test_broken_and_missing_images_are_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"broken\.png.*replace the file"):
        read_image(tmp_path / "broken.png")
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:400])
    with pytest.raises(ValueError, match=r"cut\.jpg"):
        read_image(tmp_path / "cut.jpg")
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        read_image(tmp_path / "gone.png")


@pytest.mark.parametrize(
    "error", [Image.DecompressionBombError("too large"), struct.error("cut"), SyntaxError("bad")]
)
def test_whatever_pillow_raises_names_the_image(tmp_path, monkeypatch, error):
    def fail(path, formats):
        raise error

    (tmp_path / "odd.png").write_bytes(b"odd")
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(ValueError, match=rf"odd\.png cannot be read \({error}\)"):
        read_image(tmp_path / "odd.png")


def test_an_image_of_far_too_many_pixels_is_refused(tmp_path, monkeypatch):
    Image.fromarray(_pixels()).save(tmp_path / "vast.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2)
    with pytest.raises(ValueError, match=r"vast\.png cannot be read .*decompression bomb"):
        read_image(tmp_path / "vast.png")


def test_an_image_of_another_size_than_the_json_says_is_refused(tmp_path):
    Image.fromarray(_pixels()).save(tmp_path / "a.png")
    dataset = load_coco(_write(tmp_path, _content()), tmp_path)
    with pytest.raises(ValueError, match=r"a\.png is \(2, 3\).*json says \(10, 12\)"):
        read_record(dataset.records[0])
