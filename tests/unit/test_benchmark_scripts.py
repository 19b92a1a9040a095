"""The scripts of `benchmarks/`: their arithmetic, by hand."""

import argparse
import importlib.util
import json
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparseinst_jax import matching
from sparseinst_jax.checkpoints.state import TrainState
from sparseinst_jax.data.batch import Batch
from sparseinst_jax.models.complexity import trace_macs
from sparseinst_jax.setup.builders import build_model
from sparseinst_jax.setup.config import load_config
from sparseinst_jax.training.step import TrainStep

pytestmark = pytest.mark.usefixtures("quick_compilation")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CONFIG = str(BENCHMARKS.parent / "configs" / "tiny.py")


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


class _Brightness:
    """A weight times the image's mean, squared; the running mean moves by a half."""

    minimised, loss_takes_params = (), False

    def forward(self, params, statistics, batch):
        x = jnp.asarray(batch.images, jnp.float32).mean()
        return params["w"] * x, {"mean": 0.5 * statistics["mean"] + 0.5 * x}

    def count(self, batch):
        return _Counts(np.float32(1))

    def match_scores(self, outputs, batch, keys):
        return {"one": jnp.zeros((1, 1, 1))}

    def loss(self, params, statistics, outputs, batch, matches, counts, keys):
        return outputs**2, {"y": outputs}


class _Counts(NamedTuple):
    targets: np.ndarray


def test_parts_handed_over_before_any_is_matched_train_as_one_after_the_other():
    images = np.array([10, 20, 40], np.uint8).reshape(3, 1, 1, 1)
    one = np.ones((3, 1), bool)
    batch = Batch(images, np.zeros((3, 2)), np.zeros((3, 1)), np.zeros(3), one, np.arange(3))
    sgd, states = optax.sgd(1e-4), []
    for kind in (TrainStep, matching_forms.OverlappedStep):
        step = kind(_Brightness(), sgd, micro_batches=3, devices=jax.local_devices()[:1])
        params = {"w": np.float32(1)}
        state = TrainState(np.int32(0), params, {"mean": np.float32(0)}, sgd.init(params))
        state = step.place(state)
        for _ in range(2):
            state, _ = step(state, batch)
        states.append(step.fetch(state))
    assert states[0] == states[1]
    assert states[0].params["w"] != 1 and states[0].step == 2


def test_a_floor_is_the_larger_of_operations_and_bytes():
    rates = roofline.Rates(flops=2e9, bytes=1e9)
    assert roofline.floor_ms(4e9, 1e9, rates) == (2000.0, "operations")
    assert roofline.floor_ms(1e9, 3e9, rates) == (3000.0, "bytes")


def test_a_stage_counts_its_product_its_inputs_weights_and_results():
    weights, x = np.ones((4, 8), np.float32), np.ones((2, 4), np.float32)
    stage = roofline.Stage("s", lambda train, w, fixed, x: x @ w, weights, {}, (x,))
    rates = roofline.Rates(1e9, 1e9)
    row = roofline.with_floor(roofline.measure(stage, 1, False), rates)
    assert row["gflops"] == 2 * 2 * 4 * 8 / 1e9
    assert row["mib"] == 4 * (4 * 8 + 2 * 4 + 2 * 8) / 2**20
    trained = roofline.measure(stage, 1, True)
    assert trained["gflops"] == pytest.approx(3 * row["gflops"])
    assert trained["mib"] == 2 * row["mib"]
    assert row["times_the_floor"] == pytest.approx(row["p50_ms"] / row["floor_ms"])
    first = roofline.measure(stage._replace(gradients="weights"), 1, True)
    assert first["gflops"] == pytest.approx(2 * row["gflops"]), "images have no gradient"


def test_the_rates_are_the_best_that_were_reached():
    reached = roofline.Reached(32, 1, "float32")
    reached.measure(1)
    assert min(reached.rates) > 0
    reached.rates = roofline.Rates(1e18, 1.0)
    reached.measure(1)
    assert reached.rates.flops == 1e18 and reached.rates.bytes > 1e6


def test_the_stages_one_after_the_other_are_the_network():
    config = load_config(CONFIG)
    model = build_model(config.model, roofline.CLASSES, 0)
    stages = {s.name: s for s in roofline.stages(model, config, (64, 96), 1, 3)}
    whole = stages.pop("whole network")
    outputs = roofline._run(whole)
    (pieced,) = stages["scores"].inputs
    for name, value in outputs._asdict().items():
        np.testing.assert_allclose(getattr(pieced, name), value, rtol=1e-4, atol=1e-5, err_msg=name)
    counted = [
        trace_macs(partial(s.function, False), s.weights, s.fixed, *s.inputs)[""]
        for name, s in stages.items()
        if name not in ("match scores", "optimizer", "losses")
    ]
    assert (
        sum(counted)
        == trace_macs(partial(whole.function, False), whole.weights, whole.fixed, *whole.inputs)[""]
    )
    assert [name for name, s in stages.items() if s.gradients == "weights"] == ["backbone stem"]
    # The demo's norms are trained: their running statistics change inside the gradient.
    row = roofline.measure(stages["backbone stem"], 1, True)
    assert row["name"] == "backbone stem, with gradients" and row["p50_ms"] > 0


def _gpu_report(**more):
    def rows(*found):
        return {"fault": "", "result": {"results": list(found)}}

    step = {"name": "training/step", "images": 8, "p50_ms": 400.0, "images_per_s": 20.0}
    step |= {"peak_device_mib": 16384.0, "parts": {"matching_ms": 6.0, "score_to_host_ms": 2.0}}
    network = {"name": "throughput/network/8", "images": 8, "p50_ms": 80.0, "images_per_s": 100.0}
    stages = [{"name": "whole network", "gflops": 30.0}, {"name": "encoder", "gflops": 90.0}]
    roof = {"stages": stages, "settings": {"batch": 3}, "rates": {"flops": 4e12}}
    forms = [{"name": n, "p50_ms": ms} for n, ms in (("none", 90.0), ("host", 100.0), ("x", 95.0))]
    # Of another process, twice as slow.
    slow = [{"name": n, "p50_ms": ms} for n, ms in (("none", 180.0), ("callback", 240.0))]
    deformable = {"what": "res4, batch 1, forward", "alternative": "version 2", "ratio": 1.5}
    return {
        "training/8": rows(step),
        "throughput/8": rows({**network, "peak_device_mib": 900.0}),
        "latency": {"fault": "exit code 1", "result": None},
        "roofline": {"fault": "", "result": roof},
        "matching": {"fault": "", "result": {"rows": forms}},
        "matching/callback": {"fault": "", "result": {"rows": slow, "faults": {"y": "refused"}}},
        "deformable": {"fault": "", "result": {"rows": [deformable]}},
        **{name: rows(*found) for name, found in more.items()},
    }


def test_what_follows_from_the_parts_of_an_accelerator():
    theirs = {"images": 8, "peak_device_mib": 8192.0}
    compiled = [{"name": f"{work}/8/compiled", "p50_ms": 500.0, **theirs} for work in ("training",)]
    compiled += [{"name": "network/8/compiled", "fault": "no memory"}]
    found = gpu.gpu_figures.figures(_gpu_report(**{"torch/compiled/training": compiled}))
    assert found == {
        **{"training, batch 8: ms": 400.0, "training, batch 8: images/s": 20.0},
        "training, batch 8: MiB an image, weights included": 2048.0,
        **{"network, batch 8: ms": 80.0, "network, batch 8: images/s": 100.0},
        "network, batch 8: MiB an image, weights included": 112.5,
        "training, batch 8: times as fast as compiled": 1.25,
        "training, batch 8: times the time of compiled": 0.8,
        "training, batch 8: times the memory of compiled": 2.0,
        "training, batch 8: minutes for an epoch of COCO": pytest.approx(117_266 / 20 / 60),
        "training, batch 8: GiB at most": 16.0,
        "training, batch 8: share of the step in host matching": 0.02,
        "matrix product: TFLOP/s": 4.0,
        "network: GFLOP an image": 10.0,
        "training, batch 8: share of the matrix product's rate": 3 * 10 * 20 / 4000,
        "network, batch 8: share of the matrix product's rate": 0.25,
        **{
            f"step, matching {n}: ms": ms
            for n, ms in (("none", 90.0), ("host", 100.0), ("x", 95.0), ("callback", 240.0))
        },
        "step, matching callback: share beyond none": 0.25,
        "step, matching host: share beyond none": pytest.approx(0.1),
        "step, matching x: share beyond none": pytest.approx(1 - 90 / 95),
        "deformable, res4, batch 1, forward: times its dense twin": 1.5,
    }
    assert gpu.gpu_figures.best_form(found) == "x"


def test_memory_for_a_further_image_is_the_slope_of_the_two_largest_batches():
    rows = [
        {"name": f"network/{n}/eager", "images": n, "p50_ms": 1.0, "peak_device_mib": mib}
        for n, mib in ((1, 0.0), (8, 900.0), (32, 2100.0))
    ]
    found = gpu.gpu_figures.figures(_gpu_report(**{"torch/eager": rows}))
    assert found["network, PyTorch eager: MiB for each further image"] == 50.0


def test_each_aim_of_an_accelerator_is_met_missed_or_not_measured():
    settings = {"train_batches": (8,), "batches": (1, 8)}
    report = {"parts": _gpu_report()} | gpu.gpu_figures.conclude(_gpu_report(), settings)
    text = gpu.gpu_figures.text(report)
    assert "NOT MEASURED  training, batch 8: times as fast as compiled, aim >= 1.5" in text
    assert "MISSED  network, batch 8: share of the matrix product's rate: 0.25, aim >= 0.3" in text
    assert "met     deformable, res4, batch 1, forward: times its dense twin: 1.5, aim <= 2" in text
    assert "FAILED  latency: exit code 1" in text and "fastest matching: x" in text
    assert "FAILED  matching/callback, y: refused" in text


def test_a_run_on_an_accelerator_has_every_part_and_names_no_path():
    arguments = argparse.Namespace(
        torch_python="/some/where/python3", yardstick="/some/else.py", torch_device="cuda"
    )
    parts = gpu.plan(gpu.REAL, arguments)
    assert list(parts) == [
        *("latency", "torch/eager", "torch/compiled/latency", "training/32", "training/8"),
        *("torch/compiled/training", "throughput/64", "throughput/32", "throughput/16"),
        *("throughput/4", "torch/compiled/throughput", "roofline", "matching", "deformable"),
        *("training/16", "matching/callback", "start-up"),
    ]
    shown = {name: gpu.shown(part.command) for name, part in parts.items()}
    assert shown["throughput/64"].startswith("sparseinst benchmark --config configs/giam_r50.py")
    assert "--only throughput --batch 64" in shown["throughput/64"]
    assert not any("/some" in text or sys.executable in text for text in shown.values())
    assert "benchmarks/roofline.py" in shown["roofline"] and "--batch 32" in shown["roofline"]
    assert shown["torch/eager"].startswith("python benchmarks/gpu_torch.py --yardstick else.py")
    assert max(part.seconds for part in parts.values()) < 600


@pytest.fixture
def made_up(monkeypatch):
    """Replace the plan by commands of Python that write a list of results, or fail."""

    def plan(**codes):
        parts = {name: gpu.Part([sys.executable, "-c", c], 20) for name, c in codes.items()}
        monkeypatch.setattr(gpu, "plan", lambda *_: parts)

    return plan


WRITE = "import pathlib, sys; p = pathlib.Path(sys.argv[2]); "


def test_a_part_that_fails_leaves_the_others_and_is_tried_once_more(made_up, tmp_path, capsys):
    output = tmp_path / "gpu.json"
    good = WRITE + "p.write_text('{\"results\": []}')"
    # Tells whether it was given what it had written before it failed.
    bad = WRITE + 'p.write_text(\'{"results": [], "again": %d}\' % p.exists()); sys.exit(3)'
    made_up(bad=bad, good=good)
    assert gpu.main(["--output", str(output)]) == 1
    report = json.loads(output.read_text())
    assert report["parts"]["bad"]["fault"] == "exit code 3"
    assert report["parts"]["bad"]["result"]["again"] == 0
    assert report["parts"]["good"]["fault"] == "" and "FAILED  bad" in capsys.readouterr().out
    assert gpu.main(["--output", str(output)]) == 1
    report = json.loads(output.read_text())
    assert (report["parts"]["bad"]["tries"], report["parts"]["bad"]["result"]["again"]) == (2, 1)
    assert report["parts"]["good"]["tries"] == 1
    capsys.readouterr()
    assert gpu.main(["--output", str(output)]) == 1
    assert "bad: is there already, failed" in capsys.readouterr().out


def test_no_part_is_started_when_the_time_is_up(made_up, tmp_path, capsys):
    made_up(one="raise SystemExit('started')")
    assert gpu.main(["--output", str(tmp_path / "gpu.json"), "--for", "40"]) == 1
    assert "goes on from here" in capsys.readouterr().out
