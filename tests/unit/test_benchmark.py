"""The instruments: statistics by hand, counts of a tiny network, the commands' tables and JSON."""

import io
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from benchmarks import evaluation
from sparseinst_jax.checkpoints.state import TrainState
from sparseinst_jax.cli import benchmark as command
from sparseinst_jax.cli import summary
from sparseinst_jax.cli.arguments import parse_command_line
from sparseinst_jax.cli.measuring import host_work, machine, timing, workloads
from sparseinst_jax.configs import tiny
from sparseinst_jax.data.plan import TrainPlan
from sparseinst_jax.models.sparseinst.weights import NAMES
from sparseinst_jax.models.trees import functional
from sparseinst_jax.setup import builders
from sparseinst_jax.training.step import TrainStep
from sparseinst_jax.weights.convert import ours_to_original

pytestmark = pytest.mark.usefixtures("quick_compilation")

SETTING = "jax_compilation_cache_dir"
TINY = str(Path(__file__).parents[2] / "configs" / "tiny.py")


def _clock(*seconds: float):
    ticks = iter(seconds)
    return lambda: next(ticks)


def test_times_are_median_ninth_decile_mean_and_least():
    found = timing.summary([4.0, 1.0, 2.0, 3.0, 10.0])
    assert (found["p50_ms"], found["mean_ms"], found["least_ms"]) == (3.0, 4.0, 1.0)
    assert found["p90_ms"] == pytest.approx(7.6)  # 4 and 60 % of the way to 10


def test_a_ratio_is_the_median_of_the_rounds_with_its_extremes():
    theirs = [[10.0, 30.0, 20.0], [60.0], [9.0, 9.0]]
    ours = [[10.0], [20.0, 20.0], [3.0, 6.0]]
    ratio = timing.speed_ratio(theirs, ours)
    assert (ratio.median, ratio.least, ratio.most) == (2.0, 2.0, 3.0)
    assert ratio.of_medians == pytest.approx(15.0 / 10.0)


def test_ratios_of_unequal_numbers_of_rounds_are_refused():
    with pytest.raises(ValueError, match="got 1 and 2"):
        timing.speed_ratio([[1.0]], [[1.0], [2.0]])


def test_only_timed_runs_are_timed():
    ran = []
    workload = timing.Workload(lambda: ran.append(0), 1, {})
    samples = timing.timed(workload, timing.Repeats(3, 2), _clock(0.0, 0.5, 1.0, 3.0))
    assert (len(ran), samples) == (5, [500.0, 2000.0])


def test_served_runs_are_those_that_were_asked_for():
    ran, answers = [], io.StringIO()
    workload = timing.Workload(lambda: ran.append(0), 4, {"batch": 4})
    clock = _clock(0, 0.001, 0.001, 0.003, 0, 0.004)
    timing.serve(workload, 2, ["2\n", "1\n"], answers, timing.summary, clock)
    ready, first, second, result = map(json.loads, answers.getvalue().splitlines())
    assert ready == {"ready": True} and len(ran) == 2 + 3
    assert first["ms"] == pytest.approx([1, 2]) and second["ms"] == pytest.approx([4])
    assert result["p50_ms"] == pytest.approx(2) and "peak_process_mib" in result


def test_without_compile_times_a_workload_only_warms_up_and_runs():
    ran = []
    workload = timing.Workload(lambda: ran.append(0), 1, {})
    row = machine.measure("x", workload, timing.Repeats(1, 2), print, with_compile_times=False)
    assert len(ran) == 1 + 2 and "compile_cold_s" not in row
    machine.measure("x", workload, timing.Repeats(1, 2), print)
    assert len(ran) == 3 + 2 + 1 + 2, "cold and cached come first"


def test_the_second_first_call_compiles_nothing():
    x = jnp.ones((8, 8))
    function = jax.jit(lambda x: jnp.sin(x) @ x)
    folder = jax.config.values[SETTING]
    found = machine.first_calls(lambda: function(x).block_until_ready(), _clock(0, 3, 3, 4))
    assert (found["first_call_cold_s"], found["first_call_cached_s"]) == (3, 1)
    assert found["num_programs"] == 1
    assert jax.config.values[SETTING] == folder
    with machine.watched() as again:
        function(x).block_until_ready()
    assert again == []


@pytest.mark.parametrize(
    ("photo_size", "size", "resized"),
    [((480, 640), (640, 864), (640, 853)), ((640, 480), (864, 640), (853, 640))],
)
def test_a_photo_fills_the_padded_image(photo_size, size, resized):
    assert workloads.valid_size(photo_size, size) == resized
    assert workloads.usual_photo((512, 512)) == (512, 512)
    with pytest.raises(ValueError, match="resized to 384x512"):
        workloads.valid_size((480, 640), (512, 512))


def test_a_random_batch_has_its_objects_everywhere():
    batch = workloads.random_batch(2, (64, 96), 5, 7)
    assert batch.masks.shape == (2, 5, 16, 24) and set(np.unique(batch.masks)) == {0, 4}
    assert (batch.masks.reshape(10, -1).max(1) == 4).all()
    assert batch.is_target.all() and batch.labels.max() < 7
    assert batch.valid_size.tolist() == [[64, 96]] * 2


def test_drawn_photos_are_a_data_set_of_jpegs(tmp_path):
    dataset = host_work.draw_photos(tmp_path / "photos", 3, (96, 128))
    assert {(record.height, record.width) for record in dataset.records} <= {(96, 128), (128, 96)}
    assert len(dataset.records) == 3 and dataset.num_targets.sum() > 0
    for record in dataset.records:
        assert Image.open(record.path).format == "JPEG"
        assert Image.open(record.path).size == (record.width, record.height)


def test_scored_detections_are_half_right_and_pycocotools_agrees():
    content, detections = host_work.drawn_results((64, 96), 2, 3)
    assert len(content["annotations"]) == 6 and len(detections) == 2 * 100
    assert [entry["id"] for entry in content["annotations"]] == [1, 2, 3, 4, 5, 6]
    ours = host_work.scores(content, detections)
    assert 0.0 < ours.run()["AP"] < 1.0
    assert ours.images == 2 and ours.facts["objects_per_image"] == 3
    assert ours.facts["photo_size"] == (64, 96)
    found = evaluation.compare(content, detections, 2)
    assert found["largest_difference"] == 0.0, "pycocotools' numbers, to the last bit"
    assert found["ratio"]["median"] > 0 and found["pycocotools_ms"] > 0
    assert len(host_work.encoding((64, 96)).run()) == 100


def test_the_parts_of_a_network_add_up():
    model = builders.build_model(tiny.get_config().model, 3, None)
    parts = {part["name"]: part for part in summary.parts(model, (64, 96))}
    whole = parts["all"]
    main = [parts[name] for name in ("backbone", "encoder", "decoder")]
    assert sum(part["trained"] for part in main) == whole["trained"]
    assert sum(part["gmacs"] for part in main) == pytest.approx(whole["gmacs"], rel=1e-12)
    stages = [part for name, part in parts.items() if name.startswith("backbone/")]
    assert len(stages) == 5
    assert sum(part["trained"] for part in stages) == main[0]["trained"]
    assert list(parts)[5:] == [
        *("backbone", "encoder", "decoder/inst_branch", "decoder/mask_branch", "decoder", "all")
    ]
    # res2: one bottleneck of 8 channels in and 32 out; scales and biases of four norms.
    kernels = 8 * 8 + 9 * 8 * 8 + 8 * 32 + 8 * 32
    assert parts["backbone/res2"]["trained"] == kernels + 2 * (8 + 8 + 32 + 32)


def test_activations_come_in_their_order_with_their_sizes():
    given = functional(builders.build_model(tiny.get_config().model, 3, None))
    images = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)
    found = summary.activations(*given, images)
    assert [tensor["name"] for tensor in found[:5]] == ["stem", "res2", "res3", "res4", "res5"]
    sizes = {tensor["name"]: tensor for tensor in found}
    assert sizes["res2"]["shape"] == (2, 16, 24, 32)
    assert sizes["res2"]["mib"] == 2 * 16 * 24 * 32 * 4 / 2**20
    assert sizes["mask_logits"]["shape"] == (2, 10, 16, 24)
    one, two = (
        summary.residual_mib(*given, jax.ShapeDtypeStruct((n, 64, 96, 3), jnp.float32))
        for n in (1, 2)
    )
    assert two > one > sizes["stem"]["mib"] / 2, "what is kept grows with the batch"


def test_summary_prints_what_the_network_has(capsys):
    arguments = ["--config", TINY, "--size", "64x96", "--classes", "3"]
    assert summary.main([*arguments, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    whole = facts["parts"][-1]
    assert facts["gflops_analytic"] == 2 * whole["gmacs"]
    # XLA counts activations and norms too, and leaves out what multiplies padding.
    assert facts["xla"]["gflops"] == pytest.approx(facts["gflops_analytic"], rel=0.5)
    assert facts["xla"]["results_mib"] == pytest.approx(
        sum(t["mib"] for t in facts["activations"][-3:]), abs=1e-3
    )
    text = summary.text(facts)
    assert re.search(rf"^all +{whole['trained'] / 1e6:.3f} ", text, re.MULTILINE)
    assert re.search(r"^res5 +1x2x3x256 +0.01$", text, re.MULTILINE)


def test_summary_refuses_what_cannot_be(capsys):
    with pytest.raises(ValueError, match="multiples of 32, got 65x96") as fault:
        summary.main(["--size", "65x96", "--batch", "0"])
    assert "give --config NAME, such as --config giam_r50" in str(fault.value)
    assert "--batch must be at least 1, got 0" in str(fault.value)


SMALL = ["--config", TINY, "--size", "64x96", "--train-size", "64x64", "--photo-size", "96x128"]
SMALL += ["--warmup", "1", "--iterations", "2", "--objects", "2"]


def test_the_benchmark_writes_what_it_measures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(workloads, "NUM_PHOTOS", 5)
    output = tmp_path / "out.json"
    chosen = ["input/batches", "post", "scoring/predict", "scoring/encode"]
    assert command.main([*SMALL, "--only", *chosen, "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    rows = {row["name"]: row for row in report["results"]}
    assert list(rows) == ["input/batches", "post/masks", "scoring/predict", "scoring/encode"]
    assert rows["scoring/predict"]["images"] == workloads.NUM_PHOTOS
    assert rows["input/batches"]["note"].endswith(")")
    for row in rows.values():
        assert row["iterations"] == 2 and 0 < row["least_ms"] <= row["p50_ms"] <= row["p90_ms"]
        assert row["images_per_s"] == pytest.approx(1e3 * row["images"] / row["p50_ms"])
        assert row["peak_process_mib"] is None or row["peak_process_mib"] > 50
    assert rows["input/batches"]["images"] == 2 and rows["input/batches"]["num_programs"] == 0
    assert rows["post/masks"]["kept_masks_per_image"] == 10
    assert rows["post/masks"]["num_programs"] == 3, "scores, and rows and columns of a chunk"
    assert set(rows["post/masks"]["xla"]["scores"]) == {
        *("arguments_mib", "results_mib", "temporary_mib")
    }
    assert report["machine"]["versions"]["jax"] == jax.__version__
    printed = capsys.readouterr().out
    assert re.search(r"^post/masks +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ +\d+", printed, re.M)
    assert re.search(r"^input/batches +[\d.]+ +[\d.]+ +[\d.]+ +- +- ", printed, re.M)
    assert f"jax {jax.__version__}" in printed and "10 masks kept an image" in printed


def test_a_measured_training_step_trains_and_says_where_its_time_goes():
    config = tiny.get_config()
    model = builders.build_model(config.model, 3, 0)
    apply, params, statistics = functional(model)
    batch = workloads.random_batch(2, (64, 64), 3, 3)
    adam = optax.adam(1e-3)
    step = TrainStep(builders.build_objective(config, apply), adam)
    state = TrainState(np.int32(0), params, statistics, adam.init(params))
    # Its details take steps too; the loss on the only batch falls.
    workload = workloads.train_steps(step, state, batch)
    losses = []
    for _ in range(4):
        workload.run()
        losses.append(workload.details()["last_loss"])
    assert losses[-1] < losses[0] and workload.images == 2
    details = workload.details()
    assert set(details["parts"]) == {
        *("first_half_ms", "score_to_host_ms", "matching_ms", "second_half_ms")
    }
    assert workload.facts["objects_per_image"] == 3
    assert details["note"].startswith("each part by itself: first half ")
    memory = {name: machine.compiled_memory(half) for name, half in workload.compiled().items()}
    assert set(memory) == {"first half", "second half"}
    # What the first half hands over, and the optimizer's state.
    assert memory["second half"]["arguments_mib"] > memory["first half"]["results_mib"] > 0


def test_the_original_protocol_gives_frames_per_second_of_the_mean(tmp_path, capsys):
    output = tmp_path / "out.json"
    output.write_text("of an earlier run")
    assert command.main([*SMALL, "--protocol", "original", "--output", str(output)]) == 0
    (row,) = json.loads(output.read_text())["results"]
    assert row["fps"] == pytest.approx(1e3 / row["mean_ms"])
    assert f"{row['fps']:.2f} frames per second" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "latncy"], "nothing named latncy; expected some of latency, throughput"),
        (["--size", "60x96"], "--size must be multiples of 32, got 60x96"),
        (["--train-size", "64x65"], "--train-size must be multiples of 32, got 64x65"),
        (["--workers", "-1"], "--workers must be at least 0, got -1"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--protocol", "original", "--only", "post"], "leave --only"),
        (["--serve"], "--serve measures one thing"),
        (["--only", "latency/network", "--photo-size", "10x500"], "does not fill --size"),
    ],
)
def test_the_benchmark_refuses_what_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        command.main([*SMALL, *arguments])


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["/some/benchmarks/many_steps.py", "--size", "64", "96"], "many_steps.py --size 64 96"),
        (["benchmarks/gpu.py", "--output", "/some/where/g.json"], "gpu.py --output g.json"),
        (["/some/bin/sparseinst", "benchmark", "--x=/some/y"], "sparseinst benchmark --x=y"),
        (["-c", "benchmark"], "sparseinst benchmark"),
    ],
)
def test_a_command_is_shown_without_where_things_lie(monkeypatch, argv, shown):
    monkeypatch.setattr("sys.argv", argv)
    is_script = shown.startswith(("many_steps", "gpu"))
    assert machine.command() == ("python benchmarks/" * is_script) + shown


def test_memory_is_that_of_the_process_and_of_the_plan():
    compiled = jax.jit(lambda x: x @ x).lower(jnp.ones((256, 256))).compile()
    memory = machine.compiled_memory(compiled)
    assert memory["arguments_mib"] == memory["results_mib"] == 0.25
    timing.forget_peak()
    before = timing.peak_process_mib()
    block = np.ones(64 * 2**20, np.uint8)
    after = timing.peak_process_mib()
    assert block.all()
    if before is not None and after is not None:
        assert after - before == pytest.approx(64, abs=16)


def test_named_weights_are_the_ones_that_are_measured(tmp_path):
    config = tiny.get_config()
    _, params, statistics = functional(builders.build_model(config.model, 80, 0))
    branch = params["decoder"]["inst_branch"]
    branch["cls_score"]["bias"] = np.full(80, -40, np.float32)  # nothing is found
    weights = tmp_path / "weights.npz"
    np.savez(weights, **ours_to_original(params, statistics, NAMES))
    kept = []
    no_data = ["--config.data.generator=", "--config.data.val.annotations=none.json"]
    for more in ([], ["--weights", str(weights), *no_data]):
        arguments = parse_command_line(command.parser(), [*SMALL, *more])
        bench = workloads.Bench(arguments, tmp_path)
        kept.append(bench.with_masks(2).details()["kept_masks_per_image"])
    assert kept == [10, 0]


@pytest.fixture
def drawn(tmp_path):
    dataset = host_work.draw_photos(tmp_path / "photos", 4, (96, 128))
    options = {"seed": 0, "batch_size": 2, "train_sizes": (32, 64), "train_max_size": 96}
    return dataset, TrainPlan(dataset.image_sizes, dataset.num_targets, **options)


def test_batches_are_compared_with_decoding_and_resizing_alone_in_turn(drawn, monkeypatch):
    now = [0.0]
    calls = []

    def spend(name, seconds):
        def work(source, step):
            calls.append((name, step.step))
            now[0] += seconds

        return work

    monkeypatch.setattr(host_work, "_decode_and_resize", spend("alone", 0.020))
    monkeypatch.setattr(host_work, "make_batch", spend("whole", 0.025))
    dataset, plan = drawn
    details = host_work.batches(dataset, plan, lambda: now[0]).details()
    assert details["against_decoding"] == {
        "rounds": host_work.ROUNDS,
        "decode_and_resize_ms_per_image": pytest.approx(10),
        "batch_ms_per_image": pytest.approx(12.5),
        **dict.fromkeys(("median", "least", "most", "of_medians"), pytest.approx(1.25)),
    }
    assert details["note"] == (
        "12.50 ms an image, decoding and resizing the same alone 10.00 ms: "
        "1.25 times as long (40 batches alternately, 1.25 to 1.25)"
    )
    # The same batch for both, the order changes.
    assert [name for name, _ in calls[:4]] == ["whole", "alone", "alone", "whole"]
    assert [step for _, step in calls] == np.arange(host_work.ROUNDS).repeat(2).tolist()


def test_decoding_and_resizing_alone_takes_the_planned_sizes(drawn, monkeypatch):
    dataset, plan = drawn
    taken = []
    asarray = np.asarray
    monkeypatch.setattr(
        host_work.np, "asarray", lambda photo: taken.append(photo.size) or asarray(photo)
    )
    host_work.decode_and_resize(dataset, plan).run()
    sizes = [image.transform.size for image in plan.batch(0).images]
    assert taken == [(width, height) for height, width in sizes]
