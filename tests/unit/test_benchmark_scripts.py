"""The scripts of `benchmarks/`: their arithmetic, by hand."""

import argparse
import importlib.util
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from sparseinst_jax import matching

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def _script(name: str):
    spec = importlib.util.spec_from_file_location(f"script_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gpu, matching_forms, roofline = map(_script, ("gpu", "matching_forms", "roofline"))


@pytest.mark.parametrize("form", ["device_match", "callback_match"])
def test_every_form_of_the_matching_finds_the_same_pairs(rng, form):
    score = rng.random((3, 9, 5), np.float32)
    is_target = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], bool)
    found = jax.jit(getattr(matching_forms, form))(score, is_target)
    assert np.asarray(found).tolist() == matching.match(score, is_target).tolist()


def test_the_device_refuses_more_targets_than_predictions():
    with pytest.raises(ValueError, match="at least as many predictions"):
        matching_forms.device_match(np.zeros((1, 2, 3), np.float32), np.ones((1, 3), bool))


def test_a_floor_is_the_larger_of_operations_and_bytes():
    rates = roofline.Rates(flops=2e9, bytes=1e9)
    assert roofline.floor_ms(4e9, 1e9, rates) == (2000.0, "operations")
    assert roofline.floor_ms(1e9, 3e9, rates) == (3000.0, "bytes")


def test_a_stage_counts_its_product_its_inputs_weights_and_results():
    weights, x = np.ones((4, 8), np.float32), np.ones((2, 4), np.float32)
    stage = roofline.Stage("s", lambda w, x: x @ w, weights, (x,))
    row = roofline.measure(stage, roofline.Rates(1e9, 1e9), 1, False)
    assert row["gflops"] == 2 * 2 * 4 * 8 / 1e9
    assert row["mib"] == 4 * (4 * 8 + 2 * 4 + 2 * 8) / 2**20
    trained = roofline.measure(stage, roofline.Rates(1e9, 1e9), 1, True)
    assert trained["gflops"] == pytest.approx(3 * row["gflops"])
    assert trained["mib"] == 2 * row["mib"]
    assert row["times_the_floor"] == pytest.approx(row["p50_ms"] / row["floor_ms"])


def test_what_is_derived_of_an_accelerator():
    step = {"name": "training/step", "images": 8, "p50_ms": 400.0, "images_per_s": 20.0}
    step |= {"peak_device_mib": 16000.0, "parts": {"matching_ms": 6.0, "score_to_host_ms": 2.0}}
    network = {"name": "throughput/network/8", "images": 8, "images_per_s": 100.0}
    roof = {
        "stages": [{"name": "a", "gflops": 30.0}, {"name": "a, with gradients", "gflops": 90.0}],
        "settings": {"batch": 3},
        "rates": {"flops": 4e12},
    }
    parts = {
        "training/8": {"result": {"results": [step]}},
        "throughput": {"result": {"results": [network]}},
        "latency": {"result": None},
        "roofline": {"result": roof},
    }
    assert gpu.derive(parts) == {
        "training, batch 8: images/s": 20.0,
        "training, batch 8: minutes for an epoch of COCO": pytest.approx(117_266 / 20 / 60),
        "training, batch 8: MiB an image, weights included": 2000.0,
        "training, batch 8: share of the step in matching and its transfer": 0.02,
        "matrix product: TFLOP/s": 4.0,
        "network: GFLOP an image": 10.0,
        "network, batch 8: share of the matrix product's rate": 0.25,
    }


def test_a_run_on_an_accelerator_has_every_part_and_names_no_path():
    arguments = argparse.Namespace(
        torch_python="/some/where/python", yardstick="/some/else.py", torch_device="cuda"
    )
    parts = gpu.commands(gpu.REAL, arguments)
    assert list(parts) == [
        *("latency", "throughput", "training/8", "training/16", "training/32", "matching"),
        *("roofline", "deformable", "torch/latency", "torch/throughput", "torch/training"),
    ]
    shown = {name: gpu.shown(command) for name, command in parts.items()}
    assert shown["throughput"].startswith("sparseinst benchmark --config configs/giam_r50.py")
    assert shown["throughput"].endswith("--only throughput --batch 1 2 4 8 16 32 64")
    assert not any("/some" in text or sys.executable in text for text in shown.values())
    assert ".../roofline.py" in shown["roofline"] and "--batch 32" in shown["roofline"]
