import json

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from sparseinst_jax.models.sparseinst.weights import NAMES
from sparseinst_jax.models.trees import functional
from sparseinst_jax.setup import builders
from sparseinst_jax.setup.config import load_config
from sparseinst_jax.weights.convert import (
    load_weights,
    original_shapes,
    original_to_ours,
    ours_to_original,
    rename_to_original,
)
from tests.parity import cases

# The end_to_end cases have the networks of two of these.
RECORDED = sorted(
    path.parent.name
    for path in cases.GOLDEN.glob("*giam*/manifest.json")
    if not path.parent.name.startswith("end_to_end")
)


def _model():
    """A tree with one array of each kind of the real model."""
    params = {
        "backbone": {"res2": {"0": {"conv1": {"kernel": np.zeros((1, 1, 3, 4), np.float32)}}}},
        "encoder": {"ppm": {"stages": {"3": {"bias": np.zeros(2, np.float32)}}}},
        "decoder": {
            "inst_branch": {
                "inst_convs": {"3": {"bias": np.zeros(5, np.float32)}},
                "iam_conv": {"kernel": np.zeros((3, 3, 2, 8), np.float32)},
                "fc": {"kernel": np.zeros((6, 7), np.float32)},
                "softmax_bias": np.zeros(1, np.float32),
            }
        },
    }
    norm = {leaf: np.zeros(4, np.float32) for leaf in ("scale", "bias", "mean", "var")}
    return params, {"backbone": {"res2": {"0": {"conv1": {"norm": norm}}}}}


def _state_dict():
    rng = np.random.default_rng(0)
    shapes = {
        "backbone.res2.0.conv1.weight": (4, 3, 1, 1),
        "backbone.res2.0.conv1.norm.weight": (4,),
        "backbone.res2.0.conv1.norm.bias": (4,),
        "backbone.res2.0.conv1.norm.running_mean": (4,),
        "backbone.res2.0.conv1.norm.running_var": (4,),
        "encoder.ppm.stages.3.1.bias": (2,),
        "decoder.inst_branch.inst_convs.6.bias": (5,),
        "decoder.inst_branch.iam_conv.weight": (8, 2, 3, 3),
        "decoder.inst_branch.fc.weight": (7, 6),
        "decoder.inst_branch.softmax_bias": (1,),
    }
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def test_each_array_lands_at_its_place_in_our_layout():
    state = _state_dict()
    params, statistics = original_to_ours(state, *_model(), NAMES)
    block = params["backbone"]["res2"]["0"]["conv1"]
    np.testing.assert_array_equal(
        block["kernel"][0, 0], state["backbone.res2.0.conv1.weight"][:, :, 0, 0].T
    )
    branch = params["decoder"]["inst_branch"]
    iam = state["decoder.inst_branch.iam_conv.weight"]
    assert branch["iam_conv"]["kernel"][2, 1, 0, 5] == iam[5, 0, 2, 1]
    assert branch["fc"]["kernel"][4, 3] == state["decoder.inst_branch.fc.weight"][3, 4]
    np.testing.assert_array_equal(
        branch["inst_convs"]["3"]["bias"], state["decoder.inst_branch.inst_convs.6.bias"]
    )
    np.testing.assert_array_equal(
        params["encoder"]["ppm"]["stages"]["3"]["bias"], state["encoder.ppm.stages.3.1.bias"]
    )
    norm = statistics["backbone"]["res2"]["0"]["conv1"]["norm"]
    for ours, theirs in [("scale", "weight"), ("mean", "running_mean"), ("var", "running_var")]:
        np.testing.assert_array_equal(norm[ours], state[f"backbone.res2.0.conv1.norm.{theirs}"])


def test_there_and_back_gives_the_same_state_dict():
    state = _state_dict()
    back = ours_to_original(*original_to_ours(state, *_model(), NAMES), NAMES)
    assert back.keys() == state.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)
        assert back[name].flags.c_contiguous


def test_every_fault_is_named_in_one_error():
    state = _state_dict()
    state["decoder.extra.weight"] = np.zeros((2, 2), np.float32)
    state["decoder.inst_branch.inst_convs.5.bias"] = np.zeros(5, np.float32)  # a ReLU's place
    del state["encoder.ppm.stages.3.1.bias"]
    state["decoder.inst_branch.fc.weight"] = np.zeros((9, 6), np.float32)
    with pytest.raises(ValueError) as caught:
        original_to_ours(state, *_model(), NAMES, source="weights.npz")
    message = str(caught.value)
    assert message.startswith("weights.npz does not fit the model:\n  2 in the file but not")
    assert "decoder.extra.weight, decoder.inst_branch.inst_convs.5.bias" in message
    assert "1 in the model but not in the file: encoder.ppm.stages.3.1.bias (2,)" in message
    assert "decoder.inst_branch.fc.weight (9, 6) instead of (7, 6)" in message


def test_constants_and_counters_of_the_original_are_passed_over():
    state = _state_dict()
    state["pixel_mean"] = np.zeros((3, 1, 1), np.float32)
    state["backbone.res2.0.conv1.norm.num_batches_tracked"] = np.zeros((), np.int64)
    state["criterion.empty_weight"] = np.zeros(81, np.float32)
    original_to_ours(state, *_model(), NAMES)


def test_half_precision_weights_take_the_dtype_of_the_model():
    state = {name: array.astype(np.float16) for name, array in _state_dict().items()}
    params, statistics = original_to_ours(state, *_model(), NAMES)
    assert params["decoder"]["inst_branch"]["fc"]["kernel"].dtype == np.float32
    norm = statistics["backbone"]["res2"]["0"]["conv1"]["norm"]
    np.testing.assert_array_equal(
        norm["var"], state["backbone.res2.0.conv1.norm.running_var"].astype(np.float32)
    )


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_both_file_kinds_load(tmp_path, suffix):
    state = _state_dict()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".npz":
        np.savez(path, **state)
    else:
        from safetensors.numpy import save_file

        save_file(state, path)
    params, _ = load_weights(path, *_model(), NAMES)
    np.testing.assert_array_equal(
        params["decoder"]["inst_branch"]["fc"]["kernel"], state["decoder.inst_branch.fc.weight"].T
    )


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.npz"):
        load_weights(tmp_path / "absent.npz", *_model(), NAMES)


@pytest.mark.parametrize("case", ["r50_base", *RECORDED])
def test_every_name_and_shape_of_a_recorded_network_is_one_of_ours(case):
    manifest = json.loads((cases.GOLDEN / case / "manifest.json").read_text())
    recorded = {name: tuple(shape) for name, shape in manifest["state_dict"].items()}
    config = load_config(cases.CONFIGS / cases.CONFIG_OF_ORIGINALS[manifest["config"]])
    num_classes = manifest.get("num_classes", 80)
    model = builders.build_model(config.model, num_classes, seed=None)
    _, *trees = functional(model)
    counters = [name for name in recorded if name.endswith(".num_batches_tracked")]
    assert (len(counters) > 0) == ("darknet" in case)
    wanted = {name: shape for name, shape in recorded.items() if name not in counters}
    assert original_shapes(*trees, NAMES) == wanted
    # And there and back with zeros of these shapes: nothing is left over on either side.
    empty = {name: np.broadcast_to(np.float32(0), shape) for name, shape in recorded.items()}
    assert original_shapes(*original_to_ours(empty, *trees, NAMES), NAMES) == wanted


def test_the_recorded_cases_are_all_there():
    assert len(RECORDED) == 14


BACKBONES = {
    "b": {"name": "resnet", "width": 4},
    "b-dcn": {"name": "resnet", "width": 4, "deformable_stages": ("res4", "res5")},
    "d-dcn2": {"name": "resnet", "width": 4, "variant": "d", "deformable_stages": ("res3",)}
    | {"modulated": True},
    "csp": {"name": "cspdarknet", "width": 4},
    "dark": {"name": "cspdarknet", "width": 4, "cross_stage": False},
    "pvt": {"name": "pvt", "embed_dims": (2, 4, 10, 16)},
    "pvt-linear": {"name": "pvt", "embed_dims": (2, 4, 10, 16), "linear": True},
}


@pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES)
def test_every_backbone_goes_there_and_back_bit_for_bit(backbone):
    config = load_config(cases.CONFIGS / "tiny.py")
    depths = 5 if backbone["name"] == "cspdarknet" else 4
    with config.unlocked():
        config.model.backbone = backbone | {"stage_depths": (2,) * depths}
    _, *trees = functional(builders.build_model(config.model, 3, seed=None))
    rng = np.random.default_rng(0)
    state = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in original_shapes(*trees, NAMES).items()
    }
    ours = original_to_ours(state, *trees, NAMES)
    back = ours_to_original(*ours, NAMES)
    assert back.keys() == state.keys()
    assert all(back[name].tobytes() == array.tobytes() for name, array in state.items())
    by_path = flatten_dict({"params": ours[0], "statistics": ours[1]}, sep="/")
    again = rename_to_original(by_path, NAMES).arrays
    assert all(again[name].tobytes() == array.tobytes() for name, array in state.items())


def test_the_counter_of_stochastic_depth_is_ours_alone_and_keeps_its_fresh_value():
    statistics = {"backbone": {"drop_path_step": np.uint32(41), "norm": {"mean": np.zeros(2)}}}
    state = ours_to_original({}, statistics, NAMES)
    assert state.keys() == {"backbone.norm.running_mean"}
    state["backbone.norm.running_mean"] = np.array([5.0, 6.0])
    _, loaded = original_to_ours(state, {}, statistics, NAMES)
    assert loaded["backbone"]["drop_path_step"] == 41
    np.testing.assert_array_equal(loaded["backbone"]["norm"]["mean"], [5.0, 6.0])
