"""The final instances: which are kept, their classes and scores, and every mask's pixels."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from sparseinst_jax import masks
from sparseinst_jax.sparseinst import inference
from sparseinst_jax.structures import Outputs
from tests.parity import cases

SCORE = 2e-5  # noise of the original up to 5e-6
# One mask pixel that crosses the 0.45 cut changes the rescoring by up to 1 / area: 6.4e-5 seen.
SCORE_NEAR_CUT = 1e-3
IOU = 1e-3  # 1 - IoU
CLASS_MARGIN = 1e-4  # below it the second class may win by rounding


@pytest.mark.parametrize("name", cases.DETECTION_CASES)
def test_every_final_instance_equals_the_originals(name, errors):
    case, ours = cases.load(name), cases.forward(name)
    outputs = Outputs(ours["pred_logits"], ours["pred_masks"], ours["pred_scores"][..., 0])
    recorded = json.loads((cases.GOLDEN / name / "detections.json").read_text())
    cut = case.manifest["mask_threshold"]
    for key, images in recorded.items():
        threshold = float(key.removeprefix("cls_threshold_"))
        selection = inference.select(outputs, threshold, cut)
        for index, image in enumerate(images):
            kept = np.flatnonzero(selection.is_kept[index])
            expected = [instance["query"] for instance in image["instances"]]
            missed = len(set(kept.tolist()) ^ set(expected))
            errors.check("kept instances", f"kept at {threshold}, image {index}", missed, 0)
            if missed:
                continue
            assert kept.tolist() == expected, "the order is that of the queries"
            found = masks.upsample_masks(
                selection.mask_probs,
                index,
                kept,
                tuple(case.manifest["images"][index]["net_hw"]),
                (image["height"], image["width"]),
                cut,
            )
            full = [mask.T for chunk in found for mask in chunk]
            for instance, mask in zip(image["instances"], full, strict=True):
                scores = np.asarray(selection.scores)[index], np.asarray(selection.labels)[index]
                _compare(errors, instance, mask, *scores)


def _compare(errors, instance, mask, scores, labels):
    query = instance["query"]
    wrong = labels[query] != instance["class"] and instance["class_margin"] > CLASS_MARGIN
    errors.check("classes", f"class of query {query}", wrong, 0)
    near_cut = instance["lowres_within_1e-4"] > 0
    bound = SCORE_NEAR_CUT if near_cut else SCORE
    kind = "scores, pixels near the cut" if near_cut else "scores"
    errors.check(kind, f"score of query {query}", abs(scores[query] - instance["score"]), bound)
    rle = {"size": list(mask.shape), "counts": instance["rle_counts"].encode()}
    want = coco_mask.decode(rle)
    assert want.sum() == instance["area"]
    flipped = int((want != mask).sum())
    errors.check(
        "flipped pixels", f"mask of query {query}", flipped, instance["pixels_within_1e-4"]
    )
    union = int((want | mask).sum())
    if union:  # empty masks stay and are compared by their pixels above
        errors.check("mask IoU", f"1 - IoU of query {query}", flipped / union, IOU)
