"""The comparison with PyTorch: arithmetic, verdicts, and exit codes with made-up sides."""

import json
import sys

import pytest

from benchmarks import compare_torch

# Answers as both sides do: always the same number of milliseconds, and of MiB.
SIDE = """
import json, sys
ms, mib = float(sys.argv[1]), float(sys.argv[2])
print("some library says hello", flush=True)
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    print(json.dumps({"ms": [ms] * int(line)}), flush=True)
print(json.dumps({"p50_ms": ms, "peak_process_mib": mib, "peak_with_compilation_mib": mib + 100,
                  "peak_device_mib": None}))
"""


@pytest.fixture
def measured(monkeypatch):
    """Return a function that runs the script with made-up sides."""

    def run(ours, theirs, *more):
        made_up = lambda times: lambda *_: [sys.executable, "-c", SIDE, *map(str, times)]  # noqa: E731
        monkeypatch.setattr(compare_torch, "our_command", made_up(ours))
        monkeypatch.setattr(compare_torch, "their_command", made_up(theirs))
        needed = ["--torch-python", "/some/where/python", "--yardstick", "/some/where/else.py"]
        return compare_torch.main([*needed, "--rounds", "3", *more])

    return run


def test_ratios_come_from_both_sides(measured, tmp_path, capsys):
    output = tmp_path / "out.json"
    only = ["--only", "network", "--against", "eager", "--output", str(output)]
    assert measured((20, 100), (30, 300), *only) == 0
    report = json.loads(output.read_text())
    (row,) = report["rows"]
    assert row["speed"] == {"median": 1.5, "least": 1.5, "most": 1.5, "of_medians": 1.5}
    assert row["memory"] == {
        **{"ratio": 0.5, "ours_mib": 200.0, "theirs_mib": 400.0},
        "ratio_after_warmup": pytest.approx(1 / 3),
    }
    assert row["samples_ms"]["ours"] == [[20.0, 20.0]] * 3
    assert report["targets"] == [
        {
            **{"work": "network", "against": "eager", "measure": "speed", "limit": 1.25},
            **{"value": 1.5, "is_met": True},
        }
    ]
    text = capsys.readouterr().out
    assert (
        "network, eager: 30.0 ms against our 20.0 ms, 1.50 times as fast (1.50 to 1.50), "
        "0.50 times the memory" in text
    )
    assert "/some/where" not in output.read_text(), "where things lie here is nobody's business"


@pytest.mark.parametrize(
    ("ours", "theirs", "flags", "code"),
    [
        ((20, 100), (30, 100), ["--check"], 0),  # exactly 1.5 times as fast, equal memory
        ((21, 100), (30, 100), ["--check"], 1),
        ((20, 101), (30, 100), ["--check"], 1),
        ((21, 101), (30, 100), [], 0),
    ],
    ids=["met", "too slow", "too large", "not checked"],
)
def test_check_exits_with_1_where_a_target_is_missed(measured, capsys, ours, theirs, flags, code):
    only = ["--only", "inference", "--against", "eager"]
    assert measured(ours, theirs, *only, *flags) == code
    assert ("MISSED" in capsys.readouterr().out) == (ours != (20, 100))


def test_a_side_that_ends_early_is_named(monkeypatch):
    side = compare_torch.Side("network, theirs", [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(ValueError, match="network, theirs: ended with code 3"):
        side.read("ready")


def test_the_targets_are_those_of_every_work_and_both_ways_to_run_pytorch():
    limits = {
        (work, against): limit
        for (work, measure), pair in compare_torch.LIMITS.items()
        for against, limit in zip(compare_torch.AGAINST, pair, strict=True)
        if measure == "speed"
    }
    assert limits == {
        ("inference", "eager"): 1.5,
        ("inference", "compiled"): 1.1,
        ("network", "eager"): 1.25,
        ("network", "compiled"): 0.95,
        ("post-processing", "eager"): 5.0,
        ("post-processing", "compiled"): 3.0,
        ("training", "eager"): 1.0,
        ("training", "compiled"): 0.9,
    }
    memory = {t for t in compare_torch.LIMITS.items() if t[0][1] == "memory"}
    assert memory == {(("inference", "memory"), (1.0, 1.0)), (("training", "memory"), (1.3, 1.3))}


def test_what_was_not_measured_meets_no_target():
    assert {verdict["is_met"] for verdict in compare_torch.judge([])} == {None}


def test_both_sides_are_told_the_same_sizes():
    needed = ["--torch-python", "TORCH", "--yardstick", "FILE", "--dtype", "bfloat16"]
    arguments = compare_torch._parse([*needed, "--batch", "4"])
    ours = " ".join(compare_torch.our_command("inference", "eager", arguments))
    theirs = " ".join(compare_torch.their_command("inference", "compiled", arguments))
    assert "--only throughput/with_masks/4" in ours and "--size 640x864" in ours
    assert "--config.model.dtype=bfloat16" in ours
    assert "--size 640 864 --valid-size 640 853 --photo-size 480 640" in theirs
    assert "--serve --rows torch/compiled/with_masks/4 --size 640 864" in theirs
    assert "--dtype bfloat16" in theirs and theirs.endswith("--contiguous")
    assert "--weights" not in ours + theirs
    arguments.weights = "/some/where/r50.pth"
    for side in (
        compare_torch.our_command("network", "eager", arguments),
        compare_torch.their_command("network", "eager", arguments),
    ):
        assert side[side.index("--weights") + 1] == "/some/where/r50.pth"
    ours = " ".join(compare_torch.our_command("training", "eager", arguments))
    theirs = " ".join(compare_torch.their_command("training", "eager", arguments))
    assert "--only training/step" in ours and "--train-size 512x512 --train-batch 2" in ours
    assert "torch/eager/training/2 --size 512 512 --valid-size 512 512" in theirs
