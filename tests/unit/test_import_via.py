"""VIA projects and exports to COCO."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from sparseinst_jax.data.coco import decode_mask
from sparseinst_jax.data.importers.via import read_via

HEIGHT, WIDTH = 60, 80


def _polygon(**more):
    return {"name": "polygon", "all_points_x": [2, 6, 6, 2], "all_points_y": [1, 1, 5, 5], **more}


def _region(shape=None, **attributes):
    return {"shape_attributes": shape or _polygon(), "region_attributes": attributes}


def _entry(regions, filename="a.png"):
    return {"filename": filename, "size": 123, "regions": regions, "file_attributes": {}}


def _write(tmp_path, regions, *others, is_project=False):
    if not (tmp_path / "a.png").exists():
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "a.png")
    entries = [_entry(regions), *others]
    content = {f"{entry['filename']}123{i}": entry for i, entry in enumerate(entries)}
    if is_project:
        content = {
            "_via_settings": {"core": {}},
            "_via_img_metadata": content,
            "_via_attributes": {"region": {"kind": {"type": "text"}}, "file": {}},
        }
    path = tmp_path / "via.json"
    path.write_text(json.dumps(content))
    return path


def _objects(path, **options):
    found = read_via(path, **options)
    assert found.faults.lines == []
    return found.images[0].objects


@pytest.mark.parametrize("is_project", [False, True])
@pytest.mark.parametrize("as_object", [False, True])
def test_projects_and_exports_of_both_versions_read_alike(tmp_path, is_project, as_object):
    regions = [_region(kind="pear"), _region(_polygon(name="polyline"), kind="apple")]
    if as_object:  # VIA 1
        regions = {str(i): region for i, region in enumerate(regions)}
    found = read_via(_write(tmp_path, regions, is_project=is_project))
    assert found.faults.lines == []
    assert (found.class_names, found.images_dir) == (("apple", "pear"), tmp_path)
    (image,) = found.images
    assert (image.file_name, image.height, image.width) == ("a.png", HEIGHT, WIDTH)
    square = ([[2, 1, 6, 1, 6, 5, 2, 5]], 16, [2, 1, 4, 4])
    assert image.objects == [("pear", *square), ("apple", *square)]
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[1:5, 2:6] = True
    decoded = decode_mask(image.objects[0].segmentation, HEIGHT, WIDTH)
    np.testing.assert_array_equal(decoded, expected)
    assert found.notes == ["the class is the region attribute 'kind'"]


def test_rectangles_circles_and_ellipses_become_polygons(tmp_path):
    shapes = [
        {"name": "rect", "x": 10, "y": 4, "width": 10, "height": 6},
        {"name": "circle", "cx": 30, "cy": 30, "r": 10},
        {"name": "ellipse", "cx": 40, "cy": 30, "rx": 20, "ry": 5},
        {"name": "ellipse", "cx": 40, "cy": 30, "rx": 20, "ry": 5, "theta": math.pi / 2},
        {"name": "ellipse", "cx": 40, "cy": 30, "rx": 20, "ry": 5, "theta": math.pi / 6},
    ]
    objects = _objects(_write(tmp_path, [_region(shape, kind="pear") for shape in shapes]))
    assert objects[0].segmentation == [[10, 4, 20, 4, 20, 10, 10, 10]]
    assert [o.bbox for o in objects[:4]] == [
        [10, 4, 10, 6],
        [20, 20, 20, 20],
        [20, 25, 40, 10],
        [35, 10, 10, 40],
    ]
    areas = [o.area for o in objects]
    assert areas[0] == 60
    np.testing.assert_allclose(areas[1:], math.pi * 100, rtol=0.02)
    # A turn from x towards y, downwards in an image: the right end is the lower one.
    x, y = np.array(objects[4].segmentation).reshape(-1, 2)[0]
    assert x == pytest.approx(40 + 20 * math.cos(math.pi / 6), abs=0.01)
    assert y == pytest.approx(30 + 20 * math.sin(math.pi / 6), abs=0.01)


def test_the_class_is_the_only_attribute_with_values_or_the_one_named(tmp_path):
    regions = [_region(kind="pear", colour="", note={}), _region(kind="apple", colour="")]
    assert read_via(_write(tmp_path, regions)).class_names == ("apple", "pear")
    regions = [_region(kind="pear", colour="red"), _region(kind="apple")]
    path = _write(tmp_path, regions)
    with pytest.raises(ValueError, match=r"'colour' \(1 of 2\), 'kind' \(2 of 2\).*--attribute"):
        read_via(path)
    found = read_via(path, attribute="colour")
    assert found.class_names == ("red",)
    (fault,) = found.faults.lines
    assert fault.endswith("a.png, region 1: has no value for the attribute 'colour'; set it in VIA")
    with pytest.raises(ValueError, match=r"no region has the attribute 'Kind'.*'kind' \(2 of 2\)"):
        read_via(path, attribute="Kind")


def test_regions_without_any_attribute_need_one_class_for_all(tmp_path):
    path = _write(tmp_path, [_region(), _region()])
    with pytest.raises(ValueError, match=r"none of the 2 regions has an attribute.*--class"):
        read_via(path)
    assert [o.class_name for o in _objects(path, class_name="pear")] == ["pear", "pear"]


def test_of_a_checkbox_one_option_must_be_ticked(tmp_path):
    regions = [_region(kind={"pear": True, "apple": False}), _region(kind={"pear": 1, "apple": 1})]
    found = read_via(_write(tmp_path, regions))
    assert [o.class_name for o in found.images[0].objects] == ["pear"]
    (fault,) = found.faults.lines
    assert "region 1: attribute 'kind' must have one option ticked, got ['pear', 'apple']" in fault


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"name": "point", "cx": 1, "cy": 2}, "a point has no area"),
        ({"name": "star"}, "shape 'star' is not read; expected polygon, polyline, rect"),
        ([], "has no shape_attributes"),
        ({"name": "circle", "cx": 1, "cy": 2}, "r of a circle must be a number, got None"),
        ({"name": "circle", "cx": [], "cy": 2, "r": 3}, "cx of a circle must be a number, got []"),
        ({"name": "circle", "cx": 1, "cy": 2, "r": 0}, "radii > 0"),
        ({"name": "rect", "x": 1, "y": 2, "width": -3, "height": 3}, "width and a height > 0"),
        ({"name": "rect", "x": 500, "y": 2, "width": 3, "height": 3}, "x = 500 lies far outside"),
        ({"name": "rect", "x": 100, "y": 2, "width": 3, "height": 3}, "covers no pixel"),
        ({"name": "ellipse", "cx": 1, "cy": 2, "rx": 3, "ry": 1e7}, "more than twice the image"),
        (_polygon(all_points_y=[1, 2]), "must be lists of one length"),
        (_polygon(all_points_y=None), "must be lists of one length"),
        (_polygon(all_points_x=[1, 2, None, 3]), "all_points_x must be a number, got None"),
        ({"name": "polyline", "all_points_x": [1, 2], "all_points_y": [1, 2]}, "a polyline needs"),
    ],
)
def test_a_region_that_cannot_be_read_is_told_with_image_and_number(tmp_path, shape, message):
    broken = {"shape_attributes": shape, "region_attributes": {"kind": "pear"}}
    path = _write(tmp_path, [_region(kind="pear"), broken, _region(kind="apple")])
    found = read_via(path)
    (fault,) = found.faults.lines
    assert fault.startswith(f"{path}: a.png, region 1: ")
    assert message in fault
    assert [o.class_name for o in found.images[0].objects] == ["pear", "apple"]


def test_images_that_cannot_be_read_are_told_and_empty_ones_kept(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(b"not an image")
    others = [
        _entry([], "b.png"),
        _entry([_region(kind="pear")], "c.png"),
        _entry([], "a.png"),
        _entry([], "gone.png"),
        _entry([], "https://example.org/d.png"),
        _entry([], "../e.png"),
        _entry(7, "b.png"),
        _entry([], "C:\\photos\\b.png"),
        _entry([], ""),
    ]
    found = read_via(_write(tmp_path, [_region(kind="pear")], *others))
    assert [(i.file_name, len(i.objects)) for i in found.images] == [("a.png", 1), ("b.png", 0)]
    messages = (
        "c.png cannot be read",
        "a.png: the file is listed twice",
        "gone.png does not exist",
        "is an address, not a file",
        "is not below the image folder",
        "b.png: the file is listed twice",  # its regions are not reached
        "photos\\b.png: the file is listed twice",
        "filename must name the image, got ''",
    )
    assert len(found.faults.lines) == len(messages)
    for line, message in zip(found.faults.lines, messages, strict=True):
        assert message in line


def test_regions_of_another_type_are_told(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    found = read_via(_write(tmp_path, [_region(kind="pear")], _entry(7, "b.png"), _entry([3])))
    assert "b.png: regions must be a list or an object, got a int" in found.faults.lines[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as json"),
        ("[]", "is not a VIA json; expected a saved project"),
        ('{"a": {"shapes": []}}', "is not a VIA json"),
        ('{"project": {}, "metadata": {}, "view": {}}', "VIA 3"),
        ('{"images": [], "annotations": [], "categories": []}', "is a COCO json already"),
        ('{"_via_img_metadata": {}}', "has no images"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, content, message):
    path = tmp_path / "via.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_via(path)
    assert str(path) in str(error.value)


def test_the_json_must_be_a_file_and_the_images_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="give the file"):
        read_via(tmp_path)
    with pytest.raises(FileNotFoundError, match="the image folder"):
        read_via(_write(tmp_path, []), tmp_path / "nowhere")


def test_the_image_folder_can_lie_elsewhere_with_subfolders(tmp_path):
    photos = tmp_path / "photos"
    (photos / "s").mkdir(parents=True)
    path = _write(tmp_path, [_region(kind="pear")], _entry([_region(kind="pear")], "s/b.png"))
    (tmp_path / "a.png").rename(photos / "a.png")
    Image.new("RGB", (WIDTH, HEIGHT)).save(photos / "s/b.png")
    found = read_via(path, photos)
    assert found.faults.lines == []
    assert [image.file_name for image in found.images] == ["a.png", "s/b.png"]


def test_an_image_in_a_subfolder_is_found_by_its_name_if_it_is_the_only_one(tmp_path):
    path = _write(tmp_path, [_region(kind="pear")])
    (tmp_path / "train").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "train/a.png")
    assert [image.file_name for image in read_via(path).images] == ["train/a.png"]
    (tmp_path / "val").mkdir()
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "val/a.png")
    assert "a.png does not exist" in read_via(path).faults.lines[0]
    path = _write(tmp_path, [_region(kind="pear")], _entry([], "train\\A.PNG"))
    assert "train/a.png: it differs in capital letters" in read_via(path).faults.lines[0]


@pytest.mark.parametrize("value", ["1", {"1": True, "2": False}])
def test_options_of_a_dropdown_have_the_names_that_the_project_gives_them(tmp_path, value):
    path = _write(tmp_path, [_region(kind=value), _region(kind="plum")], is_project=True)
    content = json.loads(path.read_text())
    kind = content["_via_attributes"]["region"]["kind"]
    kind |= {"type": "dropdown", "options": {"1": "apple", "2": "pear", "3": ""}}
    path.write_text(json.dumps(content))
    found = read_via(path)
    assert [o.class_name for o in found.images[0].objects] == ["apple", "plum"]
    assert found.notes == ["the class is the region attribute 'kind', by the names of its options"]
    kind["options"]["2"] = "apple"
    path.write_text(json.dumps(content))
    assert "that have one name are one class" in read_via(path).notes[1]


def test_an_export_whose_classes_are_numbers_is_pointed_out(tmp_path):
    found = read_via(_write(tmp_path, [_region(kind="1"), _region(kind="2")]))
    assert found.class_names == ("1", "2")
    assert "all classes are numbers" in found.notes[1] and "import the project" in found.notes[1]
