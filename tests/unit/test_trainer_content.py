"""What trainers write around weights: averages, counters, class names, optimizers, bfloat16."""

from __future__ import annotations

import json
import pickle

import ml_dtypes
import numpy as np
import pytest

from sparseinst_jax.models.sparseinst.weights import NAMES
from sparseinst_jax.weights.convert import original_shapes, original_to_ours
from tests.foreign_files import Call, Storages, safetensors, torch_zip

A = np.float32([[0.5, -1.25, 3.0], [1e-3, 7.0, -2.0]])
HALF = A.astype(ml_dtypes.bfloat16)
COUNT = np.array(7, np.int64)


def _checkpoint(content) -> bytes:
    """A PyTorch zip of nested dicts, arrays as tensors."""
    storages = Storages()

    def tensors(value):
        if isinstance(value, dict):
            return {key: tensors(entry) for key, entry in value.items()}
        return storages.tensor(value) if isinstance(value, np.ndarray) else value

    return torch_zip(tensors(content), storages)


# bfloat16 of Paddle, and other dtypes


@pytest.mark.parametrize("protocol", [2, 4])
def test_bfloat16_that_paddle_stores_as_uint16_is_widened(read, protocol):
    bits = HALF.view(np.uint16)
    slices = {"w": {"OriginShape": (2, 3), "slices": ["w@@.0", "w@@.1"]}}
    parts = {"w@@.0": bits.ravel()[:4], "w@@.1": bits.ravel()[4:]}
    content = {"a": bits, "b": ("linear_0.w_0", bits), "c": A, **parts}
    found = read(pickle.dumps({**content, "UnpackBigParamInfor@@": slices}, protocol))
    assert found.kind == "Paddle"
    for name in "abw":
        assert found.arrays[name].dtype == np.float32
        np.testing.assert_array_equal(found.arrays[name], HALF.astype(np.float32))
    np.testing.assert_array_equal(found.arrays["c"], A)
    assert found.notes == ["4 arrays of bfloat16 widened to float32: a, b, w@@.0 and 1 more"]


def test_pairs_of_paddle_are_bfloat16_under_a_wrapper_too_and_other_uint16_is_left(read):
    bits = HALF.view(np.uint16)
    found = read(pickle.dumps({"model": {"a": ("x", bits), "b": bits}}, 2)).arrays
    np.testing.assert_array_equal(found["a"], HALF.astype(np.float32))
    assert found["b"].dtype == np.uint16


def _layer():
    params = {"layer": {"kernel": np.zeros((3, 2), np.float32), "bias": np.zeros(2, np.float32)}}
    assert original_shapes(params, {}, NAMES) == {"layer.weight": (2, 3), "layer.bias": (2,)}
    return params


@pytest.mark.parametrize(
    "wrong",
    [A.astype(np.int8), HALF.view(np.uint16), A > 0, A.astype(np.int64), A.astype(np.complex64)],
    ids=lambda array: array.dtype.name,
)
def test_weights_that_are_no_floating_point_numbers_are_refused_by_name(wrong):
    state = {"layer.weight": wrong, "layer.bias": np.ones(2, np.float32)}
    expected = rf"layer\.weight \({wrong.dtype}, expected float32\).*save them as float32"
    with pytest.raises(ValueError, match=expected):
        original_to_ours(state, _layer(), {}, NAMES)


def test_numbers_too_large_for_float32_are_refused_by_name_and_others_are_cast():
    state = {"layer.weight": A.astype(np.float64), "layer.bias": np.float16([1, -2])}
    params, _ = original_to_ours(state, _layer(), {}, NAMES)
    np.testing.assert_array_equal(params["layer"]["kernel"], A.T)
    np.testing.assert_array_equal(params["layer"]["bias"], np.float32([1, -2]))
    state["layer.bias"] = np.array([1.0, -1e39])
    with pytest.raises(ValueError, match=r"layer\.bias \(float64 above 3\.4e\+38"):
        original_to_ours(state, _layer(), {}, NAMES)


# Moving averages


def _mmengine(**meta):
    """As mmengine's EMAHook saves: the average under state_dict, the last weights beside it."""
    return {
        "meta": {"mmengine_version": "0.10.7", "epoch": 3, **meta},
        "state_dict": {"a": A},
        "message_hub": {"log_scalars": Call("mmengine.logging.history_buffer.HistoryBuffer")},
        "ema_state_dict": {"steps": COUNT, "module.a": A + 1},
        "optimizer": {"state": {0: {"exp_avg": A}}, "param_groups": [{"lr": 0.1}]},
    }


@pytest.mark.parametrize("prefer_ema", [False, True])
@pytest.mark.parametrize("lost", [(), ("message_hub",), ("meta",), ("message_hub", "meta")])
def test_mmengine_keeps_the_average_under_state_dict(read, prefer_ema, lost):
    content = {key: value for key, value in _mmengine().items() if key not in lost}
    found = read(_checkpoint(content), prefer_ema=prefer_ema)
    assert found.arrays.keys() == {"a"}
    np.testing.assert_array_equal(found.arrays["a"], A)
    assert found.notes[:2] == [
        "took the weights under state_dict, where mmengine keeps the moving average",
        "left out ema_state_dict: with mmengine, the last weights, not averaged",
    ]


@pytest.mark.parametrize("key", ["model_ema", "ema", "ema_state_dict"])
@pytest.mark.parametrize("prefix", ["module.", "module._orig_mod."])
def test_counters_of_an_averaged_model_do_not_keep_its_prefix(read, key, prefix):
    average = {"n_averaged": COUNT, f"{prefix}a": A + 1, f"{prefix}b.steps": A}
    found = read(_checkpoint({"model": {"a": A, "b.steps": A}, key: average}), prefer_ema=True)
    assert found.arrays.keys() == {"a", "b.steps"}
    np.testing.assert_array_equal(found.arrays["a"], A + 1)
    assert "left out what an averaged model counts: n_averaged" in found.notes
    alone = read(_checkpoint(average))
    np.testing.assert_array_equal(alone.arrays["a"], A + 1)


def test_a_weight_called_like_a_counter_stays(read):
    assert read(_checkpoint({"steps": A, "module.a": A})).arrays.keys() == {"steps", "module.a"}
    assert read(_checkpoint({"steps": COUNT, "a": A})).arrays.keys() == {"steps", "a"}


# Optimizers, and the last weights of Paddle


@pytest.mark.parametrize(
    "content",
    [
        {"conv2d_0.w_0_moment1_0": A, "conv2d_0.w_0_beta1_pow_acc_0": A[0, :1], "last_epoch": 3},
        {"linear_0.w_0_velocity_0": A},
        {"LR_Scheduler": {"last_epoch": 3, "last_lr": 0.1}, "last_epoch": 3},
        {"master_weights": {"w": A}, "w_moment2_0": A, "LR_Scheduler": {}},
    ],
)
def test_the_state_of_paddles_optimizer_is_refused_as_such(refusal, content):
    message = refusal(pickle.dumps(content, 2))
    assert "the state of an optimizer (Paddle's .pdopt" in message
    assert "give the .pdparams beside it" in message


def test_the_state_of_torchs_optimizer_is_refused_as_such(refusal):
    content = {"state": {0: {"exp_avg": A}}, "param_groups": [{"lr": 0.1}]}
    assert "the state of an optimizer (torch.optim" in refusal(_checkpoint(content))


def test_pdema_holds_the_last_weights_and_no_average(read, refusal):
    content = pickle.dumps({"a": A}, 2)
    assert read(content, "model.pdparams").notes == []
    (note,) = read(content, "model.pdema").notes
    assert note.startswith("a .pdema, the last weights") and "to the .pdparams beside it" in note
    with pytest.raises(ValueError, match=r"is no moving average.*\.pdparams beside it"):
        read(content, "model.pdema", prefer_ema=True)


# Class names

NAMED = ["cat", "dog", "Ampel (rot)"]
COCO_LIKE = [{"id": 4 * i + 3, "name": name} for i, name in enumerate(NAMED)]


@pytest.mark.parametrize(
    ("beside", "place"),
    [
        ({"meta": {"dataset_meta": {"classes": tuple(NAMED), "palette": [(1, 2, 3)]}}}, 0),
        ({"meta": {"dataset_meta": {"CLASSES": NAMED}}}, 0),
        ({"meta": {"CLASSES": NAMED, "epoch": 3}}, 0),
        ({"names": {0: "cat", 1: "dog", 2: "Ampel (rot)"}}, 0),
        ({"names": {2: "Ampel (rot)", 0: "cat", 1: "dog"}}, 0),
        ({"names": {"0": "cat", "1": "dog", "2": "Ampel (rot)"}}, 0),
        ({"names": NAMED}, 0),
        ({"class_names": {"cat": 0, "dog": 1, "Ampel (rot)": 2}}, 0),
        ({"metadata": {"thing_classes": NAMED}}, 0),
        ({"hyper_parameters": {"class_names": NAMED}}, 0),
        ({"categories": COCO_LIKE}, [3, 7, 11]),
        (
            {
                "metadata": {
                    "thing_classes": NAMED,
                    "thing_dataset_id_to_contiguous_id": {18: 1, 17: 0, 99: 2},
                }
            },
            [17, 18, 99],
        ),
    ],
)
def test_class_names_beside_the_weights_are_found(read, beside, place):
    found = read(_checkpoint({"model": {"a": A}, **beside})).classes
    assert found.names == NAMED
    assert found.category_ids == (place or None)


@pytest.mark.parametrize(
    "beside",
    [
        {"names": []},
        {"names": {0: "cat", 2: "dog"}},
        {"names": {0: "cat", 1: 7}},
        {"names": ["cat", "\x1b[31mdog"]},
        {"names": Call("my.Names")},
        {"meta": Call("my.Meta")},
        {"meta": {"dataset_meta": None, "classes": 3}},
        {"categories": [{"id": 1}]},
    ],
)
def test_what_is_no_list_of_class_names_is_none(read, beside):
    assert read(_checkpoint({"model": {"a": A}, **beside})).classes is None


def test_class_names_in_the_header_of_safetensors_are_found(read):
    facts = {"class_names": json.dumps(NAMED), "category_ids": "[3, 7, 11]", "format": "pt"}
    found = read(safetensors({"a": A}, __metadata__=facts)).classes
    assert (found.names, found.category_ids) == (NAMED, [3, 7, 11])
    assert read(safetensors({"a": A}, __metadata__={"format": "pt"})).classes is None
