"""Names of other implementations become the original's: whole, strictly, and by value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparseinst_jax.models import layers
from sparseinst_jax.models.sparseinst.weights import NAMES
from sparseinst_jax.models.trees import functional
from sparseinst_jax.setup import builders
from sparseinst_jax.setup.config import load_config
from sparseinst_jax.weights.convert import (
    original_shapes,
    original_to_ours,
    ours_to_original,
    rename_to_original,
)
from sparseinst_jax.weights.initial_weights import load_initial_weights
from sparseinst_jax.weights.reading.stored_arrays import WeightsFileError
from tests.unit import foreign_names

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = CONFIGS / "tiny.py"
R50, R101, SMALL = (3, 4, 6, 3), (3, 4, 23, 3), (1, 1, 1, 1)
LINEAR = tuple(
    f"decoder.inst_branch.{layer}.weight"
    for layer in ("fc", "cls_score", "mask_kernel", "objectness")
)


def published_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """The original's names and shapes of a configuration's network of 80 classes."""
    config = load_config(CONFIGS / f"{name}.py")
    _, *trees = functional(builders.build_model(config.model, 80, seed=None))
    return original_shapes(*trees, NAMES)


def tiny_trees(seed: int | None = 1, **backbone: object):
    """Parameters and statistics of a network of width 8, every array with values of its own."""
    config = load_config(TINY)
    with config.unlocked():
        config.model.backbone.update({"norm": "frozen_batch_norm"} | backbone)
    _, *trees = functional(builders.build_model(config.model, 3, seed=None))
    if seed is None:
        return trees
    rng = np.random.default_rng(seed)

    def draw(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {key: draw(value) for key, value in tree.items()}
        return rng.standard_normal(np.shape(tree)).astype(np.float32)

    return [draw(tree) for tree in trees]


def without_numbers(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Arrays of these shapes in four bytes each."""
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


def rename(state: dict[str, np.ndarray], pairs, prefix: str = "backbone.") -> dict[str, np.ndarray]:
    """Give the backbone of an original state dict its foreign names; the rest stays."""
    foreign = {name: a for name, a in state.items() if not name.startswith("backbone.")}
    pairs = list(pairs)
    assert len(dict(pairs)) == len(pairs)
    return foreign | {f"{prefix}{theirs}": state[f"backbone.{ours}"] for theirs, ours in pairs}


def as_paddle(state: dict[str, np.ndarray], pairs) -> dict[str, np.ndarray]:
    """The same with Paddle's linear layers, [in, out]."""
    foreign = rename(state, pairs)
    return {name: a.T if name in LINEAR else a for name, a in foreign.items()}


@pytest.mark.parametrize(
    ("config", "count", "variant", "deformable"),
    [
        ("paddle_iam_r50", 315, "b", ()),
        ("paddle_giam_r50", 317, "b", ()),
        ("paddle_giam_r50vd_aug", 327, "d", ()),
        ("paddle_giam_r50vd_ssld_dcn_aug", 353, "d", (2, 3, 4)),
    ],
)
def test_paddledetections_four_networks_come_whole(config, count, variant, deformable):
    shapes = published_shapes(config)
    pairs = foreign_names.paddle(R50, variant, deformable)
    state = as_paddle(without_numbers(shapes), pairs)
    assert len(state) == count
    found = rename_to_original(state, NAMES)
    assert {name: array.shape for name, array in found.arrays.items()} == shapes
    assert found.ignored == {} and not found.is_backbone
    assert found.ecosystem.startswith("PaddleDetection")
    clue = "conv1.conv1.conv.weight" if variant == "b" else "conv1.conv1_1.conv.weight"
    assert found.evidence == f"it has backbone.{clue}"


def test_mmdetections_368_arrays_come_whole_and_its_53_counters_are_left_out_by_name():
    shapes = published_shapes("mmdet_iam_r50")
    state = rename(without_numbers(shapes), foreign_names.torchvision(R50))
    counters = [
        name.removesuffix("running_var") + "num_batches_tracked"
        for name in state
        if name.endswith("running_var")
    ]
    state |= {name: np.array(7) for name in counters}
    assert len(state) == 368 and len(counters) == 53
    found = rename_to_original(state, NAMES)
    assert {name: array.shape for name, array in found.arrays.items()} == shapes
    assert found.ignored == dict.fromkeys(counters, "a counter that no forward pass reads")
    assert found.ecosystem == "mmdetection"


def test_mmdetections_variant_d_is_told_from_the_plain_one_by_its_stem():
    shapes = published_shapes("giam_r50vd")
    state = rename(without_numbers(shapes), foreign_names.mmdetection_d(R50))
    assert "backbone.stem.7.running_var" in state and "backbone.stem.8.weight" not in state
    found = rename_to_original(state, NAMES)
    assert {name: array.shape for name, array in found.arrays.items()} == shapes
    assert found.ecosystem == "mmdetection (ResNetV1d)"
    # Version 1 of the plain one: two of the three layers of a shortcut, counted from 0.
    plain = rename(without_numbers(published_shapes("giam_r50")), foreign_names.torchvision(R50))
    assert rename_to_original(plain, NAMES).file_names["backbone.res3.0.shortcut.norm.bias"] == (
        "backbone.layer2.0.downsample.1.bias"
    )
    assert found.file_names["backbone.layer2.0.downsample.1.weight"] == (
        "backbone.layer2.0.downsample.1.weight"
    )


def test_mmdetections_deformable_convolutions_hold_their_offsets_inside():
    state = without_numbers(published_shapes("giam_r50_dcn_aug"))
    foreign = rename(state, foreign_names.torchvision(R50, deformable=(3, 4)))
    assert foreign["backbone.layer4.2.conv2.conv_offset.weight"].shape == (18, 512, 3, 3)
    assert rename_to_original(foreign, NAMES).arrays.keys() == state.keys()


@pytest.mark.parametrize(
    ("backbone", "pairs"),
    [
        ({}, lambda: foreign_names.paddle(SMALL, "b")),
        ({"variant": "d"}, lambda: foreign_names.paddle(SMALL, "d")),
        (
            {"variant": "d", "deformable_stages": ("res3", "res4", "res5"), "modulated": True},
            lambda: foreign_names.paddle(SMALL, "d", (2, 3, 4)),
        ),
    ],
    ids=["b", "d", "dcn"],
)
def test_paddles_values_reach_their_places_with_linear_layers_as_they_are(backbone, pairs):
    params, statistics = tiny_trees(**backbone)
    state = as_paddle(ours_to_original(params, statistics, NAMES), pairs())
    found = rename_to_original(state, NAMES)
    loaded, norms = original_to_ours(found.arrays, *tiny_trees(None, **backbone), NAMES)
    fc = state["decoder.inst_branch.fc.weight"]
    assert fc.shape[0] == fc.shape[1] and not np.array_equal(fc, fc.T)
    kernel = loaded["decoder"]["inst_branch"]["fc"]["kernel"]
    np.testing.assert_array_equal(kernel, fc)  # [in, out] on both sides
    x = np.random.default_rng(0).standard_normal((2, fc.shape[0])).astype(np.float32)
    bias = state["decoder.inst_branch.fc.bias"]
    linear = layers.Linear(*fc.shape, rng=np.random.default_rng(0))
    linear.kernel.set_value(kernel)
    linear.bias.set_value(loaded["decoder"]["inst_branch"]["fc"]["bias"])
    np.testing.assert_allclose(linear(x), x @ fc + bias, atol=1e-5)
    shortcut = "short.conv.conv" if backbone else "short.conv"
    np.testing.assert_array_equal(
        loaded["backbone"]["res4"]["0"]["shortcut"]["kernel"][0, 0],
        state[f"backbone.res4.res4a.{shortcut}.weight"][:, :, 0, 0].T,
    )
    norm = norms["backbone"]["res2"]["0"]["conv2"]["norm"]
    for ours, theirs in (("mean", "_mean"), ("var", "_variance"), ("scale", "weight")):
        expected = state[f"backbone.res2.res2a.branch2b.norm.{theirs}"]
        np.testing.assert_array_equal(norm[ours], expected)
    back = ours_to_original(loaded, norms, NAMES)
    for name, array in ours_to_original(params, statistics, NAMES).items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)


def test_the_square_layer_of_the_full_network_is_transposed_by_value():
    fc = np.random.default_rng(0).standard_normal((1024, 1024)).astype(np.float32)
    name = "decoder.inst_branch.fc.weight"
    other = {"decoder.inst_branch.fc.bias": np.zeros(1024, np.float32), name: fc}
    paddle = other | {"backbone.conv1.conv1.conv.weight": np.zeros((64, 3, 7, 7), np.float32)}
    mmdetection = other | {"backbone.layer1.0.conv1.weight": np.zeros((64, 64, 1, 1), np.float32)}
    np.testing.assert_array_equal(rename_to_original(paddle, NAMES).arrays[name], fc.T)
    np.testing.assert_array_equal(rename_to_original(mmdetection, NAMES).arrays[name], fc)


def test_paddles_resnet_101_names_the_long_stages_blocks_a_b1_b2():
    state = without_numbers(published_shapes("giam_r101"))
    foreign = as_paddle(state, foreign_names.paddle(R101, "b"))
    assert "backbone.res4.res4b22.branch2c.norm._variance" in foreign
    assert rename_to_original(foreign, NAMES).arrays.keys() == state.keys()


def backbone_alone(config: str) -> dict[str, np.ndarray]:
    shapes = published_shapes(config)
    return without_numbers({n: s for n, s in shapes.items() if n.startswith("backbone.")})


def from_torchvision(config, depths):
    state = rename(backbone_alone(config), foreign_names.torchvision(depths), prefix="")
    return state | {"fc.weight": np.zeros((1000, 2048)), "bn1.num_batches_tracked": np.array(1)}


def from_detectron2(config):
    bare = {n.removeprefix("backbone."): a for n, a in backbone_alone(config).items()}
    return bare | {"stem.fc.weight": np.zeros((1000, 2048)), "stem.fc.bias": np.zeros(1000)}


def mirrored(config, head):
    bare = {n.removeprefix("backbone."): a for n, a in backbone_alone(config).items()}
    return bare | {f"{head}.weight": np.zeros((1000, 9)), f"{head}.bias": np.zeros(1000)}


def from_paddle(config, variant):
    state = rename(backbone_alone(config), foreign_names.paddle(R50, variant), prefix="")
    return state | {"fc.weight": np.zeros((2048, 1000)), "fc.bias": np.zeros(1000)}


@pytest.mark.parametrize(
    ("config", "make", "ecosystem"),
    [
        ("giam_r50", lambda c: from_torchvision(c, R50), "torchvision"),
        ("giam_r101", lambda c: from_torchvision(c, R101), "torchvision"),
        ("giam_r50", from_detectron2, "detectron2"),
        ("giam_r101", from_detectron2, "detectron2"),
        ("giam_r50vd", lambda c: mirrored(c, "fc"), "timm (ResNet-d)"),
        ("giam_cspdarknet53", lambda c: mirrored(c, "head.fc"), "timm (DarkNet)"),
        ("giam_darknet53", lambda c: mirrored(c, "head.fc"), "timm (DarkNet)"),
        ("giam_pvt_b1", lambda c: mirrored(c, "head"), "PVTv2"),
        ("giam_pvt_b2_linear", lambda c: mirrored(c, "head"), "PVTv2"),
        ("giam_r50", lambda c: from_paddle(c, "b"), "Paddle"),
        ("giam_r50vd", lambda c: from_paddle(c, "d"), "Paddle (ResNet-vd)"),
    ],
)
def test_imagenet_weights_fill_the_whole_backbone_and_leave_only_their_classifier(
    config, make, ecosystem
):
    state = make(config)
    assert not any(name.startswith("backbone.") for name in state)
    found = rename_to_original(state, NAMES)
    wanted = {name: array.shape for name, array in backbone_alone(config).items()}
    assert {name: array.shape for name, array in found.arrays.items()} == wanted
    assert found.is_backbone and found.ecosystem == ecosystem
    reasons = {"the classifier of ImageNet", "a counter that no forward pass reads"}
    assert set(found.ignored.values()) <= reasons
    assert len(found.ignored) + len(found.arrays) == len(state)


def tiny_backbone(seed: int, **options: object) -> dict[str, np.ndarray]:
    state = ours_to_original(*tiny_trees(seed, **options), NAMES)
    return {name: array for name, array in state.items() if name.startswith("backbone.")}


@pytest.mark.parametrize(
    ("variant", "pairs", "modulated"),
    [
        ("b", lambda: foreign_names.torchvision(SMALL), False),
        ("d", lambda: foreign_names.paddle(SMALL, "d"), True),
    ],
)
def test_a_deformable_network_starts_from_plain_imagenet_weights_with_offsets_of_zero(
    tmp_path, variant, pairs, modulated
):
    given = tiny_backbone(3, variant=variant)
    np.savez(
        tmp_path / "imagenet.npz", **rename(given, pairs(), prefix=""), **{"fc.bias": np.zeros(3)}
    )
    options = {"variant": variant, "deformable_stages": ("res4", "res5"), "modulated": modulated}
    config = load_config(TINY)
    with config.unlocked():
        config.model.backbone.update(options)
    _, *own = functional(builders.build_model(config.model, 3, seed=5))
    initial = load_initial_weights(tmp_path / "imagenet.npz", *own, ("a", "b", "c"), NAMES)
    loaded = ours_to_original(initial.params, initial.statistics, NAMES)
    offsets = [name for name in loaded if "conv2_offset" in name]
    assert len(offsets) == 4 and all(not loaded[name].any() for name in offsets)
    assert {name for name in initial.fresh if name.startswith("backbone.")} == set(offsets)
    for name, array in given.items():
        np.testing.assert_array_equal(loaded[name], array, err_msg=name)
    assert initial.ignored == {"fc.bias": "the classifier of ImageNet"}


def test_weights_of_the_other_variant_are_refused_with_the_option_that_fits(tmp_path):
    given = rename(tiny_backbone(3), foreign_names.torchvision(SMALL), prefix="")
    np.savez(tmp_path / "imagenet.npz", **given)
    with pytest.raises(ValueError, match=r"--config\.model\.backbone\.variant=b: set these"):
        load_initial_weights(tmp_path / "imagenet.npz", *tiny_trees(2, variant="d"), "abc", NAMES)


def test_names_that_no_rule_knows_stay_and_are_left_over():
    state = as_paddle(ours_to_original(*tiny_trees(), NAMES), foreign_names.paddle(SMALL, "b"))
    state["backbone.res9.res9a.branch2a.conv.weight"] = np.zeros((1, 1, 1, 1), np.float32)
    found = rename_to_original(state, NAMES)
    with pytest.raises(ValueError, match=r"1 in the file but not in the model: backbone\.res9\."):
        original_to_ours(found.arrays, *tiny_trees(None), NAMES)


def test_two_names_for_one_array_are_refused():
    first, second = "layer1.0.bn1.weight", "res2.0.conv1.norm.weight"
    state = {name: np.zeros(4, np.float32) for name in (first, second)}
    state["layer1.0.conv1.weight"] = np.zeros((4, 4, 1, 1), np.float32)
    with pytest.raises(WeightsFileError, match=f"{first} and {second}"):
        rename_to_original(state, NAMES)
