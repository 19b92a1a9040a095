"""Polygons by their true size, and other forms of a mask that must not pass for polygons."""

import json

import numpy as np
import pytest

from sparseinst_jax.data.coco import index_coco, load_coco
from sparseinst_jax.data.segmentations import decode_mask, encode_segmentation, usable_polygons
from sparseinst_jax.evaluation.coco_metrics import evaluate

HEIGHT, WIDTH = 60, 80
MASK = np.zeros((HEIGHT, WIDTH), np.uint8)
MASK[10:40, 20:50] = 1
ROWS, COLUMNS = np.nonzero(MASK)
SQUARE = [[20.0, 10.0, 50.0, 10.0, 50.0, 40.0, 20.0, 40.0]]


def leaf(x, y, radius, corners):
    angles = 2 * np.pi * np.arange(corners) / corners
    points = np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], axis=1)
    return points.round(1).reshape(-1).tolist()


def content_of(*segmentations, width=WIDTH, height=HEIGHT):
    return {
        "images": [{"id": 1, "file_name": "a.jpg", "height": height, "width": width}],
        "categories": [{"id": 3, "name": "leaf"}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 3, "segmentation": s, "iscrowd": 0}
            for i, s in enumerate(segmentations, start=1)
        ],
    }


def found(segmentation):
    return [{"image_id": 1, "category_id": 3, "score": 0.5, "segmentation": segmentation}]


@pytest.mark.parametrize(("parts", "corners"), [(20, 20), (2, 400), (8, 400), (20, 50), (14, 400)])
def test_parts_of_one_object_on_a_large_photo_are_measured_by_their_own_borders(
    tmp_path, parts, corners
):
    rng = np.random.default_rng(parts)
    leaves = [leaf(x, y, 30, corners) for x, y in rng.uniform((50, 50), (3950, 2950), (parts, 2))]
    content = content_of(leaves, width=4000, height=3000)
    (tmp_path / "a.json").write_text(json.dumps(content))
    dataset = load_coco(tmp_path / "a.json", None)
    (record,) = dataset.records
    assert record.targets[0].segmentation == leaves
    area = int(decode_mask(leaves, 3000, 4000).sum())
    assert area == pytest.approx(np.pi * 30**2 * parts, rel=0.1)
    assert evaluate(content, found(leaves))["AP"] == pytest.approx(1.0)


def test_a_border_beyond_the_limit_is_refused_with_its_true_length():
    to_and_fro = [0.0, 0.0, 4000.0, 0.0] * 200  # 400 sides of 4000
    usable, fault = usable_polygons([to_and_fro])
    assert fault is None and [part.tolist() for part in usable] == [to_and_fro]
    usable, fault = usable_polygons([to_and_fro] * 2)
    assert usable == [] and fault is not None and "a border of 3.2e+06 px" in fault.message


FORMS = {
    "the 60 rows of a mask with 80 pixels in each": MASK.tolist(),
    "the 60 rows of a mask": (MASK * 255).tolist(),
    "the 60 rows of a mask with 80 ": (MASK > 0).tolist(),
    "900 points": np.stack([COLUMNS, ROWS], axis=1).tolist(),
    "every pixel, 900 in all": [np.stack([COLUMNS, ROWS], axis=1).ravel().tolist()],
    "a list of every pixel": [np.stack([ROWS, COLUMNS], axis=1).ravel().tolist()],
    "list of every pixel, 900": [np.argwhere(MASK.T)[:, ::-1].ravel().tolist()],
    "the rows and the columns of 900 pixels": [ROWS.tolist(), COLUMNS.tolist()],
}


@pytest.mark.parametrize(("message", "form"), FORMS.items())
def test_masks_and_lists_of_pixels_are_no_polygons_anywhere(tmp_path, message, form):
    content = content_of(SQUARE, form)
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"annotation 2 \(a\.jpg\): ") as error:
        load_coco(tmp_path / "a.json", None)
    assert message in str(error.value) and "pycocotools.mask.encode" in str(error.value)
    with pytest.raises(ValueError, match=r"annotation 2 \(a\.jpg\) has a mask that cannot be read"):
        evaluate(content, [])
    with pytest.raises(ValueError, match="detection 0 has a mask that cannot be read"):
        evaluate(content_of(SQUARE), found(form))


@pytest.mark.parametrize("width", [5, 7])
def test_a_dense_mask_of_any_width_is_recognised(width):
    _, fault = usable_polygons(MASK[:, 20 : 20 + width].tolist())
    assert fault is not None and fault.is_fatal and "rows of a mask" in fault.message


def test_outlines_that_list_every_pixel_of_a_border_stay_polygons():
    angles = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    for radii in ((30, 30), (38, 8), (5, 28)):
        points = 40 + np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii
        for outline in (points.round(), points.round()[::-1], np.roll(points.round(), 77, axis=0)):
            polygon = outline.ravel().tolist()
            assert usable_polygons([polygon])[1] is None
            encode_segmentation([polygon], 80, 80)
    # Half a disc: its outline goes down along the arc, and back along a straight line at once.
    arc = (40 + 30 * np.stack([np.sin(angles[:200]), -np.cos(angles[:200])], axis=1)).round()
    assert usable_polygons([arc.ravel().tolist()])[1] is None
    two = [[0.0, 0.0, 9.0, 0.0, 9.0, 9.0, 0.0, 9.0]] * 2  # two equal squares at the corner
    assert usable_polygons(two)[1] is None


def test_shares_of_the_image_are_left_out_of_training_and_refused_as_results(tmp_path):
    shares = [[0.25, 0.2, 0.6, 0.2, 0.6, 0.7, 0.25, 0.7]]
    corner = [[0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0]]  # one pixel, by whole numbers
    (tmp_path / "a.json").write_text(json.dumps(content_of(SQUARE, shares, corner)))
    dataset, faults = index_coco(tmp_path / "a.json", None)
    assert [a.id for a in dataset.records[0].targets] == [1, 3]
    (fault,) = faults
    assert not fault.is_fatal and "annotation 2 (a.jpg): all coordinates lie" in fault.message
    with pytest.raises(ValueError, match=r"detection 0 .* between 0 and 1: shares of the image"):
        evaluate(content_of(SQUARE), found(shares))
    with pytest.raises(ValueError, match=r"annotation 1 \(a\.jpg\) .* between 0 and 1"):
        evaluate(content_of(shares), found(SQUARE))
