"""Tables in the documentation, made from results files."""

import json

import pytest

from benchmarks import tables

MACHINE = {
    **{"device": "cpu", "processor": "Xeon", "usable_cores": 2, "load_1_5_15": [0.25, 1, 2]},
    "versions": {"jax": "0.10.2"},
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
_STAMP = {"device": "H100", "versions": {"jax": "0.11.2", "torch": "2.11"}}
ACCELERATOR = [
    {"name": "training/8", **_STAMP, "p50_ms": 1.0, "device": "H200"},
    {"name": "training/8", **_STAMP, "p50_ms": 20.0, "images_per_s": 400.0, "peak_mib": 900.4},
    {"name": "torch/compiled/training/8", **_STAMP, "p50_ms": 34.0},
    {"name": "network/1", **_STAMP, "fault": "no memory"},
    {"name": "op/deformable_res5/dense/grad", **_STAMP, "p50_ms": 1.0},
    {"name": "op/deformable_res5/deformable/grad", **_STAMP, "p50_ms": 3.0},
]


def test_a_comparison_becomes_its_table(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(COMPARISON))
    text = tables.table(tmp_path / "r.json")
    assert (
        "| training | eager | 50.0 | 40.0 | 1.25 (1.00 to 1.50) | ≥ 1, met | 1000 | 1400 | 1.40"
        " | ≤ 1.3, **missed** |"
    ) in text.splitlines()
    first = text.splitlines()[0]
    assert first.startswith("`python benchmarks/compare_torch.py`; ")
    assert "jax 0.10.2; load before 0.2" in first
    width = {row.count("|") for row in text.split("\n\n")[1].splitlines()}
    assert len(width) == 1, "as many cells in every row as in the heading"


@pytest.mark.parametrize(
    "line",
    [
        "`python benchmarks/gpu.py`; H100; jax 0.11.2, torch 2.11.",
        "| training/8: times as fast as torch/compiled | 1.7 | ≥ 1.5 | met |",
        "| deformable_res5/grad: times its dense twin | 3 | ≤ 2 | **missed** |",
        "| training/32: share of the product's rate |  | ≥ 0.3 | not measured |",
        "| training/8 | 20.000 |  |  | 400.0 |  | 900 |  |",
        "| network/1 | failed |  |  |  |  |  |  |",
    ],
)
def test_the_rows_of_an_accelerator_become_a_table_of_the_last_device(tmp_path, line):
    path = tmp_path / "gpu.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ACCELERATOR))
    assert line in tables.table(path).splitlines()


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
    code, text = run(MARKED, {"r.json": COMPARISON})
    assert code == 0 and "old" not in text and "| training | eager |" in text
    assert text.startswith("before\n\n<!-- table: r.json -->\n`python")
    assert text.endswith("|\n<!-- end -->\n\nafter\n")
    assert run(text, {}) == (0, text), "nothing changes the second time"
    assert run(text, {}, "--check") == (0, text)


def test_a_stale_document_is_found_and_left_as_it_is(run, capsys):
    assert run(MARKED, {"r.json": COMPARISON}, "--check") == (1, MARKED)
    assert "performance.md is not what these say: r.json" in capsys.readouterr().err


def test_marks_and_files_belong_together(run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"names r\.json"):
        run(MARKED, {})
    with pytest.raises(ValueError, match=r"no mark in the document for x\.json"):
        run(MARKED, {"r.json": COMPARISON, "x.json": COMPARISON})
    (tmp_path / "results" / "x.json").unlink()
    with pytest.raises(ValueError, match="not as our scripts write it: KeyError"):
        run(MARKED, {"r.json": {"targets": []}})
