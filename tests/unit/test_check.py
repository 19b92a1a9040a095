"""What is said of a data set before it is trained on: counts, losses, shared images."""

import json

import numpy as np
import pytest
from pycocotools import mask as rle

from sparseinst_jax.data import check_dataset
from sparseinst_jax.data.coco import index_coco, load_coco
from sparseinst_jax.data.segmentations import compressed_length
from sparseinst_jax.setup import datasets
from sparseinst_jax.setup.config import load_config

SIZE = 64


def block(rows, columns, size=SIZE):
    """Run lengths of a rectangle: (first, end) of rows and columns."""
    mask = np.zeros((size, size), np.uint8, order="F")
    mask[slice(*rows), slice(*columns)] = 1
    encoded = rle.encode(mask)
    return {"size": [size, size], "counts": encoded["counts"].decode()}


def make(folder, objects, names=("a.png",), classes=("owl", "cat"), file="train.json"):
    """Write a json; `objects` are (image index, label, segmentation) or with iscrowd."""
    content = {
        "images": [
            {"id": i, "file_name": name, "height": SIZE, "width": SIZE}
            for i, name in enumerate(names)
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes)],
        "annotations": [
            {
                "id": number,
                "image_id": image,
                "category_id": label,
                "segmentation": segmentation,
                "iscrowd": int(bool(crowd)),
            }
            for number, (image, label, segmentation, *crowd) in enumerate(objects)
        ],
    }
    (folder / file).write_text(json.dumps(content))
    return folder / file


# Halving takes the pixels 1, 3, 5, ... (Pillow's nearest neighbour); of each 4 x 4 block of the
# result the inner 2 x 2 count at the stride of the masks, which are 3 and 5, 11 and 13, ... here.
GONE = block((0, 1), (0, 1))
THIN = block((1, 2), (1, 2))
SMALL = block((2, 6), (2, 6))  # 3 and 5: one cell of four, which counts for 16 pixels
LARGE = block((0, 32), (0, 32))  # 16 x 16 pixels after halving


def test_objects_that_a_resize_loses_are_counted_as_worked_out_by_hand(tmp_path):
    objects = [(0, 0, mask) for mask in (GONE, THIN, SMALL, LARGE)]
    dataset = load_coco(make(tmp_path, objects), None)
    found = check_dataset.count_lost(dataset, SIZE // 2, 1000, 8)
    assert (found.num_gone, found.num_thin, found.num_small, found.num_lost) == (1, 1, 1, 2)
    assert (found.num_checked, found.num_objects) == (4, 4)
    assert found.worst == (("a.png", 0), ("a.png", 1))
    assert found.median_side == pytest.approx(((0 + 16) / 2) ** 0.5)  # of 0, 0, 16, 256
    # At the full size only the objects outside the inner pixels 1, 2, 5, 6, ... are lost.
    found = check_dataset.count_lost(dataset, SIZE, 1000, 8)
    assert (found.num_gone, found.num_thin) == (0, 1)
    # The longest side limits the resize, too.
    assert check_dataset.count_lost(dataset, SIZE, SIZE // 2, 8).num_lost == 2


def test_the_warning_of_lost_objects_says_how_many_where_and_what_to_raise(tmp_path):
    objects = [(0, 0, mask) for mask in (GONE, THIN, SMALL, LARGE)]
    dataset = load_coco(make(tmp_path, objects), None)
    lost = check_dataset.lost_at_ends(dataset, (48, SIZE // 2, SIZE), 1000, 8)
    assert [found.shortest for found in lost] == [SIZE // 2, SIZE]
    first, second = check_dataset.warn_of_lost(lost, 1000)
    assert first == (
        "2 of 4 objects (50 %) are lost at the train size 32 (longest side 1000): 1 have no pixel "
        "left and are dropped, 1 have none at stride 4, that of the masks (the activation maps "
        "have stride 8); such as annotation 0 of a.png. Raise config.data.train_sizes, "
        "train_max_size and eval_size together"
    )
    assert second.startswith("1 of 4 objects (25 %) are lost at the train size 64")
    only_large = load_coco(make(tmp_path, [(0, 0, LARGE)]), None)
    assert (
        check_dataset.warn_of_lost(check_dataset.lost_at_ends(only_large, (32, 64), 1000, 8), 1000)
        == []
    )


def test_of_many_objects_some_spread_over_all_images_are_looked_at(tmp_path):
    objects = [(image, 0, GONE if image < 5 else LARGE) for image in range(10) for _ in range(10)]
    dataset = load_coco(make(tmp_path, objects, [f"{i}.png" for i in range(10)]), None)
    found = check_dataset.count_lost(dataset, SIZE // 2, 1000, map_stride=8, most=20)
    assert (found.num_checked, found.num_objects, found.num_gone) == (20, 100, 10)
    assert check_dataset.warn_of_lost([found], 1000)[0].startswith("about 50 of 100 objects (50 %)")


def test_more_objects_than_masks_are_counted_and_the_key_to_raise_is_named(tmp_path):
    objects = [(0, 0, LARGE)] * 3 + [(1, 1, LARGE)] * 5 + [(1, 1, LARGE, True)]
    dataset = load_coco(make(tmp_path, objects, ("a.png", "b.png")), None)
    assert check_dataset.warn(dataset, 5) == []
    assert check_dataset.warn(dataset, 2) == [
        "2 images have more objects than the model has masks (2), b.png has 5: the best 2 are "
        "matched, the other 4 are not learned; raise --config.model.num_masks to 5 or more"
    ]
    lines = check_dataset.describe(dataset)
    assert lines[0].endswith("train.json: 2 images, 8 objects, 2 classes")
    assert lines[1] == "objects per class: owl 3, cat 5"
    assert lines[2] == (
        "objects per image: mean 4.0, most 5, images without objects 0, crowd regions 1"
    )


def test_more_objects_than_coco_counts_are_told(tmp_path):
    dataset = load_coco(make(tmp_path, [(0, 0, LARGE)] * 101, classes=("owl",)), None)
    (line,) = check_dataset.warn(dataset, 200)
    assert line.startswith("1 images have more than 100 objects: COCO's AP counts the best 100")


def test_classes_without_objects_are_told(tmp_path):
    dataset = load_coco(make(tmp_path, [(0, 1, LARGE)]), None)
    (line,) = check_dataset.warn(dataset, 10)
    assert line.startswith("1 of 2 classes have no object and cannot be learned: owl;")
    val = load_coco(make(tmp_path, [(0, 0, LARGE)], file="val.json"), None)
    first, second = check_dataset.warn_of_classes(dataset, val)
    assert "val.json has objects of owl, which" in first and "their AP will be 0" in first
    assert "val.json has no object of cat: their AP cannot be measured" in second
    assert check_dataset.warn_of_classes(val, val) == []


def test_images_shared_by_two_data_sets_are_found_by_name_and_by_content(tmp_path):
    for folder, contents in {
        "train": {"a": b"same", "b": b"1234", "c": b"copy", "d": b"long one"},
        "val": {"a": b"same", "b": b"4321", "x": b"copy", "y": b"own"},
    }.items():
        (tmp_path / folder).mkdir()
        for name, content in contents.items():
            (tmp_path / folder / name).write_bytes(content)
    train = load_coco(make(tmp_path, [], "abcd"), tmp_path / "train")
    val = load_coco(make(tmp_path, [], "abxy", file="val.json"), tmp_path / "val")
    # b has one name and two contents; the bytes of c are those of x.
    assert check_dataset.find_overlap(train, val) == [("a", "a")]
    both = check_dataset.find_overlap(train, val, every_file=True)
    assert both == [("a", "a"), ("c", "x")]
    assert check_dataset.warn_of_overlap(both, 4) == [
        "2 of 4 validation images are training images, too: a, c = x; AP on these says nothing "
        "about new images. Take them out of one json"
    ]
    assert len(check_dataset.find_overlap(train, train)) == 4
    no_images = load_coco(tmp_path / "val.json", None)
    assert check_dataset.find_overlap(train, no_images) == [("a", "a"), ("b", "b")]


def test_a_file_named_twice_is_found(tmp_path):
    dataset = load_coco(make(tmp_path, [], ("a", "b", "a")), None)
    assert check_dataset.find_repeated(dataset) == ["a"]


def test_the_brief_check_before_a_run_says_it_all_and_opens_no_image(tmp_path):
    path = make(tmp_path, [(0, 1, GONE), (0, 1, LARGE), (0, 1, LARGE)])
    config = load_config("configs/tiny.py", {"model.num_masks": "2", "data.train_sizes": "(32,)"})
    lines = datasets.brief_check(config, load_coco(path, tmp_path))
    assert lines[0].endswith("1 images, 3 objects, 2 classes")
    warnings = [line for line in lines if line.startswith("WARNING: ")]
    assert len(warnings) == 3
    assert "no object and cannot be learned: owl" in warnings[0]
    assert "raise --config.model.num_masks to 3" in warnings[1]
    assert "1 of 3 objects (33 %) are lost at the train size 32" in warnings[2]
    assert lines[-1].startswith("`sparseinst check-data`")


@pytest.mark.parametrize("seed", range(3))
def test_compressed_run_lengths_add_up_to_the_image(seed):
    rng = np.random.default_rng(seed)
    for _ in range(50):
        height, width = rng.integers(1, 300, 2)
        mask = (rng.random((height, width)) < rng.random() ** 3).astype(np.uint8)
        mask[: rng.integers(0, 300)] = 0  # a long run of several letters
        counts = rle.encode(np.asfortranarray(mask))["counts"]
        assert compressed_length(counts) == height * width
    assert compressed_length("04P1") == 36  # pycocotools itself decodes it for any size
    for wrong in ("", "zz", "ü", "\0", "P" * 20 + "0"):
        assert compressed_length(wrong) is None


@pytest.mark.parametrize(
    ("segmentation", "kind", "text", "is_fatal"),
    [
        ([[1, 1, 5, 5]], "polygon with fewer than 3 points", "the object is left out", False),
        ([], "polygon with fewer than 3 points", "0 polygons, not one; the object", False),
        (
            [[1, 1, 5, 5], [1, 1, 9, 1, 9, 9]],
            "polygon with fewer than 3 points",
            "2 polygons, 1 with fewer than 3 points; these are left out",
            False,
        ),
        ([[1, 1, 9, 1, 9, 9, 3]], "odd polygon", "1 with an odd number of coordinates", False),
        ([[1, 1, float("nan"), 1, 9, 9]], "NaN or infinity", "NaN or infinite", True),
        ([[1, 1, float("-inf"), 1, 9, 9]], "NaN or infinity", "NaN or infinite", True),
        ([[1, 1, "9", 1, 9, 9]], "coordinates", "must be numbers", True),
        ([[1, 1, None, 1, 9, 9]], "coordinates", "must be numbers", True),
        ([[1, 1, 1e9, 1, 9, 9]], "coordinates", "the coordinate 1e+09 px", True),
        ([1, 1, 9, 1, 9, 9], "segmentation", "not a list of polygons", True),
        ("mask.png", "segmentation", "a str, not polygons", True),
        ({"size": [9, 9], "counts": "04P1"}, "run lengths", "of size [9, 9], image is", True),
        ({"size": 64, "counts": "04P1"}, "run lengths", "of size 64, image is", True),
        ({"size": [64, 64], "counts": "04P1"}, "run lengths", "sum to 36, not", True),
        ({"size": [64, 64], "counts": "ab~"}, "run lengths", "cannot be decoded", True),
        ({"size": [64, 64], "counts": [4097, -1]}, "run lengths", "0 or more", True),
        ({"size": [64, 64], "counts": [4095]}, "run lengths", "sum to 4095", True),
        ({"size": [64, 64]}, "run lengths", "without counts", True),
    ],
)
def test_a_mask_that_cannot_be_used_is_a_fault_with_its_annotation_and_image(
    tmp_path, segmentation, kind, text, is_fatal
):
    path = make(tmp_path, [(0, 0, LARGE), (0, 1, segmentation)])
    dataset, faults = index_coco(path, None)
    (fault,) = faults
    assert (fault.kind, fault.is_fatal) == (kind, is_fatal)
    assert fault.message.startswith("annotation 1 (a.png): ") and text in fault.message
    kept = dataset.records[0].annotations
    assert [a.id for a in kept] == ([0, 1] if "these are left out" in text else [0])
    if is_fatal:
        with pytest.raises(ValueError, match=r"1 fault\(s\)[\s\S]*annotation 1 \(a\.png\)"):
            load_coco(path, None)
    else:
        assert len(load_coco(path, None).records[0].annotations) == len(kept)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("area", "large", "area must be a number of px², got 'large'"),
        ("area", float("nan"), "area must be a number of px², got nan"),
        ("iscrowd", "no", "iscrowd must be 0 or 1, got 'no'"),
        ("image_id", 77, "unknown image_id 77"),
        ("category_id", 77, "unknown category_id 77; the categories are 0, 1"),
        ("category_id", "owl", "category_id must be an integer, got 'owl'"),
        ("segmentation", None, "no segmentation; boxes alone cannot be learned from"),
    ],
)
def test_a_wrong_value_of_an_annotation_is_a_fault(tmp_path, key, value, text):
    path = make(tmp_path, [(0, 0, LARGE)])
    content = json.loads(path.read_text())
    content["annotations"][0][key] = value
    path.write_text(json.dumps(content))
    _, faults = index_coco(path, None)
    (fault,) = faults
    assert text in fault.message and fault.is_fatal


def test_a_file_in_another_folder_is_found_and_named(tmp_path):
    (tmp_path / "photos/train").mkdir(parents=True)
    (tmp_path / "photos/train/a.png").write_bytes(b"")
    _, faults = index_coco(make(tmp_path, []), tmp_path / "photos", check_files=True)
    (fault,) = faults
    assert fault.message.endswith("photos/train/a.png: was another folder meant?")
