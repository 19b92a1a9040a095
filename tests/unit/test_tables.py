"""Tables in the documentation, made from results files."""

import json

import pytest

from benchmarks import tables

MACHINE = {
    **{"device": "cpu", "processor": "Xeon", "usable_cores": 2, "load_1_5_15": [0.25, 1, 2]},
    "versions": {"jax": "0.10.2"},
}
ROOFLINE = {
    **{"command": "python benchmarks/roofline.py", "machine": MACHINE},
    "settings": {"size": [640, 864], "batch": 1, "dtype": "float32"},
    "rates": {"flops": 2e11, "bytes": 1e10},
    "stages": [
        {
            **{"name": "stem", "bound": "operations", "gflops": 2.601, "mib": 60.04},
            **{"floor_ms": 13.0, "p50_ms": 26.04, "times_the_floor": 2.003},
        },
        {"name": "matching on the host", "p50_ms": 0.31},
    ],
}
COMPARISON = {
    **{"command": "python benchmarks/compare_torch.py", "weights": "drawn"},
    "settings": {"dtype": "float32"},
    "rows": [
        {
            **{"work": "training", "against": "eager"},
            "speed": {"median": 1.25, "least": 1.0, "most": 1.5},
            "memory": {"ratio": 1.4, "ours_mib": 1400.0, "theirs_mib": 1000.0},
            "ours": {"p50_ms": 40.0, "machine": MACHINE},
            "theirs": {"p50_ms": 50.0, "torch": "2.9", "threads": 2},
        }
    ],
    "targets": [
        {"work": "training", "against": "eager", "measure": "speed", "limit": 1.0, "is_met": True},
        {
            "work": "training",
            "against": "eager",
            "measure": "memory",
            "limit": 1.3,
            "is_met": False,
        },
    ],
}
BENCHMARK = {
    **{"command": "sparseinst benchmark", "machine": MACHINE, "dtype": "float32"},
    "weights": "drawn",
    "results": [
        {
            **{"name": "latency/network", "p50_ms": 700.0, "p90_ms": 710.0, "images_per_s": 1.428},
            **{"num_programs": 1, "compile_cold_s": 9.96, "compile_cached_s": 0.5},
            **{"peak_device_mib": None, "peak_process_mib": 900.4},
        },
        {
            **{"name": "input/batches", "p50_ms": 70.0, "p90_ms": 71.0, "images_per_s": 28.0},
            **{"num_programs": 0, "compile_cold_s": 0.0, "compile_cached_s": 0.0},
            **{"peak_device_mib": None, "peak_process_mib": 300.0},
        },
    ],
}
ACCELERATOR = {
    **{"command": "python benchmarks/gpu.py", "figures": {"network, batch 8: ms": 12.3456}},
    "aims": [
        {"figure": "a", "is_least": True, "limit": 1.5, "value": 1.7, "is_met": True},
        {"figure": "b", "is_least": False, "limit": 0.5, "value": 0.75, "is_met": False},
        {"figure": "c", "is_least": False, "limit": 2.0, "value": None, "is_met": None},
    ],
    "parts": {"latency": {"result": None}, "roofline": {"result": ROOFLINE}},
}
FORMS = {
    **{"command": "python benchmarks/matching_forms.py", "machine": MACHINE},
    "settings": {"forms": ["host"], "dtype": "float32"},
    "rows": [{"name": "host", "p50_ms": 123.45, "images_per_s": 16.2}],
}


@pytest.mark.parametrize(
    ("report", "line"),
    [
        (ROOFLINE, "| stem | operations | 2.60 | 60.0 | 13.00 | 26.0 | 2.0 |"),
        (ROOFLINE, "| matching on the host |  |  |  |  | 0.3 |  |"),
        (
            COMPARISON,
            "| training | eager | 50.0 | 40.0 | 1.25 (1.00 to 1.50) | ≥ 1, met | 1000 | 1400 | 1.40"
            " | ≤ 1.3, **missed** |",
        ),
        (BENCHMARK, "| latency/network | 700.0 | 710.0 | 1.43 | 10.0 | 0.5 | 900 |"),
        (BENCHMARK, "| input/batches | 70.0 | 71.0 | 28.00 |  |  | 300 |"),
        (ACCELERATOR, "| a | 1.7 | ≥ 1.5 | met |"),
        (ACCELERATOR, "| b | 0.75 | ≤ 0.5 | **missed** |"),
        (ACCELERATOR, "| c |  | ≤ 2 | not measured |"),
        (ACCELERATOR, "| network, batch 8: ms | 12.35 |"),
        (FORMS, "| host | 123.5 | 16.20 |"),
    ],
)
def test_every_kind_of_file_becomes_its_table(report, line):
    text = tables.rendered(json.loads(json.dumps(report)))
    assert line in text.splitlines()
    first = text.splitlines()[0]
    assert first.startswith(f"`{report['command']}`; ") and "jax 0.10.2; load before 0.2" in first
    width = {row.count("|") for row in text.split("\n\n")[1].splitlines()}
    assert len(width) == 1, "as many cells in every row as in the heading"


@pytest.fixture
def run(tmp_path):
    """Return a function that writes a document and results and runs the script."""
    (tmp_path / "results").mkdir()
    document = tmp_path / "performance.md"

    def call(text, files, *flags):
        document.write_text(text)
        for name, content in files.items():
            (tmp_path / "results" / name).write_text(json.dumps(content))
        given = ["--document", str(document), "--results", str(tmp_path / "results"), *flags]
        return tables.main(given), document.read_text()

    return call


MARKED = "before\n\n<!-- table: r.json -->\nold\n<!-- end -->\n\nafter\n"


def test_only_what_stands_between_the_marks_is_replaced(run):
    code, text = run(MARKED, {"r.json": ROOFLINE})
    assert code == 0 and "old" not in text and "| stem | operations |" in text
    assert text.startswith("before\n\n<!-- table: r.json -->\n`python")
    assert text.endswith("|\n<!-- end -->\n\nafter\n")
    assert run(text, {}) == (0, text), "nothing changes the second time"
    assert run(text, {}, "--check") == (0, text)


def test_a_stale_document_is_found_and_left_as_it_is(run, capsys):
    assert run(MARKED, {"r.json": ROOFLINE}, "--check") == (1, MARKED)
    assert "performance.md is not what these say: r.json" in capsys.readouterr().err


def test_marks_and_files_belong_together(run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"names r\.json"):
        run(MARKED, {})
    with pytest.raises(ValueError, match=r"no mark in the document for x\.json"):
        run(MARKED, {"r.json": ROOFLINE, "x.json": ROOFLINE})
    (tmp_path / "results" / "x.json").unlink()
    with pytest.raises(ValueError, match="not as our scripts write it: KeyError"):
        run(MARKED, {"r.json": {"stages": []}})
