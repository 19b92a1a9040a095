"""FastInst against its original: every recorded tensor, final mask, cost, loss, gradient and step.

In one file, which one process runs: a case's passes are computed once.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json

import jax
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from sparseinst_jax import matching
from sparseinst_jax.inference import masks
from sparseinst_jax.models.fastinst import inference, model
from sparseinst_jax.setup.builders import build_objective
from sparseinst_jax.training.optimizer import ParameterRules
from sparseinst_jax.weights.convert import ours_to_original
from tests.parity import cases, steps
from tests.parity.fastinst_points import RecordedPoints

FORWARD_CASES = ("fastinst_r50_x1", "fastinst_r50_x3", "fastinst_r101_x3", "fastinst_r50vd_dcn_x1")
TRAIN_CASES = ("train_fastinst_r50_x1", "train_fastinst_r50_x3", "train_fastinst_r50vd_dcn_x1")
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

COST = 2e-4  # half a unit of float32 at -1000 is 3.1e-5
# Relative. Proposals and pairs switch at near ties, so that from the third step on single terms of
# the original's own two runs differ by up to a quarter: then the totals alone are compared.
TERM, MASK_TERM, TERM_STEP_1 = 1e-5, 1e-4, 2e-3
TOTAL = (1e-5, 2e-4, 1e-2, 1e-2, 3e-2, 5e-2)
GRADIENT_NORM = 1e-3
LEARNING_RATE = 1e-4
RULES = ParameterRules(undecayed=("norm", "auxiliary"), rate_factors=(("backbone", 0.1),))
AFTER_1, AFTER_1_SHARE, AFTER_1_REST = 2e-6, 0.99, 2 * LEARNING_RATE
AFTER_5, AFTER_5_SHARE, AFTER_5_REST = 1e-4, 0.95, 10 * LEARNING_RATE


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


def _objective(case, points):
    apply, _, _ = case.model()
    return dataclasses.replace(build_objective(case.config, apply), points=points)


def _named(outputs, ours):
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
    named = _named(outputs, ours)
    del named["head_masks_0"]  # the only head of inference is the last one
    named[f"head_masks_{case.manifest['dec_layers']}"] = named["pred_masks"]
    for i in range(case.manifest["dec_layers"]):
        named[f"head_masks_{i}"] = ours[f"mask_logits_{i}"]
        blocked = ~ours[f"is_seen_{i}"]
        named[f"attn_mask_fraction_{i}"] = np.array([blocked.mean(dtype=np.float32)])
    return outputs, named


@functools.cache
def _train(name):
    """Both passes of the first step, and five steps."""
    case = cases.load(name)
    points = RecordedPoints(case)
    objective = _objective(case, points)

    run = steps.take(case, objective, LEARNING_RATE, RULES, points.note_matches)
    return objective, run


@pytest.mark.parametrize("name", FORWARD_CASES)
def test_every_recorded_tensor_equals_the_originals(name, errors):
    _compare_tensors(errors, cases.load(name), _forward(name)[1])


def _compare_tensors(errors, case, ours):
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


@pytest.fixture(scope="module", params=TRAIN_CASES)
def name(request):
    """Go through the cases one after the other, and give their gigabytes back."""
    _forward.cache_clear()
    yield request.param
    _train.cache_clear()
    steps.give_memory_back()


def test_every_recorded_tensor_of_both_passes_equals_the_originals(name, errors):
    case, (objective, run) = cases.load(name), _train(name)
    outputs, ours = cases.run(case, train=True)
    apply, params, statistics = case.model()
    batch = case.batch()

    @jax.jit
    def guide(params, statistics, outputs, bits, query_index):
        named = {}
        seen = objective.guide(query_index, bits)
        predictions, _ = apply(
            params, statistics, outputs, seen, method="guided", intermediates=named
        )
        return predictions, named

    query_index = run.matches[0]["guided"]
    predictions, named = guide(params, statistics, outputs, batch.masks, query_index)
    ours |= {key: np.asarray(value) for key, value in named.items()}
    for i in range(len(predictions)):
        ours[f"attn_mask_{i}"] = ~ours[f"is_seen_{i}"]
        ours[f"guided_attn_mask_{i}"] = ~ours["guided_is_seen"]
        for part in ("pixel_cross", "pixel_ffn", "query_cross", "query_self", "query_ffn"):
            ours[f"guided_{part}_{i}"] = ours.pop(f"{part}_guided_{i}")
    ours = _named(outputs, ours)
    every = {f"head_{i}": x for i, x in enumerate(outputs.heads)}
    every |= {f"guided_{i}": x for i, x in enumerate(predictions)}
    for key, prediction in every.items():
        ours[f"pred_logits/{key}"] = np.asarray(prediction.class_logits)
        ours[f"pred_masks/{key}"] = np.asarray(prediction.mask_logits)
    _compare_tensors(errors, case, ours)


def test_costs_and_pairs_equal_the_originals(name, errors):
    case, (_, run) = cases.load(name), _train(name)
    pairs = case.manifest["steps_f32"][0]["pairs"]
    number = {image: entry["num_gt"] for image, entry in enumerate(case.manifest["images"])}
    for key, (queries, targets) in pairs.items():
        matching, image = key.split("/")
        image = int(image)
        cost = run.scores[0][matching][image][:, : number[image]]
        _compare_cost(errors, f"cost/{key}", cost, case.tensors)
        got = {(q, t) for t, q in enumerate(run.matches[0][matching][image].tolist()) if q >= 0}
        wrong = len(got ^ set(zip(queries, targets, strict=True)))
        errors.check("matched pairs", key, wrong, 0)


def _compare_cost(errors, key, cost, recorded):
    if key in recorded:
        got, want = cost, recorded[key]
    else:
        assert cost.shape == tuple(recorded[f"{key}/shape"])
        got, want = cost.ravel()[recorded[f"{key}/idx"]], recorded[f"{key}/val"]
    errors.check("costs", key, np.abs(got - want).max(initial=0), COST)


def _terms(num_layers):
    """Ours to the original's names of losses."""
    suffixes = {"": ""}
    suffixes |= {f"_guided_{i}": f"_{i}" for i in range(num_layers)}
    suffixes |= {f"_head_{i}": f"_{i + num_layers}" for i in range(num_layers)}
    kinds = {"class": "loss_ce", "mask": "loss_mask", "dice": "loss_dice"}
    return {
        **{f"{a}{x}": f"{b}{y}" for x, y in suffixes.items() for a, b in kinds.items()},
        "proposal": "loss_proposal",
    }


def test_each_loss_term_equals_the_originals_for_five_steps(name, errors):
    case, (_, run) = cases.load(name), _train(name)
    names = _terms(case.manifest["dec_layers"])
    assert len(names) == 3 * (2 * case.manifest["dec_layers"] + 1) + 1
    for number, record in enumerate(case.manifest["steps_f32"]):
        ours = run.losses[number]
        assert ours["num_targets"] == record["num_instances"]
        if number < 2:
            for mine, theirs in names.items():
                want = record["weighted"][theirs]
                is_mask = mine.startswith(("mask", "dice"))
                bound = TERM_STEP_1 if number else MASK_TERM if is_mask else TERM
                error = abs(ours[f"loss/{mine}"] - want) / want
                errors.check(f"losses, step {number}", mine, error, bound)
        error = abs(ours["loss/total"] - record["total"]) / record["total"]
        errors.check("losses, total", f"total, step {number}", error, TOTAL[number])
    weights, objective = case.manifest["loss_weights"], case.config.objective
    for mine, theirs in names.items():
        assert objective[f"{mine.split('_')[0]}_weight"] == weights[theirs]


def _trained(key):
    """Which samples of a parameter's gradient are no rounding: not those of the key's bias.

    The middle third of an attention's `in_proj_bias` moves all logits of a softmax alike.
    """
    return lambda index: (index < 256) | (index >= 512) if "in_proj_bias" in key else index >= 0


def test_every_gradient_equals_the_originals(name, errors):
    case, (_, run) = cases.load(name), _train(name)
    names = case.manifest["param_names"]
    assert set(names) == run.gradients.keys()
    recorded = np.stack([case.tensors["grad_norms"], case.tensors["grad_norms_f64"]])
    for index, key in enumerate(names):
        norm = np.linalg.norm(run.gradients[key].astype(np.float64))
        error = np.abs(norm / recorded[:, index] - 1).min()
        errors.check("gradient norms", key, error, GRADIENT_NORM)
    for key in case.manifest["picked"]:
        chosen = _trained(key)(case.tensors[f"param/{key}/idx"])
        steps.compare_gradient(errors, case, key, run.gradients[key].ravel(), chosen)


@pytest.mark.parametrize(
    ("number", "near", "share", "rest"),
    [
        (1, AFTER_1, AFTER_1_SHARE, AFTER_1_REST),
        (steps.NUM_STEPS, AFTER_5, AFTER_5_SHARE, AFTER_5_REST),
    ],
    ids=["one step", "five steps"],
)
def test_parameters_equal_the_originals_after(name, number, near, share, rest, errors):
    case, (_, run) = cases.load(name), _train(name)
    distances = []
    for key in case.manifest["picked"]:
        parts = ("idx", f"after{number}", f"after{number}_f64")
        index, *after = (case.tensors[f"param/{key}/{part}"] for part in parts)
        chosen = _trained(key)(index)
        got = run.after[number][key].ravel()[index]
        distances.append(steps.distance(got, *after)[chosen])
    everything = np.concatenate(distances)
    group = f"parameters, step {number}"
    errors.check(group, f"{share:.0%} of the entries", np.quantile(everything, share), near)
    errors.check(group, "the worst entry", everything.max(), rest)


@pytest.mark.parametrize("batch", EMPTY_BATCHES)
def test_batches_without_objects_train_as_the_originals(batch, errors):
    case = cases.load(f"train_fastinst_empty/{batch}")
    _, params, statistics = case.model()
    points = RecordedPoints(case)
    objective = _objective(case, points)
    content = case.batch()
    record = case.manifest["original"]["ok"]
    counts = jax.tree.map(lambda n: np.maximum(n, np.float32(1)), objective.count(content))

    @jax.jit
    def match_scores(params, statistics, content):
        outputs, _ = objective.forward(params, statistics, content)
        return objective.match_scores(outputs, content, None)

    scores = match_scores(params, statistics, content)
    matches = {
        key: matching.match(score, content.is_target, minimise=True)
        for key, score in jax.device_get(scores).items()
    }
    points.note_matches(matches)

    @jax.jit
    def losses(params, matches):
        def total(params):
            outputs, new = objective.forward(params, statistics, content)
            return objective.loss(params, new, outputs, content, matches, counts, None)

        return jax.value_and_grad(total, has_aux=True)(params)

    (_, terms), gradients = losses(params, matches)
    for mine, theirs in _terms(1).items():
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
