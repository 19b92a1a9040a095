"""What `check-data` finds in a json that contradicts itself, without and with its images."""

import json

import numpy as np
import pytest
from PIL import Image

from sparseinst_jax.data import check_dataset
from sparseinst_jax.data.check_report import make_report
from sparseinst_jax.data.coco import index_coco, load_coco
from sparseinst_jax.data.doubtful_labels import warn_of_sides
from sparseinst_jax.setup.config import load_config

WIDTH, HEIGHT = 80, 60
NOISE = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
PENTAGON = [8, 10, 28, 10, 38, 25, 20, 50, 8, 40]  # 870 pixels in x 8...38, y 10...50
AREA, BOX = 870, [8, 10, 30, 40]
PHOTOS = tuple(f"{i}.png" for i in range(4))


def entry(number, image, polygon=PENTAGON, category=1, **others):
    content = {"id": number, "image_id": image, "category_id": category, "iscrowd": 0}
    return content | {"segmentation": [list(polygon)], "area": AREA, "bbox": BOX} | others


def write(folder, annotations, names=PHOTOS, classes=("cat", "dog"), save=True, **options):
    for name in names if save else ():
        (folder / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        shift = len(list((folder / "photos").rglob("*")))
        Image.fromarray(np.roll(NOISE, shift, 1)).save(folder / "photos" / name, **options)
    content = {
        "images": [
            {"id": i, "file_name": name, "height": HEIGHT, "width": WIDTH}
            for i, name in enumerate(names)
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes, start=1)],
        "annotations": annotations,
    }
    (folder / "train.json").write_text(json.dumps(content))


def check(folder, **options):
    """Warnings on a json, on both jsons together, and the messages of its faults."""
    (folder / "photos").mkdir(exist_ok=True)
    dataset, faults = index_coco(folder / "train.json", folder / "photos")
    report = make_report({"train": (dataset, faults)}, 100, 8, (HEIGHT,), 853, 1, **options)
    (split,) = report.splits
    return split.warnings + report.warnings, [fault.message for fault in split.faults]


def objects(**others):
    """One in each photo, of both classes."""
    return [entry(i, i, category=i % 2 + 1, **others) for i in range(4)]


def test_a_json_that_fits_its_masks_gets_no_warning(tmp_path):
    write(tmp_path, objects())
    assert check(tmp_path) == ([], [])
    write(tmp_path, objects(bbox=None, area=None))  # neither is needed
    assert check(tmp_path) == ([], [])


def moved(polygon=PENTAGON, scale=1.0, swaps=False):
    points = np.reshape(polygon, (-1, 2)) * scale
    return (points[:, ::-1] if swaps else points).ravel().tolist()


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"polygon": moved(swaps=True)}, "they fit polygons that have x and y exchanged"),
        ({"polygon": moved(scale=0.5)}, "they fit polygons drawn at 0.5 of the size"),
        ({"bbox": [8, 10, 38, 50]}, "they fit boxes written as x0, y0, x1, y1"),
        ({"bbox": [23, 30, 30, 40]}, "they fit boxes written with their centre"),
        ({"bbox": [0.1, 1 / 6, 3 / 8, 2 / 3]}, "they fit boxes as shares of the image's sides"),
        ({"bbox": [23 / 80, 0.5, 3 / 8, 2 / 3]}, "shares of the image's sides, with their centre"),
        ({"bbox": [60, 40, 9, 9]}, "4 of 4 boxes do not fit their masks. Such as annotation 0 (0."),
    ],
)
def test_boxes_that_do_not_fit_the_masks_are_explained(tmp_path, others, message):
    polygon = others.pop("polygon", PENTAGON)
    write(tmp_path, objects(polygon=polygon, **others))
    warnings, _ = check(tmp_path)
    assert message in warnings[0] and "annotation 0 (0.png): bbox [" in warnings[0]


@pytest.mark.parametrize(
    ("area", "message"),
    [
        (0, "4 of 4 areas do not fit: annotation 0 (0.png) has the area 0, its mask 8"),
        (AREA / (WIDTH * HEIGHT), "areas do not fit (shares of the image, in place of pixels)"),
        (4 * AREA, "4 of 4 areas do not fit: annotation 0"),
        (30 * 40, "4 areas are those of boxes: annotation 0 (0.png) has the area 1200"),
    ],
)
def test_areas_that_do_not_fit_the_masks_are_warned_of(tmp_path, area, message):
    write(tmp_path, objects(area=area))
    (warning,), _ = check(tmp_path)
    assert message in warning and "APs, APm and APl" in warning


def test_outlines_that_leave_the_image_need_no_box_to_be_found(tmp_path):
    wide = [50, 5, 75, 5, 77, 30, 60, 45]
    write(tmp_path, objects(polygon=moved(wide, swaps=True), bbox=None, area=None))
    warnings, _ = check(tmp_path)
    assert "4 of 4 objects reach out of their image, annotation 0 (0.png) by 17 pix" in warnings[0]


@pytest.mark.parametrize(
    ("polygon", "what"),
    [
        ([8, 10, 38, 10, 38, 50, 8, 50], "upright rectangles"),
        ([20, 5, 50, 20, 40, 45, 10, 30], "outlines of four corners"),
    ],
)
def test_boxes_in_place_of_outlines_are_warned_of(tmp_path, polygon, what):
    write(tmp_path, objects(polygon=polygon, bbox=None, area=None))
    (warning,), _ = check(tmp_path)
    assert warning.startswith(f"4 of 4 objects are {what}: are they boxes?")


def test_an_object_that_is_there_twice_is_named_with_its_copy(tmp_path):
    turned = PENTAGON[4:] + PENTAGON[:4]  # the same outline from another corner
    near = [x + 0.2 for x in PENTAGON]
    copies = [
        entry(99, 0, turned),
        entry(98, 0, near, category=2),
        entry(97, 1, [1, 1, 5, 1, 5, 9]),
    ]
    write(tmp_path, objects() + copies)
    _, faults = check(tmp_path)
    assert faults == [
        "annotation 99 (0.png): has the mask of annotation 0 (class cat); delete one",
        "annotation 98 (0.png): has the mask of annotation 0 (class dog here, cat there); delete "
        "one",
    ]


def test_of_very_many_objects_in_an_image_equal_ones_are_found(tmp_path):
    corners = [(x, y) for x in range(1, 78, 3) for y in range(1, 58, 3)]  # 494 triangles
    many = [
        entry(1000 + i, 0, [x, y, x + 3, y, x, y + 3], area=None, bbox=None)
        for i, (x, y) in enumerate(corners)
    ]
    turned = PENTAGON[4:] + PENTAGON[:4]
    others = [entry(10 + i, 0, [60, i, 70, i, 60, i + 9]) for i in range(9)]
    write(tmp_path, [*objects(), *many, *others, entry(99, 0, turned)])
    faults = check(tmp_path)[1]
    assert faults == ["annotation 99 (0.png): has the mask of annotation 0 (class cat); delete one"]


def test_a_mask_that_cannot_be_drawn_is_a_fault_with_its_annotation(tmp_path, monkeypatch):
    write(tmp_path, objects())
    monkeypatch.setattr("sparseinst_jax.data.segmentations.MAX_MOVED_BORDER", 100)
    _, faults = check(tmp_path)
    assert len(faults) == 4
    assert faults[0].startswith("annotation 0 (0.png): the polygons of an object have 5 corners")


def test_objects_marked_as_crowd_are_warned_of_with_their_classes(tmp_path):
    write(
        tmp_path,
        [*objects(), *(entry(10 + i, i, [50, 5, 70, 5, 60, 30], iscrowd=1) for i in (0, 2))],
    )
    dataset = load_coco(tmp_path / "train.json", None)
    (line,) = check_dataset.warn(dataset, 100)
    assert line.startswith('2 of 6 annotations have "iscrowd": 1 (2 of 4 of cat), which means')
    # One class of which all are crowd, as where one was painted with a brush.
    many = [entry(i, i % 4) for i in range(20)] + [entry(30, 0, category=2, iscrowd=1)]
    write(tmp_path, many)
    (line, *_) = check_dataset.warn(load_coco(tmp_path / "train.json", None), 100)
    assert "(1 of 1 of dog)" in line
    write(
        tmp_path,
        [entry(i, i % 4, category=i % 2 + 1) for i in range(20)] + [entry(30, 0, iscrowd=1)],
    )
    assert check_dataset.warn(load_coco(tmp_path / "train.json", None), 100) == []


def test_images_and_folders_without_labels_are_warned_of(tmp_path):
    names = (*(f"a/{i}.png" for i in range(4)), "b/0.png", "b/1.png")
    write(tmp_path, objects(), names)
    (tmp_path / "photos/c").mkdir()
    Image.fromarray(NOISE).save(tmp_path / "photos/c/7.png")
    Image.fromarray(NOISE).save(tmp_path / "photos/a/8.png")  # beside images that have labels
    empty, folder, unnamed = check(tmp_path)[0]
    assert empty.startswith("2 of 6 images (33 %) have no object")
    assert folder.startswith("no image of the folders b (2) has an object")
    assert "1 images below" in unnamed and "folders of which the json names none: c (1)" in unnamed


@pytest.mark.parametrize(
    ("classes", "given", "option"),
    [
        (("left_door", "right_door", "roof"), (), "left_door=right_door"),
        (("Hand Right", "Hand Left"), (), "'--config.data.flip_label_pairs=Hand Left=Hand Right'"),
        (("eyeL", "eyeR", "legend"), (), "eyeL=eyeR"),
        (("arm-l", "arm-r"), (), "arm-l=arm-r"),
        (
            ("a_left", "a_right", "b_left", "b_right"),
            ("a_left=a_right",),
            "a_left=a_right,b_left=b_",
        ),
        (("left_door", "right_door"), ("right_door=left_door",), None),
        (("left_door", "roof", "bright", "cleft"), (), None),
    ],
)
def test_classes_of_two_sides_get_the_option_that_swaps_them(tmp_path, classes, given, option):
    write(tmp_path, [entry(i, i % 4, category=i + 1) for i in range(len(classes))], classes=classes)
    dataset = load_coco(tmp_path / "train.json", None)
    lines = [line for line in check_dataset.warn(dataset, 100, given) if "mirror" in line]
    if option is None:
        assert lines == []
        return
    (line,) = lines
    assert option in line
    text = line.partition("--config.data.flip_label_pairs=")[2].strip("'\"")
    config = load_config("base", {"data.flip_label_pairs": text})
    assert all("=" in pair for pair in config.data.flip_label_pairs)
    assert warn_of_sides(classes, config.data.flip_label_pairs) == []
    assert not any("mirror" in line for line in check_dataset.warn(dataset, 100))  # of validation


def test_classes_that_differ_by_case_are_warned_of_in_one_json_and_between_two(tmp_path):
    write(tmp_path, objects(), classes=("Cat", "cat"))
    train = load_coco(tmp_path / "train.json", None)
    (line,) = check_dataset.warn(train, 100)
    assert "'Cat', 'cat' differ only in capitals or spaces" in line
    write(tmp_path, objects(), classes=("Cat", "dog "))
    val = load_coco(tmp_path / "train.json", None)
    write(tmp_path, objects(), classes=("Cat", "dog"))
    lines = check_dataset.warn_of_classes(load_coco(tmp_path / "train.json", None), val)
    assert any("'dog', 'dog ' differ only in capitals or spaces" in line for line in lines)


def test_orientations_that_the_size_cannot_show_and_pages_are_warned_of(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    write(tmp_path, objects(), exif=exif)
    pages = [Image.fromarray(NOISE), Image.fromarray(255 - NOISE)]
    pages[0].save(tmp_path / "photos/0.png", save_all=True, append_images=pages[1:])
    turned, several = check(tmp_path)[0]
    assert turned.startswith("3 images are turned or mirrored by their EXIF orientation (3 of ori")
    assert several.startswith("1 files hold several pages")
    exif[0x0112] = 6  # a quarter turn: the size shows it
    for name in PHOTOS:
        Image.fromarray(np.rot90(NOISE)).save(tmp_path / "photos" / name, exif=exif)
    assert check(tmp_path)[0] == []
