"""Every recorded tensor of a forward pass, from the normalised input to the mask logits."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from tests.parity import cases, golden_weights

# Each bound is some ten times the distance of the original's own float32 run from its float64 run.
ACTIVATION_MAX, ACTIVATION_RMS = 1e-4, 1e-5  # in standard deviations of the tensor
HEAD = 1e-4  # class logits, mask kernels, objectness logits: noise up to 2.5e-5
IAM = 5e-4  # values up to tens, noise up to 8.4e-5
MASK, MASK_IN_STD = 1e-3, 1e-4  # noise up to 2.1e-4, and 2.1e-5 deviations

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
        _compare(errors, key, ours[key], case.tensors)


def _compare(errors, key, value, recorded):
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
