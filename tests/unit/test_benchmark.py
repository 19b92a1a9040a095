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

from configs import tiny
from sparseinst_jax import builders, layers
from sparseinst_jax.benchmark import (
    compilation,
    inference,
    machine,
    network,
    photos,
    scoring,
    statistics,
    training,
    workloads,
)
from sparseinst_jax.commands import benchmark as command
from sparseinst_jax.commands import summary
from sparseinst_jax.commands.benchmark_parts import Bench
from sparseinst_jax.config import parse_command_line
from sparseinst_jax.data.coco import decode_mask, load_coco
from sparseinst_jax.weights.convert import ours_to_original

pytestmark = pytest.mark.usefixtures("quick_compilation")

SETTING = "jax_compilation_cache_dir"
TINY = str(Path(__file__).parents[2] / "configs" / "tiny.py")


def _clock(*seconds: float):
    ticks = iter(seconds)
    return lambda: next(ticks)


def test_times_are_median_ninth_decile_mean_and_least():
    found = statistics.times([4.0, 1.0, 2.0, 3.0, 10.0])
    assert (found.p50, found.mean, found.least, found.number) == (3.0, 4.0, 1.0, 5)
    assert found.p90 == pytest.approx(7.6)  # 4 and 60 % of the way to 10


def test_a_ratio_is_the_median_of_the_rounds_with_its_extremes():
    theirs = [[10.0, 30.0, 20.0], [60.0], [9.0, 9.0]]
    ours = [[10.0], [20.0, 20.0], [3.0, 6.0]]
    ratio = statistics.speed_ratio(theirs, ours)
    assert (ratio.median, ratio.least, ratio.most) == (2.0, 2.0, 3.0)
    assert ratio.of_medians == pytest.approx(15.0 / 10.0)


def test_ratios_of_unequal_numbers_of_rounds_are_refused():
    with pytest.raises(ValueError, match="got 1 and 2"):
        statistics.speed_ratio([[1.0]], [[1.0], [2.0]])


def test_only_timed_runs_are_timed():
    ran = []
    samples = workloads.timed(
        lambda: ran.append(0), workloads.Repeats(3, 2), _clock(0.0, 0.5, 1.0, 3.0)
    )
    assert (len(ran), samples) == (5, [500.0, 2000.0])


def test_served_runs_are_those_that_were_asked_for():
    ran, answers = [], io.StringIO()
    workload = workloads.Workload(lambda: ran.append(0), 4, {"batch": 4})
    clock = _clock(0, 0.001, 0.001, 0.003, 0, 0.004)
    workloads.serve("x", workload, workloads.Repeats(2, 9), ["2\n", "1\n"], answers, clock)
    ready, first, second, result = map(json.loads, answers.getvalue().splitlines())
    assert ready == {"ready": True} and len(ran) == 2 + 3
    assert first["ms"] == pytest.approx([1, 2]) and second["ms"] == pytest.approx([4])
    assert result["p50_ms"] == pytest.approx(2) and result["images_per_s"] == pytest.approx(2000)


def test_without_compile_times_a_workload_only_warms_up_and_runs():
    ran = []
    workload = workloads.Workload(lambda: ran.append(0), 1, {})
    row = workloads.measure("x", workload, workloads.Repeats(1, 2), print, with_compile_times=False)
    assert len(ran) == 1 + 2 and "compile_cold_s" not in row
    workloads.measure("x", workload, workloads.Repeats(1, 2), print)
    assert len(ran) == 3 + 2 + 1 + 2, "cold and cached come first"


def test_a_short_side_gives_the_padded_size_of_the_photo(tmp_path):
    given = ["--config", TINY, "--shortest-side", "64", "--photo-size", "96x128"]
    bench = Bench(parse_command_line(command._parser(), given), tmp_path)
    assert bench.subject.size == (64, 96) and bench.subject.valid_size == (64, 85)


def test_the_second_first_call_compiles_nothing():
    x = jnp.ones((8, 8))
    function = jax.jit(lambda x: jnp.sin(x) @ x)
    folder = jax.config.values[SETTING]
    found = compilation.first_calls(lambda: function(x).block_until_ready(), _clock(0, 3, 3, 4))
    assert (found["first_call_cold_s"], found["first_call_cached_s"]) == (3, 1)
    assert found["num_programs"] == 1
    assert jax.config.values[SETTING] == folder
    with compilation.watched() as again:
        function(x).block_until_ready()
    assert (again.number, again.seconds) == (0, 0.0)


@pytest.mark.parametrize(
    ("photo_size", "size", "resized"),
    [((480, 640), (640, 864), (640, 853)), ((640, 480), (864, 640), (853, 640))],
)
def test_a_photo_fills_the_padded_image(photo_size, size, resized):
    assert inference.valid_size(photo_size, size) == resized
    assert inference.usual_photo((512, 512)) == (512, 512)
    with pytest.raises(ValueError, match="resized to 384x512"):
        inference.valid_size((480, 640), (512, 512))


def test_a_random_batch_has_its_objects_everywhere():
    batch = training.random_batch(2, (64, 96), 5, 7)
    assert batch.masks.shape == (2, 5, 16, 24) and set(np.unique(batch.masks)) == {0, 4}
    assert (batch.masks.reshape(10, -1).max(1) == 4).all()
    assert batch.is_target.all() and batch.labels.max() < 7
    assert batch.valid_size.tolist() == [[64, 96]] * 2


def test_drawn_photos_are_a_data_set_with_polygons_inside_the_photos(tmp_path):
    dataset = load_coco(photos.draw_photos(tmp_path, 2, (48, 64), 3), tmp_path / "images")
    assert [(record.height, record.width) for record in dataset.records] == [(48, 64)] * 2
    content = json.loads((tmp_path / "annotations.json").read_text())
    assert dataset.num_targets.tolist() == [3, 3] and len(content["categories"]) == 80
    for entry in content["annotations"]:
        x, y, width, height = entry["bbox"]
        assert x >= 0 and y >= 0 and x + width <= 64.01 and y + height <= 48.01
        drawn = decode_mask(entry["segmentation"], 48, 64).sum()
        assert drawn == pytest.approx(entry["area"], rel=0.25, abs=12)


def test_scored_detections_are_half_right():
    found = scoring.scores((64, 96), 2, 3)
    details = found.details()
    assert found.images == 2 and 0.0 < details["AP"] < 1.0
    assert details["largest_difference"] == 0.0, "pycocotools' numbers, to the last bit"
    assert details["ratio"]["median"] > 0 and details["pycocotools_ms"] > 0
    assert len(scoring.encoding((64, 96)).run()) == 100


def test_the_parts_of_a_network_add_up():
    model = builders.build_model(tiny.get_config().model, 3, None)
    parts = {part.name: part for part in network.parts(model, (64, 96))}
    whole = parts[""]
    main = [parts[name] for name in ("backbone", "encoder", "decoder")]
    assert sum(part.parameters.trained for part in main) == whole.parameters.trained
    assert sum(part.gmacs for part in main) == pytest.approx(whole.gmacs, rel=1e-12)
    stages = [part for name, part in parts.items() if name.startswith("backbone/")]
    assert len(stages) == 5
    assert sum(part.parameters.trained for part in stages) == main[0].parameters.trained
    # res2: one bottleneck of 8 channels in and 32 out; scales and biases of four norms.
    kernels = 8 * 8 + 9 * 8 * 8 + 8 * 32 + 8 * 32
    assert parts["backbone/res2"].parameters.trained == kernels + 2 * (8 + 8 + 32 + 32)


def test_activations_come_in_their_order_with_their_sizes():
    given = layers.functional(builders.build_model(tiny.get_config().model, 3, None))
    images = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)
    found = network.activations(*given, images)
    assert [tensor.name for tensor in found[:5]] == ["stem", "res2", "res3", "res4", "res5"]
    sizes = {tensor.name: tensor for tensor in found}
    assert sizes["res2"].shape == (2, 16, 24, 32)
    assert sizes["res2"].mib == 2 * 16 * 24 * 32 * 4 / 2**20
    assert sizes["mask_logits"].shape == (2, 10, 16, 24)
    one, two = (
        network.residual_mib(*given, jax.ShapeDtypeStruct((n, 64, 96, 3), jnp.float32))
        for n in (1, 2)
    )
    assert two > one > sizes["stem"].mib / 2, "what is kept grows with the batch"


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
    assert "--config FILE is needed" in str(fault.value)
    assert "--batch must be at least 1, got 0" in str(fault.value)


SMALL = ["--config", TINY, "--size", "64x96", "--train-size", "64x64", "--photo-size", "96x128"]
SMALL += ["--warmup", "1", "--iterations", "2", "--objects", "2"]


def test_the_benchmark_writes_what_it_measures(tmp_path, capsys):
    output = tmp_path / "out.json"
    chosen = ["input/batches", "post", "scoring/encode"]
    assert command.main([*SMALL, "--only", *chosen, "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    rows = {row["name"]: row for row in report["results"]}
    assert list(rows) == ["input/batches", "post/masks", "scoring/encode"]
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
    apply, params, statistics = layers.functional(model)
    batch = training.random_batch(2, (64, 64), 3, 3)
    objective = builders.build_objective(config, apply)
    # Its details take steps too; the loss on the only batch falls.
    workload = training.step(objective, optax.adam(1e-3), params, statistics, batch)
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
        (["--train-batch", "3", "--micro-batches", "2"], "a multiple of --micro-batches"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--shortest-side", "64"], "--size or --shortest-side, not both"),
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
    assert machine.compiled_gflops(compiled) == pytest.approx(2 * 256**3 / 1e9)
    machine.forget_peak()
    before = machine.peak_process_mib()
    block = np.ones(64 * 2**20, np.uint8)
    after = machine.peak_process_mib()
    assert block.all()
    if before is not None and after is not None:
        assert after - before == pytest.approx(64, abs=16)


def test_named_weights_are_the_ones_that_are_measured(tmp_path):
    config = tiny.get_config()
    _, params, statistics = layers.functional(builders.build_model(config.model, 80, 0))
    branch = params["decoder"]["inst_branch"]
    branch["cls_score"]["bias"] = np.full(80, -40, np.float32)  # nothing is found
    weights = tmp_path / "weights.npz"
    np.savez(weights, **ours_to_original(params, statistics))
    kept = []
    no_data = ["--config.data.generator=", "--config.data.val.annotations=none.json"]
    for more in ([], ["--weights", str(weights), *no_data]):
        arguments = parse_command_line(command._parser(), [*SMALL, *more])
        subject = Bench(arguments, tmp_path).subject
        kept.append(inference.with_masks(subject, 2).details()["kept_masks_per_image"])
    assert kept == [10, 0]
