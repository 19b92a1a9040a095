"""Every recorded tensor of a forward pass, from the normalised input to the final instances.

In one file, which one process runs: the passes of all networks are computed once for both.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from sparseinst_jax.inference import masks
from sparseinst_jax.models.sparseinst import inference
from sparseinst_jax.models.sparseinst.model import Outputs
from tests.parity import cases, golden_weights

# Each bound is some ten times the distance of the original's own float32 run from its float64 run.
ACTIVATION_MAX, ACTIVATION_RMS = 1e-4, 1e-5  # in standard deviations of the tensor
HEAD = 1e-4  # class logits, mask kernels, objectness logits: noise up to 2.5e-5
IAM = 5e-4  # values up to tens, noise up to 8.4e-5
MASK, MASK_IN_STD = 1e-3, 1e-4  # noise up to 2.1e-4, and 2.1e-5 deviations

# Of the final instances: which are kept, their classes and scores, every mask's pixels.
SCORE = 2e-5  # noise of the original up to 5e-6
# One mask pixel that crosses the 0.45 cut changes the rescoring by up to 1 / area: 6.4e-5 seen.
SCORE_NEAR_CUT = 1e-3
IOU = 1e-3  # 1 - IoU
CLASS_MARGIN = 1e-4  # below it the second class may win by rounding

FORWARD_CASES = (
    *cases.DETECTION_CASES,
    "train_r50_base",
    "train_r50_giam",
    "train_empty_r50_giam",
    "train_r50vd_dcn_giam",
)


@pytest.mark.parametrize("name", FORWARD_CASES)
def test_every_recorded_tensor_equals_the_originals(name, errors):
    case, ours = cases.load(name), cases.forward(name)
    keys = {key.split("/")[0] for key in case.tensors} - {"param", "grad_norms", "grad_norms_f64"}
    recorded = sorted(key for key in keys if not key.startswith("cost"))
    assert set(recorded) <= ours.keys(), f"not computed: {set(recorded) - ours.keys()}"
    for key in recorded:
        _compare_tensor(errors, key, ours[key], case.tensors)


def _compare_tensor(errors, key, value, recorded):
    is_whole = key in recorded
    shape = recorded[key].shape if is_whole else tuple(recorded[f"{key}/shape"])
    assert value.shape == shape, f"{key}: got {value.shape}, expected {shape}"
    if is_whole:
        got, want = value.ravel(), recorded[key].ravel()
        std = want.std()
        summary = 0.0
    else:
        got, want = value.ravel()[recorded[f"{key}/idx"]], recorded[f"{key}/val"]
        mean, std, low, high = recorded[f"{key}/stats"]
        ours = value.astype(np.float64)
        # Mean, deviation and range see every element; each can move by the bound at most.
        seen = np.array([ours.mean(), ours.std(), ours.min(), ours.max()])
        summary = np.abs(seen - [mean, std, low, high]).max()
    difference = np.abs(got.astype(np.float64) - want)
    bound = _bound(key, std)
    group = "outputs" if key.startswith("pred_") else "intermediate tensors"
    errors.check(group, f"{key} max", max(difference.max(), summary), bound)
    if key not in ("pred_logits", "pred_kernel", "pred_scores", "iam", "pred_masks"):
        errors.check(group, f"{key} rms", np.sqrt(np.mean(difference**2)), ACTIVATION_RMS * std)


def _bound(key, std):
    if key in ("pred_logits", "pred_kernel", "pred_scores"):
        return HEAD
    if key == "iam":
        return IAM
    if key == "pred_masks":
        return max(MASK, MASK_IN_STD * std)
    return ACTIVATION_MAX * std


@pytest.mark.parametrize("name", FORWARD_CASES)
def test_the_weights_drawn_again_are_those_of_the_recording(name):
    manifest = cases.load(name).manifest
    for key, digest in manifest.get("weights_sha256_16", {}).items():
        array = golden_weights.tensor(key, manifest["state_dict"][key], manifest["weights_seed"])
        assert hashlib.sha256(array.tobytes()).hexdigest()[:16] == digest, key
    for entry in manifest["images"]:
        image = golden_weights.image(*entry["net_hw"], entry["image_seed"])
        if "sha256_16" in entry:
            assert hashlib.sha256(image.tobytes()).hexdigest()[:16] == entry["sha256_16"]


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
                selection.masks,
                index,
                kept,
                tuple(case.manifest["images"][index]["net_hw"]),
                (image["height"], image["width"]),
                masks.MaskCut(cut, stride=4),
            )
            full = [mask.T for chunk, _ in found for mask in chunk]
            for instance, mask in zip(image["instances"], full, strict=True):
                scores = np.asarray(selection.scores)[index], np.asarray(selection.labels)[index]
                _compare_instance(errors, instance, mask, *scores)


def _compare_instance(errors, instance, mask, scores, labels):
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
        # One allowed pixel of a mask of fewer than a thousand is a larger share than the bound.
        bound = max(IOU, instance["pixels_within_1e-4"] / union)
        errors.check("mask IoU", f"1 - IoU of query {query}", flipped / union, bound)
