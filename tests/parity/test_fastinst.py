"""FastInst against its original: every recorded tensor, final mask, cost, loss, gradient and step.

In one file, which one process runs: a case's passes are computed once.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from sparseinst_jax import matching
from sparseinst_jax.inference import masks
from sparseinst_jax.models.fastinst import inference, model
from sparseinst_jax.setup.builders import build_objective
from sparseinst_jax.weights.convert import ours_to_original
from tests.parity import cases
from tests.parity.fastinst_points import RecordedPoints, given_points

FORWARD_CASES = ("fastinst_r50_x1", "fastinst_r50_x3", "fastinst_r101_x3", "fastinst_r50vd_dcn_x1")
EMPTY_BATCHES = (
    "second_image_empty",
    "first_image_empty",
    "all_empty",
    "all_masks_empty_but_objects_present",
)

# Some ten times the distance of the original's own float32 run from its float64 run.
ACTIVATION_MAX, ACTIVATION_RMS = 1e-4, 1e-5  # in standard deviations of the tensor
CLASS_LOGITS, MASK_LOGITS = 1e-4, 2e-4  # noise 9e-6 and 1.6e-5
LOCATION = 1e-6
SCORE = 2e-5
IOU, FLIPPED = 1e-3, 3  # pixels near the cut are not recorded

TERM = 1e-5  # relative
GRADIENT_NORM = 1e-3


# Logits so near to 0 that rounding decides whether a query sees the pixel there: one bit moves the
# query by 1e-2. Of these (layer, image, query, row, column) the original's runs see the pixel.
SEEN = {"fastinst_r50_x3": [(0, 0, 43, 11, 4)]}  # our logit there: -2.4e-6
NEAR = 2e-5


def _seen_as_recorded(name):
    """Make the attention masks of a case with its nearest ties as the original's."""
    seen_pixels, layers = model.seen_pixels, itertools.count()

    def tied(is_seen, num_auxiliary):
        layer = next(layers)
        for of, *place in SEEN.get(name, ()):
            if of == layer:
                is_seen = is_seen.at[tuple(place)].set(True)
        return seen_pixels(is_seen, num_auxiliary)

    return tied


def make_objective(case):
    return dataclasses.replace(build_objective(case.config, case.apply), points=given_points)


def named_tensors(outputs, ours):
    """Add the predictions and what has another name or layout in the recordings."""
    tokens = {
        key: value.transpose(1, 0, 2)
        for key, value in ours.items()
        if key.startswith(("pixel_", "query_", "guided_"))
        and value.dtype != bool
        and value.ndim == 3
    }
    masks_of_heads = {
        f"head_masks_{i}": np.asarray(head.mask_logits) for i, head in enumerate(outputs.heads)
    }
    last = outputs.heads[-1]
    return {
        **ours,
        **tokens,
        **masks_of_heads,
        "proposal_features": ours["proposal_features"].transpose(0, 2, 1),
        "proposal_pos": ours["proposal_positions"].transpose(0, 2, 1),
        "proposal_value": np.take_along_axis(
            ours["proposal_score_map"], ours["proposal_index"], axis=1
        ),
        "query_locations": np.asarray(outputs.query_locations),
        "pred_logits": np.asarray(last.class_logits),
        "pred_masks": np.asarray(last.mask_logits),
    }


@functools.cache
def _forward(name):
    case = cases.load(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "seen_pixels", _seen_as_recorded(name))
        outputs, ours = cases.run(case)
    for layer, image, query, *place in SEEN.get(name, ()):
        assert abs(ours[f"mask_logits_{layer}"][image, query, *place]) < NEAR
    named = named_tensors(outputs, ours)
    del named["head_masks_0"]  # the only head of inference is the last one
    named[f"head_masks_{case.manifest['dec_layers']}"] = named["pred_masks"]
    for i in range(case.manifest["dec_layers"]):
        named[f"head_masks_{i}"] = ours[f"mask_logits_{i}"]
        blocked = ~ours[f"is_seen_{i}"]
        named[f"attn_mask_fraction_{i}"] = np.array([blocked.mean(dtype=np.float32)])
    return outputs, named


@pytest.mark.parametrize("name", FORWARD_CASES)
def test_every_recorded_tensor_equals_the_originals(name, errors):
    compare_tensors(errors, cases.load(name), _forward(name)[1])


def compare_tensors(errors, case, ours):
    parts = ("/idx", "/val", "/shape", "/stats", "/packbits")
    recorded = {key.rpartition("/")[0] if key.endswith(parts) else key for key in case.tensors}
    left = ("param/", "grad_norms", "cost/", "uncertain/")
    recorded = sorted(key for key in recorded if not key.startswith(left))
    assert set(recorded) <= ours.keys(), f"not computed: {set(recorded) - ours.keys()}"
    for key in recorded:
        if f"{key}/packbits" in case.tensors:
            assert ours[key].shape == tuple(case.tensors[f"{key}/shape"]), key
            differ = np.packbits(ours[key]) ^ case.tensors[f"{key}/packbits"]
            errors.check("attention masks", key, np.unpackbits(differ).sum(), 0)
        else:
            _compare_tensor(errors, key, ours[key], case.tensors)


def _compare_tensor(errors, key, value, recorded):
    summary, std = 0.0, None
    if key in recorded:
        assert value.shape == recorded[key].shape, f"{key}: {value.shape}, {recorded[key].shape}"
        got, want = np.ravel(value), np.ravel(recorded[key])
        std = want.std()
    else:
        assert value.shape == tuple(recorded[f"{key}/shape"]), key
        got, want = value.ravel()[recorded[f"{key}/idx"]], recorded[f"{key}/val"]
        mean, std, low, high = recorded[f"{key}/stats"]
        ours = value.astype(np.float64)
        seen = np.array([ours.mean(), ours.std(), ours.min(), ours.max()])
        summary = np.abs(seen - [mean, std, low, high]).max()
    difference = np.abs(got.astype(np.float64) - want)
    largest = max(difference.max(), summary)
    if key == "proposal_index":
        errors.check("proposals", key, largest, 0)
    elif key == "query_locations":
        errors.check("proposals", key, largest, LOCATION)
    elif key.startswith(("pred_", "head_masks")):
        bound = CLASS_LOGITS if key.startswith("pred_logits") else MASK_LOGITS
        errors.check("outputs", f"{key} max", largest, bound)
    else:
        errors.check("intermediate tensors", f"{key} max", largest, ACTIVATION_MAX * (std or 1))
        rms = np.sqrt(np.mean(difference**2))
        errors.check("intermediate tensors", f"{key} rms", rms, ACTIVATION_RMS * (std or 1))


@pytest.mark.parametrize("name", FORWARD_CASES)
def test_every_final_instance_equals_the_originals(name, errors):
    case, (outputs, _) = cases.load(name), _forward(name)
    selection = inference.select(outputs)
    assert np.asarray(selection.is_kept).all(), "there is no threshold"
    recorded = json.loads((cases.GOLDEN / name / "detections.json").read_text())
    for index, image in enumerate(recorded):
        labels, queries = (np.asarray(x)[index] for x in (selection.labels, selection.query_index))
        probs = np.asarray(selection.scores)[index]
        size = tuple(case.manifest["images"][index]["net_hw"])
        original = image["height"], image["width"]
        cut = masks.MaskCut(0.5, stride=8, are_logits=True, measures=True)
        chunks = list(masks.upsample_masks(selection.masks, index, queries, size, original, cut))
        full = [mask.T for chunk, _ in chunks for mask in chunk]
        scores = probs * np.concatenate([measured for _, measured in chunks])
        pairs = zip(queries.tolist(), labels.tolist(), strict=True)
        ours = {pair: place for place, pair in enumerate(pairs)}
        wanted = {(x["query"], x["class"]) for x in image["instances"]}
        assert image["margin_at_100"] > 1e-5
        errors.check("kept instances", f"pairs, image {index}", len(ours.keys() ^ wanted), 0)
        for instance in image["instances"]:
            place = ours[instance["query"], instance["class"]]
            title = f"query {instance['query']}"
            errors.check("scores", title, abs(probs[place] - instance["class_prob"]), SCORE)
            errors.check("scores", title, abs(scores[place] - instance["score"]), SCORE)
            mask = full[place]
            rle = {"size": list(mask.shape), "counts": instance["rle_counts"].encode()}
            want = coco_mask.decode(rle)
            assert want.sum() == instance["area"]
            flipped, union = int((want != mask).sum()), int((want | mask).sum())
            errors.check("flipped pixels", title, flipped, FLIPPED)
            if union:
                bound = max(IOU, FLIPPED / union)
                errors.check("mask IoU", f"1 - IoU of {title}", flipped / union, bound)


def term_names(num_layers):
    """Ours to the original's names of losses."""
    suffixes = {"": ""}
    suffixes |= {f"_guided_{i}": f"_{i}" for i in range(num_layers)}
    suffixes |= {f"_head_{i}": f"_{i + num_layers}" for i in range(num_layers)}
    kinds = {"class": "loss_ce", "mask": "loss_mask", "dice": "loss_dice"}
    return {
        **{f"{a}{x}": f"{b}{y}" for x, y in suffixes.items() for a, b in kinds.items()},
        "proposal": "loss_proposal",
    }


@functools.cache
def _empty_step():
    """What all the batches without objects share: one shape, so that it is compiled once."""
    case = cases.load(f"train_fastinst_empty/{EMPTY_BATCHES[0]}")
    _, params, statistics = case.model()
    objective = make_objective(case)

    @jax.jit
    def first_half(params, content, drawn):
        outputs, pull_back, new = jax.vjp(
            lambda params: objective.forward(params, statistics, content), params, has_aux=True
        )
        return outputs, pull_back, new, objective.match_scores(outputs, content, drawn)

    @jax.jit
    def second_half(params, outputs, pull_back, new, content, matches, counts, drawn):
        (_, terms), (own, of_outputs) = jax.value_and_grad(
            objective.loss, (0, 2), has_aux=True, allow_int=True
        )(params, new, outputs, content, matches, counts, drawn)
        (gradients,) = pull_back(of_outputs)
        return terms, jax.tree.map(jnp.add, gradients, own)

    return params, objective, first_half, second_half


def _with_targets(batch, number):
    """Pad the targets of a batch to a number of them."""
    more = number - batch.labels.shape[1]
    padded = {
        key: np.pad(array, [(0, 0), (0, more)] + [(0, 0)] * (array.ndim - 2))
        for key, array in batch._asdict().items()
        if key in ("labels", "masks", "is_target")
    }
    return batch._replace(**padded)


@pytest.mark.parametrize("batch", EMPTY_BATCHES)
def test_batches_without_objects_train_as_the_originals(batch, errors):
    case = cases.load(f"train_fastinst_empty/{batch}")
    params, objective, first_half, second_half = _empty_step()
    points = RecordedPoints(case, objective)
    content = _with_targets(case.batch, 4)
    record = case.manifest["original"]["ok"]
    counts = jax.tree.map(lambda n: np.maximum(n, np.float32(1)), objective.count(content))
    *forward, scores = first_half(params, content, points.of_matching())
    matches = {
        key: matching.match(score, content.is_target, minimise=True)
        for key, score in jax.device_get(scores).items()
    }
    drawn = points.of_losses(matches)
    terms, gradients = second_half(params, *forward, content, matches, counts, drawn)
    for mine, theirs in term_names(1).items():
        want = record["weighted"][theirs]
        error = abs(float(terms[mine]) - want)
        errors.check("losses, empty batches", mine, error, TERM * abs(want) + 1e-6)
    gradients = ours_to_original(gradients, {}, case.family.weights)
    recorded = np.stack([case.tensors["grad_norms"], case.tensors["grad_norms_f64"]])
    for index, key in enumerate(case.manifest["param_names"]):
        norm, want = np.linalg.norm(gradients[key].astype(np.float64)), recorded[:, index]
        if not want.any():
            errors.check("gradients, empty batches", key, norm, 0)
        else:
            error = np.abs(norm / want - 1).min()
            errors.check("gradient norms, empty batches", key, error, GRADIENT_NORM)
