"""Photos and weights as files through `eval.py`: its COCO results against the original's.

Run with `pytest --data=DIR tests/parity/test_end_to_end.py`; DIR holds `coco_train160/train.json`
and `coco_train160/images/`, 160 photos of COCO train2017.
"""

from __future__ import annotations

import json
import lzma

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from safetensors.numpy import save_file

from sparseinst_jax.cli import eval as eval_command
from sparseinst_jax.data.coco import load_coco
from sparseinst_jax.data.images import as_rgb
from sparseinst_jax.inference.predictor import Predictor
from sparseinst_jax.models.sparseinst import inference
from sparseinst_jax.models.sparseinst.family import SPARSEINST
from sparseinst_jax.models.sparseinst.weights import NAMES
from sparseinst_jax.models.trees import functional
from sparseinst_jax.setup.builders import build_model
from sparseinst_jax.weights.convert import original_to_ours
from tests.parity import cases, golden_weights

# Pixels near the cut are not recorded here, hence wider than for the drawn images.
MASK_IOU, MEAN_IOU, SCORE = 0.99, 0.999, 5e-4
# A stride-4 pixel so near the cut may fall on either side by rounding and move the rescoring of
# a small mask by more than the bound (one of 600 instances: a pixel 3e-6 away moves it by 5.1e-4).
NEAR_CUT = 1e-4


@pytest.mark.data
@pytest.mark.parametrize("name", ["end_to_end_r50_giam", "end_to_end_r50vd_dcn_giam"])
def test_photos_give_the_originals_coco_results(name, data_dir, errors, tmp_path):
    manifest = json.loads((cases.GOLDEN / name / "manifest.json").read_text())
    # image id -> the size, and (category_id, score, RLE counts) in the order of the queries
    recorded = json.loads(
        lzma.decompress((cases.GOLDEN / name / "predictions.json.xz").read_bytes())
    )
    folder = data_dir / "coco_train160"
    (images,) = [path for path in (folder / "images").rglob(manifest["file_names"][0])]
    dataset = load_coco(folder / "train.json", images.parent)
    records = {record.image_id: record for record in dataset.records}
    state_dict = golden_weights.make(
        cases.load(manifest["config"]).manifest["state_dict"], manifest["weights_seed"]
    )
    config = cases.load(manifest["config"]).config_path
    results = evaluate(config, manifest, state_dict, folder, tmp_path)
    predictor = _predictor(manifest, state_dict, dataset)
    ious = []
    for image_id in manifest["image_ids"]:
        found = [entry for entry in results if entry["image_id"] == image_id]
        spans = _score_spans(predictor, as_rgb(records[image_id].path))
        wanted = recorded[str(image_id)]
        errors.check(
            "instances", f"count, image {image_id}", abs(len(found) - len(wanted["instances"])), 0
        )
        for ours, (low, high), (category_id, score, counts) in zip(
            found, spans, wanted["instances"], strict=True
        ):
            errors.check("classes", "category", ours["category_id"] != category_id, 0)
            distance = max(low - score, score - high, 0.0)
            errors.check("scores", f"score, image {image_id}", distance, SCORE)
            assert low - SCORE < ours["score"] < high + SCORE
            assert list(ours["segmentation"]["size"]) == wanted["size"]
            overlap = iou(ours["segmentation"], {"size": wanted["size"], "counts": counts})
            ious.append(overlap)
            errors.check("mask IoU", f"1 - IoU, image {image_id}", 1 - overlap, 1 - MASK_IOU)
    errors.check("mean mask IoU", "1 - mean IoU", 1 - np.mean(ious), 1 - MEAN_IOU)


def evaluate(config, manifest, state_dict, folder, tmp_path) -> list[dict]:
    """Run the command on the named photos of a folder; the results that it writes."""
    save_file(
        {key: np.ascontiguousarray(array) for key, array in state_dict.items()},
        tmp_path / "weights.safetensors",
    )
    (images,) = {path.parent for path in (folder / "images").rglob(manifest["file_names"][0])}
    content = json.loads((folder / "train.json").read_text())
    wanted = set(manifest["image_ids"])
    content["images"] = [entry for entry in content["images"] if entry["id"] in wanted]
    content["annotations"] = [e for e in content["annotations"] if e["image_id"] in wanted]
    (tmp_path / "six.json").write_text(json.dumps(content))
    arguments = {
        "--config": config,
        "--weights": tmp_path / "weights.safetensors",
        "--output": tmp_path / "eval",
        "--config.data.val.annotations": tmp_path / "six.json",
        "--config.data.val.images": images,
        "--config.data.eval_size": tuple(manifest["eval_size"]),
    }
    assert eval_command.main([f"{key}={value}" for key, value in arguments.items()]) == 0
    return json.loads((tmp_path / "eval" / "predictions.json").read_text())


def _predictor(manifest, state_dict, dataset) -> Predictor:
    case = cases.load(manifest["config"])
    model = build_model(case.config.model, case.manifest["num_classes"], None)
    apply, params, statistics = functional(model)
    params, statistics = original_to_ours(state_dict, params, statistics, NAMES)
    return Predictor(
        apply,
        params,
        statistics,
        dataset.class_names,
        dataset.category_ids,
        tuple(manifest["eval_size"]),
        family=SPARSEINST,
    )


def _score_spans(predictor, image) -> list[tuple[float, float]]:
    """Lowest and highest score of each instance, its pixels near the cut in or out."""
    (pending,) = predictor.start([predictor.prepare(image)])
    selection = pending.selection
    kept = np.flatnonzero(selection.is_kept[0])
    cut = predictor.mask_threshold
    maskness = {c: inference.maskness(selection.masks, c)[0] for c in _cuts(cut)}
    before = selection.scores[0] / np.maximum(maskness[cut], 1e-12)
    scores = np.stack([np.asarray(before * value)[kept] for value in maskness.values()])
    return list(zip(scores.min(0).tolist(), scores.max(0).tolist(), strict=True))


def _cuts(cut: float) -> tuple[float, float, float]:
    return cut - NEAR_CUT, cut, cut + NEAR_CUT


def iou(ours, theirs) -> float:
    first, second = (coco_mask.decode(rle).astype(bool) for rle in (ours, theirs))
    union = (first | second).sum()
    return float((first & second).sum() / union) if union else 1.0
