"""FastInst on photos: `eval.py` to COCO results, and the training mapper, against the original.

Run with `pytest --data=DIR tests/parity/test_fastinst_photos.py`; DIR as in test_end_to_end.py.
"""

from __future__ import annotations

import hashlib
import json
import lzma

import numpy as np
import pytest

from sparseinst_jax.data.coco import load_coco
from sparseinst_jax.data.plan import ImagePlan
from sparseinst_jax.data.target_masks import FULL_BITS, unpack_bits
from sparseinst_jax.data.train_image import load_train_image
from sparseinst_jax.data.transforms import Transform
from tests.parity import cases, golden_weights
from tests.parity.test_end_to_end import evaluate, iou

MASK_IOU, MEAN_IOU, SCORE = 0.99, 0.999, 5e-4
# Polygons that a crop's border cuts: the original cuts the corners first, here the pixels are left
# out, so that a pixel at the outline may differ.
CUT_PIXELS = 0.005


@pytest.mark.data
@pytest.mark.parametrize("name", ["end_to_end_fastinst_r50_x1", "end_to_end_fastinst_r50_x3"])
def test_photos_give_the_originals_coco_results(name, data_dir, errors, tmp_path):
    folder = cases.GOLDEN / name
    manifest = json.loads((folder / "manifest.json").read_text())
    recorded = json.loads(lzma.decompress((folder / "predictions.json.xz").read_bytes()))
    state_dict = golden_weights.make(manifest["state_dict"], manifest["weights_seed"])
    config = cases.CONFIGS / cases.CONFIG_OF_ORIGINALS[manifest["config"]]
    results = evaluate(config, manifest, state_dict, data_dir / "coco_train160", tmp_path)
    ious = []
    for image_id in manifest["image_ids"]:
        ours, theirs = (
            [entry for entry in entries if entry["image_id"] == image_id]
            for entries in (results, recorded)
        )
        errors.check("instances", f"count, image {image_id}", abs(len(ours) - len(theirs)), 0)
        for place, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            title = f"image {image_id}, {place}"
            errors.check("classes", title, mine["category_id"] != other["category_id"], 0)
            errors.check("scores", title, abs(mine["score"] - other["score"]), SCORE)
            ious.append(iou(mine["segmentation"], other["segmentation"]))
            errors.check("mask IoU", f"1 - IoU, {title}", 1 - ious[-1], 1 - MASK_IOU)
    errors.check("mean mask IoU", "1 - mean IoU", 1 - np.mean(ious), 1 - MEAN_IOU)


def _transform(steps, size):
    """The original's list of transforms as ours, whose flip is the first and its crop mirrored."""
    names = [name for name, *_ in steps]
    flip, first, crop = "HFlipTransform" in names, None, None
    resizes = [(step[3], step[4]) for step in steps if step[0] == "ResizeTransform"]
    if "CropTransform" in names:
        first = resizes[0]
        x, y, width, height = next(step[1:] for step in steps if step[0] == "CropTransform")
        crop = (y, first[1] - x - width if flip else x, height, width)
    return Transform(flip, first, crop, resizes[-1] if resizes else size)


def _digest(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


@pytest.mark.data
def test_the_training_mapper_gives_the_originals_pixels_and_masks(data_dir, errors):
    folder = data_dir / "coco_train160"
    rows = json.loads((cases.GOLDEN / "preprocess_train_fastinst/train_mapper.json").read_text())
    (images,) = {path.parent for path in (folder / "images").rglob("*.jpg")}
    dataset = load_coco(folder / "train.json", images)
    place = {record.image_id: i for i, record in enumerate(dataset.records)}
    form = FULL_BITS._replace(keeps_empty=True)
    for row in rows["rows"]:
        position = place[row["image_id"]]
        record = dataset.records[position]
        transform = _transform(row["transforms"], (record.height, record.width))
        made = load_train_image(dataset.records, ImagePlan(position, transform), form=form)
        title = f"image {row['image_id']}, seed {row['numpy_seed']}"
        assert list(transform.size) == row["out_hw"]
        errors.check("images", title, _digest(made.image) != row["image_sha256_16"], 0)
        assert made.labels == row["classes"], title
        width = transform.size[1]
        masks = [unpack_bits(bits)[:, :width] for bits in made.masks]
        for number, (mask, area) in enumerate(zip(masks, row["mask_areas"], strict=True)):
            is_equal = _digest(mask) == row["mask_sha256_16"][number]
            error = 0 if is_equal else abs(int(mask.sum()) - area) / max(area, 100)
            bound = CUT_PIXELS if transform.crop else 0
            errors.check("masks", f"{title}, object {number}", error, bound)
