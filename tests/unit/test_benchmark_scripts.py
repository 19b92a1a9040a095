"""The scripts of `benchmarks/`: their arithmetic, by hand."""

import functools
import importlib.util
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparseinst_jax import matching
from sparseinst_jax.checkpoints.state import TrainState
from sparseinst_jax.data.batch import Batch
from sparseinst_jax.data.loader import train_batches
from sparseinst_jax.data.shapes import draw_shapes_dataset
from sparseinst_jax.models.families import FAMILIES
from sparseinst_jax.setup.config import load_config
from sparseinst_jax.setup.run import make_run
from sparseinst_jax.training.step import TrainStep
from sparseinst_jax.weights.convert import load_weights

pytestmark = pytest.mark.usefixtures("quick_compilation")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def _script(name: str):
    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))  # as for a script: its neighbours can be imported
    spec = importlib.util.spec_from_file_location(f"script_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gpu, gpu_jax = map(_script, ("gpu", "gpu_jax"))
measured = gpu.rows


@pytest.mark.parametrize("form", ["device_match", "callback_match"])
def test_every_form_of_the_matching_finds_the_same_pairs(rng, form):
    score = rng.random((3, 9, 5), np.float32)
    is_target = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], bool)
    found = jax.jit(getattr(gpu_jax, form))(score, is_target)
    assert np.asarray(found).tolist() == matching.match(score, is_target).tolist()


class _Brightness:
    """A weight times the image's mean, squared; the running mean moves by a half."""

    def forward(self, params, statistics, batch):
        x = jnp.asarray(batch.images, jnp.float32).mean()
        return params["w"] * x, {"mean": 0.5 * statistics["mean"] + 0.5 * x}

    minimised, loss_takes_params = (), False

    def count(self, batch):
        return np.float32(1)

    def match_scores(self, outputs, batch, keys):
        return {"one": jnp.zeros((1, 1, 1))}

    def loss(self, params, statistics, outputs, batch, matches, counts, keys):
        return outputs**2, {"y": outputs}


def test_parts_handed_over_before_any_is_matched_train_as_one_after_the_other():
    images = np.array([10, 20, 40], np.uint8).reshape(3, 1, 1, 1)
    one = np.ones((3, 1), bool)
    batch = Batch(images, np.zeros((3, 2)), np.zeros((3, 1)), np.zeros(3), one, np.arange(3))
    sgd, states = optax.sgd(1e-4), []
    step = TrainStep(_Brightness(), sgd, micro_batches=3, devices=jax.local_devices()[:1])
    for take in (step, functools.partial(gpu_jax.overlapped, step)):
        params = {"w": np.float32(1)}
        state = TrainState(np.int32(0), params, {"mean": np.float32(0)}, sgd.init(params))
        state = step.place(state)
        for _ in range(2):
            state, _ = take(state, batch)
        states.append(step.fetch(state))
    assert states[0] == states[1]
    assert states[0].params["w"] != 1 and states[0].step == 2


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(gpu_jax, "SIZES", gpu_jax.TINY)
    monkeypatch.setattr(gpu_jax, "DTYPE", jnp.float32)


@pytest.mark.parametrize("kind", ["first", "maps", "stem", "1x1_res2"])
def test_every_form_of_an_operation_gives_the_same(tiny, kind, rng):
    forms, given = gpu_jax.OPERATIONS[kind]()
    operands = given[0][:1], *given[1:]
    shape = jax.eval_shape(next(iter(forms.values())).forward, *operands).shape
    cotangent = rng.standard_normal(shape, np.float32)

    @jax.jit
    def results(cotangent, *operands):
        return [(f.forward(*operands), *f.backward(cotangent, *operands)) for f in forms.values()]

    expected, *others = results(cotangent, *operands)
    for found in others:
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                assert ours.dtype == theirs.dtype
                atol = 1e-6 * np.abs(theirs).max()
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


def test_every_row_of_this_package_has_its_work_and_its_form(tiny):
    names = {n for p in (*gpu.PARTS, *gpu.SMOKE) for n in p.rows if not n.startswith("torch/")}
    assert {name.partition("/")[0] for name in names} == set(gpu_jax.WORKS)
    for kind, form in {tuple(n.split("/")[1:3]) for n in names if n.startswith("op/")}:
        assert form in gpu_jax.forms_of(kind)[0]


def test_an_operation_counts_what_its_first_form_computes(tiny):
    height, width = gpu_jax._map(8)
    case = gpu_jax.operation("first/padded/grad")
    assert case.facts["gflop"] == pytest.approx(2 * 2e-9 * 8 * height * width * 9 * 258 * 256)
    stem = gpu_jax.operation("stem/blocks_16/grad")
    height, width = gpu_jax._map(2)
    assert stem.facts["gflop"] == pytest.approx(2e-9 * 8 * height * width * 49 * 3 * 64), (
        "of the kernel"
    )


def test_a_measurement_is_the_median_of_queued_launches_after_the_warm_up():
    now, waits = [0.0], []

    def launch():
        now[0] += 1.0 if len(waits) < 3 else 0.25
        return "result"

    work = gpu_jax.Workload(launch, 1, {}, waits.append)
    row = measured.measure(work, lambda: now[0], warmup=2, iterations=4, queue=5)
    assert (row["first_s"], row["p50_ms"], row["iterations"]) == (1.0, 250.0, 4)
    assert waits == ["result"] * 7
    slow = measured.measure(work, warmup=0, iterations=9, seconds=0)
    assert slow["iterations"] == 3, "three samples whatever they take"


STAMP = {"device": "H100", "versions": {"jax": "1"}}


def _file(path, *rows, stamp=STAMP):
    for row in rows:
        measured.append(path, {**stamp, **row})


def test_a_torn_line_is_no_row_and_does_not_harm_the_next(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert measured.read(path, STAMP) == []
    _file(path, {"name": "a"}, {"name": "b"})
    path.write_bytes(path.read_bytes()[:-9])  # in the middle of b
    assert [row["name"] for row in measured.read(path, STAMP)] == ["a"]
    _file(path, {"name": "c"})
    assert [row["name"] for row in measured.read(path, STAMP)] == ["a", "c"]


def test_rows_of_another_device_or_of_other_versions_are_not_taken(tmp_path):
    path = tmp_path / "rows.jsonl"
    _file(path, {"name": "a"}, stamp={**STAMP, "device": "H200"})
    _file(path, {"name": "b"}, stamp={**STAMP, "versions": {"jax": "2"}})
    _file(path, {"name": "c"})
    assert [row["name"] for row in measured.read(path, STAMP)] == ["c"]


def test_rows_of_another_pytorch_are_not_taken_wherever_it_is(call, tmp_path):
    counts = []
    for version in ("2.1", "2.1", "2.2"):
        info = tmp_path / version / "torch.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nPYTHONPATH={info.parent} exec {sys.executable} "$@"\n')
        python.chmod(0o755)
        flags = ["--yardstick", "file.py", "--torch-python", str(python)]
        call(gpu.Part(("torch/a",)), flags=flags)
        counts.append(len(measured.read(tmp_path / "rows.jsonl", {})))
    assert counts == [1, 1, 2]


def test_what_failed_is_tried_twice_and_what_is_there_not_again():
    rows = [{"name": n, "fault": "no"} for n in ("a", "b", "b", "c")] + [{"name": "c"}]
    assert measured.lacking(["a", "b", "c", "d"], rows) == ["a", "d"]
    assert "fault" not in measured.best([*rows, {"name": "c", "fault": "later"}])["c"]


# A process that measures rows: `slow` takes long, `bad` fails, `dead` ends the process.
CHILD = """
import argparse, sys, os, time
sys.path.insert(0, {folder!r})
import rows
def make(name):
    if name == "slow": time.sleep(60)
    if name == "bad": raise ValueError("no memory")
    if name == "picker" and "strict_conv" not in os.environ["XLA_FLAGS"]: raise ValueError("cuDNN")
    if name.startswith("dead"): os._exit(7)
    return {{"p50_ms": 1.0, "yardstick": given.yardstick}}
if "--die" in {words!r}: sys.exit(5)
parser = argparse.ArgumentParser()
parser.add_argument("--yardstick")
given = rows.arguments(parser)
rows.run(given, make)
"""


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Return a function that measures parts with made-up processes and gives code and rows."""
    path = tmp_path / "rows.jsonl"

    def run(*parts, seconds=60, words=(), flags=()):
        for script in ("gpu_jax.py", "torch_side.py"):
            code = CHILD.format(folder=str(BENCHMARKS), words=words)
            (tmp_path / script).write_text(code)
        monkeypatch.setattr(gpu, "HERE", tmp_path)
        monkeypatch.setattr(gpu, "PARTS", parts)
        monkeypatch.setattr(gpu, "PATIENCE", 1)
        flags = ["--dry-run", "--output", str(path), "--for", str(seconds), *flags]
        flags += ["--copy-to", str(tmp_path / "copy"), "--cache", str(tmp_path / "cache")]
        code = gpu.main(flags)
        stamp = {"device": "cpu", "versions": measured.versions()}
        return code, [(row["name"], row.get("fault", "")) for row in measured.read(path, stamp)]

    return run


def test_a_row_that_fails_leaves_the_others_and_is_tried_by_the_next_call(call, tmp_path):
    part = gpu.Part(("a", "bad", "dead", "b"))
    code, rows = call(part)
    fault = "ValueError: no memory (gpu_jax.py:7)"
    expected = [("a", ""), ("bad", fault), ("dead", "exit code 7"), ("b", "")]
    assert (code, rows) == (1, expected)
    _, rows = call(part)
    assert rows[4:] == expected[1:3], "what is there is not measured again"
    assert call(part)[1] == rows, "nor what has failed twice"
    assert (tmp_path / "copy" / "rows.jsonl").read_bytes() == (tmp_path / "rows.jsonl").read_bytes()
    assert not any((tmp_path / "cache").iterdir()), "what PyTorch compiled is cleared away"


def test_what_no_algorithm_was_found_for_is_tried_at_once_by_a_lenient_picker(call):
    assert call(gpu.Part(("picker", "a"))) == (
        0,
        [("picker", "ValueError: cuDNN (gpu_jax.py:8)"), ("a", ""), ("picker", "")],
    )


def test_a_part_whose_processes_all_end_at_once_is_given_up(call):
    _, rows = call(gpu.Part(("a", "b", "c", "d")), gpu.Part(("e",)), words=("--die",))
    assert [name for name, _ in rows] == ["a", "b", "e"]


def test_each_family_has_a_yardstick_of_its_own_and_one_word_takes_both_sides(call, tmp_path):
    sides = "fastinst/8", "torch/compiled/fastinst/8"
    parts = gpu.Part(("a",)), *(gpu.Part((name,)) for name in sides)
    flags = ["--only", "fastinst", "--yardstick", "sparse.py"]
    assert call(*parts, flags=flags) == (0, [(sides[0], "")]), "without PyTorch's FastInst"
    flags += ["--fastinst-yardstick", "fast.py"]
    assert call(*parts, flags=flags) == (0, [(name, "") for name in sides])
    assert measured.read(tmp_path / "rows.jsonl", {})[-1]["yardstick"] == "fast.py"


def test_the_deadline_is_kept_and_cuts_a_row_off_without_a_fault(call):
    start = time.monotonic()
    code, rows = call(gpu.Part(("a", "slow", "b"), least=1), gpu.Part(("c",)), seconds=6)
    assert time.monotonic() - start < 7
    assert (code, rows) == (1, [("a", "")]), "the next call goes on"
    assert call(gpu.Part(("a", "b"), least=1))[1] == [("a", ""), ("b", "")]


def test_a_row_that_takes_too_long_has_failed(call):
    _, rows = call(gpu.Part(("a", "slow", "b"), limit=3))
    assert rows == [("a", ""), ("slow", "more than 3 s"), ("b", "")]


def test_a_run_that_is_told_to_end_ends_its_part_and_shows_the_table(tmp_path):
    (tmp_path / "gpu_jax.py").write_text(CHILD.format(folder=str(BENCHMARKS), words=()))
    code = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import gpu, pathlib; "
    code += f"gpu.HERE = pathlib.Path({str(tmp_path)!r}); "
    code += "gpu.PARTS = (gpu.Part(('a', 'slow')),); sys.exit(gpu.main())"
    path = tmp_path / "rows.jsonl"
    command = [sys.executable, "-c", code, "--dry-run", "--output", str(path)]
    process = subprocess.Popen(
        [*command, "--copy-to", str(tmp_path / "copy")], stdout=subprocess.PIPE, text=True
    )
    while not path.exists() or not path.stat().st_size:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 143
    assert "| deformable_res5/grad: times its dense twin |  | ≤ 2 | not measured |" in output
    assert (tmp_path / "copy" / "rows.jsonl").exists()


def _good(*rows):
    return [{"name": name, "p50_ms": ms, **more} for name, ms, more in rows]


def test_what_follows_from_the_rows():
    parts = {"matching_ms": 6.0, "score_to_host_ms": 2.0}
    step = {"images_per_s": 20.0, "queued_ms": 80.0, "peak_mib": 300.0, "gflop": 160.0}
    rows = _good(
        ("rates/product/8192", 9.0, {"tflops": 4.0}),
        ("training/8", 100.0, {**step, "parts": parts}),
        ("torch/compiled/training/8", 150.0, {"queued_ms": 160.0, "peak_mib": 200.0}),
        ("matching/none/8", 90.0, {}),
        ("matching/host/8", 100.0, {}),
        ("op/deformable_res4/dense/grad", 2.0, {}),
        ("op/deformable_res4/deformable/grad", 3.0, {}),
        ("stage/32/stem/grad", 10.0, {"own_gflop": 4.0}),
        ("stage/32/res2/grad", 12.0, {"own_gflop": 4.0}),
    )
    rows.append({"name": "training/8", "fault": "later"})
    assert measured.figures(rows) == {
        "training/8: times as fast as torch/compiled": 1.5,
        "training/8, queued: times as fast as torch/compiled": 2.0,
        "training/8: times the memory of torch/compiled": 1.5,
        "training/8: share of the product's rate": 0.5,
        "training/8: minutes for an epoch of COCO": pytest.approx(117_266 / 20 / 60),
        "training/8: share of the step in host matching": 0.08,
        "matching/none/8: share beyond none": 0.0,
        "matching/host/8: share beyond none": pytest.approx(0.1),
        "deformable_res4/grad: times its dense twin": 1.5,
        "stage/32/stem/grad: own ms": 10.0,
        "stage/32/stem/grad: share of the product's rate": 0.1,
        "stage/32/res2/grad: own ms": 2.0,
        "stage/32/res2/grad: share of the product's rate": 0.5,
    }


def test_the_memory_of_a_cached_step_stands_beside_that_of_warm_pytorch():
    rows = _good(
        ("training/8/cached", 1.0, {"peak_mib": 300.0}),
        ("torch/compiled/training/8", 1.0, {"peak_mib": 900.0, "steady_peak_mib": 600.0}),
    )
    name = "training/8/cached: times the memory of torch/compiled"
    assert measured.figures(rows)[name] == 0.5


def test_each_aim_is_met_missed_or_not_measured():
    rows = _good(
        ("training/8", 100.0, {}),
        ("torch/compiled/training/8", 150.0, {}),
        ("op/deformable_res5/dense/grad", 1.0, {}),
        ("op/deformable_res5/deformable/grad", 3.0, {}),
    )
    lines = measured.tables([*rows, {"name": "network/1", "fault": "no memory"}]).splitlines()
    assert "| training/8: times as fast as torch/compiled | 1.5 | ≥ 1.5 | met |" in lines
    assert "| deformable_res5/grad: times its dense twin | 3 | ≤ 2 | **missed** |" in lines
    assert "| network/64: share of the product's rate |  | ≥ 0.3 | not measured |" in lines
    assert "| network/1 | failed |  |  |  |  |  |  |" in lines


def test_a_stray_module_on_the_path_hides_none_of_pythons(tmp_path, monkeypatch):
    stray = tmp_path / "stray"
    stray.mkdir()
    for name in ("profile", "json", "types"):
        (stray / f"{name}.py").write_text("raise RuntimeError('stray')")
    (stray / "wanted.py").write_text("VALUE = 7")
    monkeypatch.setenv("PYTHONPATH", str(stray))
    # What torch.compile does: it starts processes with the folders of this one.
    code = "import cProfile, json, os, subprocess, sys, types, wanted, rows, sparseinst_jax; "
    child = f"{code}print(wanted.VALUE)"
    code += "paths = {**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)}; "
    code += f"sys.exit(subprocess.run([sys.executable, '-c', {child!r}], env=paths).returncode)"
    command = measured.command(sys.executable, code)
    done = subprocess.run(
        command, env=measured.environment(), cwd=stray, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "7\n"), done.stderr
    (tmp_path / "script.py").write_text("import sys\nprint(*sys.argv[1:])")
    command = measured.command(sys.executable, str(tmp_path / "script.py"), "a", "b")
    assert subprocess.check_output(command, env=measured.environment(), text=True) == "a b\n"


def test_the_most_valuable_parts_come_first_and_no_row_twice():
    order = [part.rows[0] for part in gpu.PARTS]
    assert order[1:8] == [
        *("training/8", "torch/compiled/training/8", "torch/graphs/network/1", "network/1"),
        *("with_masks/1", "training/32", "torch/compiled/training/32"),
    ]
    ours, theirs = gpu.PARTS[-2:]
    assert (ours.rows, theirs.rows) == (("fastinst/8",), ("torch/compiled/fastinst/8",))
    assert ours.limit == theirs.limit == 300 <= ours.seconds, "for what takes long to compile"
    names = [name for part in gpu.PARTS for name in part.rows]
    assert len(names) == len(set(names))
    compiled, forms = "torch/compiled/", ("plain", "padded", "split")
    asked = ["rates/product/8192", "rates/copy/1024", "rates/to_device/2", "rates/to_host/37"]
    asked += [f"op/first/{form}/{way}" for form in forms for way in ("forward", "grad")]
    asked += ["op/maps/grouped/grad", "op/maps/split_104/grad", "op/maps/dense/grad"]
    asked += ["op/stem/plain/grad", "op/stem/padded_8/grad", "op/deformable_res4/deformable/grad"]
    asked += ["with_masks/1", "with_masks/1/20", "torch/graphs/network/1", "torch/bf16/network/1"]
    for work in ("network/1", "network/64", "training/8", "training/32"):
        asked += [work, compiled + work, f"torch/eager/{work}"]
    asked += [f"matching/{form}/8" for form in ("none", "host", "callback", "device", "overlapped")]
    asked += [f"stage/32/{stage}/grad" for stage in measured.STAGES]
    assert set(asked) <= set(names)
    assert set(measured.STAGES) >= {before for _, before in measured.STAGES.values()} - {""}


def test_drawn_pictures_are_always_the_same_and_each_pixel_has_one_owner():
    drawn = _script("drawn_instances")
    numbers = []
    for index in range(8):
        image, things = drawn.draw(0, index, 96)
        masks, labels = zip(*things, strict=True)
        again, _ = drawn.draw(0, index, 96)
        assert (image == again).all() and image.dtype == np.uint8 and image.shape[0] == 96
        assert all(mask.shape == image.shape[:2] for mask in masks)
        assert np.sum(masks, axis=0).max() <= 1 and min(map(np.sum, masks)) >= 24
        assert all(0 <= label < drawn.NUM_CLASSES for label in labels)
        numbers.append(len(masks))
    assert min(numbers) <= 2 and max(numbers) > 50
    form = drawn.FAMILIES["sparseinst"].targets
    batch = drawn.make_batch((0, 96, 4, form))
    assert batch.images.shape[1:] == (96, 128, 3) and batch.is_target.sum(1).min() >= 1
    levels = form.encode(drawn.draw(0, 0, 96)[1][0][0])
    assert (batch.masks[0, 0, : len(levels), : levels.shape[1]] == levels).all()


def test_descriptions_are_alike_where_they_tell_the_same_things_apart(rng):
    drawn = _script("drawn_instances")
    first = rng.normal(size=(3, 20, 6)).astype(np.float32)
    is_there = np.arange(60).reshape(3, 20) % 4 > 0
    turned = np.sign(first @ np.eye(6)[:, ::-1]) * 5 + 2  # other channels, another scale
    others = np.where(is_there[..., None], first, 1e3)  # places without a thing do not count
    alike = [drawn._alikeness(x, y, is_there) for x, y in ((first, first), (first, others))]
    assert np.allclose(alike, 1, atol=1e-5)
    unlike = drawn._alikeness(first, rng.normal(size=(3, 20, 9)).astype(np.float32), is_there)
    assert drawn._alikeness(first, turned, is_there) > 0.5 > 0.2 > abs(unlike)


def test_features_are_pooled_in_masks_of_another_stride(rng):
    drawn = _script("drawn_instances")
    features = rng.normal(size=(2, 4, 6, 5)).astype(np.float32)
    masks = np.zeros((2, 3, 16, 24), np.uint8)
    masks[:, 0, 4:8, 8:12] = 4  # cell (1, 2)
    masks[:, 1] = 4
    pooled = np.asarray(drawn._pooled(features, masks))
    np.testing.assert_allclose(pooled[:, 0], features[:, 1, 2], rtol=1e-6)
    np.testing.assert_allclose(pooled[:, 1], features.mean((1, 2)), atol=1e-6)
    assert (pooled[:, 2] == 0).all()


def test_what_pytorch_is_handed_is_what_a_run_begins_with(tmp_path):
    data = draw_shapes_dataset(tmp_path / "data", 4, 1, seed=3, image_size=(64, 64))
    places = {"images": str(data / "images/train"), "annotations": str(data / "train.json")}
    config = load_config("tiny", {f"data.train.{key}": value for key, value in places.items()})
    _script("small_networks").write_start(tmp_path / "start.npz", config, own_steps=0)
    run = make_run(config, lambda _: None)
    with np.load(tmp_path / "start.npz") as start:
        weights = {n.removeprefix("weights/"): start[n] for n in start if n.startswith("weights/")}
        np.savez(tmp_path / "weights.npz", **weights)
        np.testing.assert_allclose(start["rates"], [1.5e-6, 7.5075e-4, 1.5e-3, 1.5e-4], rtol=1e-6)
        for step, batch in enumerate(train_batches(run.dataset, run.plan, 0, 4)):
            for name in ("images", "valid_size", "labels", "masks", "is_target"):
                np.testing.assert_array_equal(start[f"batches/{step}/{name}"], getattr(batch, name))
    own = run.first_state.params, run.first_state.statistics
    names = FAMILIES[config.model.family].weights
    read = load_weights(tmp_path / "weights.npz", *own, names)
    jax.tree.map(np.testing.assert_array_equal, read, own)
