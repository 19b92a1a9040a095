from pathlib import Path

import numpy as np
import pytest

from sparseinst_jax import builders, layers
from sparseinst_jax.config import load_config
from sparseinst_jax.training.initial_weights import load_initial_weights
from sparseinst_jax.weights import convert

CONFIG = load_config(Path(__file__).parents[2] / "configs" / "tiny.py")


def fresh(num_classes: int, seed: int):
    _, params, statistics = layers.functional(builders.build_model(CONFIG.model, num_classes, seed))
    return params, statistics


@pytest.fixture(scope="module")
def given() -> dict[str, np.ndarray]:
    return convert.ours_to_original(*fresh(3, seed=1))


def load(tmp_path, given, num_classes: int):
    np.savez(tmp_path / "weights.npz", **given)
    params, statistics, kept = load_initial_weights(
        tmp_path / "weights.npz", *fresh(num_classes, seed=2)
    )
    return convert.ours_to_original(params, statistics), kept


def test_the_same_classes_take_every_weight(tmp_path, given):
    loaded, kept = load(tmp_path, given, 3)
    assert kept == []
    assert all(np.array_equal(loaded[name], given[name]) for name in given)


def test_other_classes_start_the_class_layer_afresh_and_nothing_else(tmp_path, given):
    loaded, kept = load(tmp_path, given, 5)
    assert sorted(kept) == [
        "decoder.inst_branch.cls_score.bias",
        "decoder.inst_branch.cls_score.weight",
    ]
    expected = convert.ours_to_original(*fresh(5, seed=2))
    for name, array in loaded.items():
        np.testing.assert_array_equal(array, (expected if name in kept else given)[name])


def test_a_file_of_the_backbone_alone_leaves_the_rest_fresh(tmp_path, given):
    backbone = {name: array for name, array in given.items() if name.startswith("backbone.")}
    loaded, kept = load(tmp_path, backbone, 3)
    expected = convert.ours_to_original(*fresh(3, seed=2))
    assert {name.partition(".")[0] for name in kept} == {"encoder", "decoder"}
    for name, array in loaded.items():
        np.testing.assert_array_equal(array, (given if name in backbone else expected)[name])


def test_a_hole_in_a_part_an_unknown_name_and_a_wrong_shape_are_refused_together(tmp_path, given):
    broken = dict(given)
    del broken["decoder.inst_branch.mask_kernel.bias"]
    broken["decoder.unknown.weight"] = np.zeros((2, 2), np.float32)
    broken["decoder.mask_branch.projection.bias"] = np.zeros(99, np.float32)
    with pytest.raises(ValueError) as caught:
        load(tmp_path, broken, 3)
    message = str(caught.value)
    assert "decoder/inst_branch/mask_kernel/bias" in message
    assert "decoder.unknown.weight" in message
    assert "decoder.mask_branch.projection.bias (99,)" in message
