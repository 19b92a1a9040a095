"""Exported files beside the package, in one process and alternately: a round runs each once."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sparseinst_jax.cli.arguments import is_exported
from sparseinst_jax.cli.measuring import timing
from sparseinst_jax.cli.measuring.workloads import Bench
from sparseinst_jax.runner.file_predictor import DEFAULT_RUNTIME, FilePredictor
from sparseinst_jax.runner.onnx_file import read_metadata
from sparseinst_jax.runner.predictor import BasePredictor
from sparseinst_jax.runtime.messages import columns

PACKAGE = "package"
PARTS = ("network", "with_masks")
PAUSE = 0.05  # seconds after each run: threads of a runtime wait for more work, busily, for a while


def predictors(bench: Bench, folder: Path, note: Callable[[str], Any]) -> dict[str, BasePredictor]:
    """What is measured by name: the package and its exported file in each runtime, or files."""
    given, found = bench.arguments, {}
    runtimes = given.runtime or [DEFAULT_RUNTIME]
    eval_size = min(bench.size), max(bench.size)
    files = [Path(path) for path in given.exported]
    if is_exported(given):
        files.insert(0, Path(given.checkpoint))
    else:
        package = bench.predictor(1)
        found[PACKAGE] = package
        note("exporting, without comparing")
        path = folder / "model.onnx"
        package.export(path, verifies=False)
        found |= {name: FilePredictor(path, name, eval_size=eval_size) for name in runtimes}
    for file in files:
        is_int8 = read_metadata(file).precision == "int8"
        for name in runtimes:
            if not (is_int8 and name == "openvino_bf16"):
                title = f"{name} {file.name}"
                found[title] = FilePredictor(file, name, eval_size=eval_size)
    return found


def measure(
    bench: Bench, folder: Path, repeats: timing.Repeats, note: Callable[[str], Any]
) -> list[dict[str, Any]]:
    """Measure the network with its scores, and that with the masks at the photo's size."""
    runs: dict[str, Callable[[], Any]] = {}
    for name, predictor in predictors(bench, folder, note).items():
        runs[f"network/{name}"] = functools.partial(_network, bench, predictor)
        runs[f"with_masks/{name}"] = bench.with_masks(1, predictor).run
    wall: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeats.warmup + repeats.iterations):
        for name, run in runs.items():
            start = time.perf_counter(), time.process_time()
            run()
            end = time.perf_counter(), time.process_time()
            time.sleep(PAUSE)
            if number >= repeats.warmup:
                wall[name].append(1e3 * (end[0] - start[0]))
                cpu[name].append(1e3 * (end[1] - start[1]))
        note(f"round {number + 1} of {repeats.warmup + repeats.iterations}")
    return [
        {"name": name, **timing.summary(wall[name]), "cpu_ms": float(np.median(cpu[name]))}
        for name in sorted(runs, key=lambda name: PARTS.index(name.partition("/")[0]))
    ]


def _network(bench: Bench, predictor: BasePredictor) -> Any:
    (item,) = bench.items(1)
    return jax.block_until_ready(predictor.select([item], bench.size))


def text(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows as a table, with the speed beside the package's."""
    package = {
        row["name"].partition("/")[0]: row["p50_ms"]
        for row in rows
        if row["name"].endswith(f"/{PACKAGE}")
    }
    lines: list[Sequence[str]] = [("", "p50 ms", "p90 ms", "least ms", "CPU ms", "times as fast")]
    for row in rows:
        base = package.get(row["name"].partition("/")[0])
        values = (row[key] for key in ("p50_ms", "p90_ms", "least_ms", "cpu_ms"))
        ratio = f"{base / row['p50_ms']:.2f}" if base else "-"
        lines.append((row["name"], *(f"{value:.1f}" for value in values), ratio))
    return columns(lines)
