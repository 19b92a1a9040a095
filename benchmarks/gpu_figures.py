"""What follows from the rows of gpu.py: the table, ratios, shares of the machine's rate, the aims.

Pure arithmetic; what was not measured is left out, and its aim says so.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

import gpu_rows

Row = Mapping[str, Any]
COCO_IMAGES = 117_266  # of train2017 with an object
AIMS = (  # figure, whether the limit is the least that is wanted, limit
    ("training/8: times as fast as torch/compiled", True, 1.5),
    ("training/32: times as fast as torch/compiled", True, 1.5),
    ("network/1: times as fast as torch/compiled", True, 2.0),
    ("with_masks/1: times as fast as torch/compiled", True, 2.0),
    ("network/64: times as fast as torch/compiled", True, 1.5),
    ("network/64: share of the product's rate", True, 0.3),
    ("training/32: share of the product's rate", True, 0.3),
    ("deformable_res4 gradient: times its dense twin", False, 2.0),
    ("deformable_res5 gradient: times its dense twin", False, 2.0),
)
MODES = ("eager", "compiled", "graphs", "bf16")


def line(row: Row) -> str:
    """One row for a terminal."""
    if "fault" in row:
        return f"{row['name']:<40} FAILED {row['fault'][:150]}"
    keys = {
        "queued": "queued_ms",
        "resident": "resident_ms",
        "images/s": "images_per_s",
        "TFLOP/s": "tflops",
        "GB/s": "gb_per_s",
        "first s": "first_s",
        "peak MiB": "process_peak_mib",
    }
    cells = [f"{name} {row[key]:.4g}" for name, key in keys.items() if row.get(key) is not None]
    return f"{row['name']:<40} {row['p50_ms']:9.3f} ms  {', '.join(cells)}"


def figures(rows: Sequence[Row]) -> dict[str, float]:
    """Compute what no row says alone."""
    good = {name: row for name, row in gpu_rows.best(rows).items() if "fault" not in row}
    products = [row["tflops"] for name, row in good.items() if name.startswith("rates/product/")]
    copies = [row["gb_per_s"] for name, row in good.items() if name.startswith("rates/copy/")]
    rate, found = max(products, default=0.0), dict[str, float]()
    for name, row in good.items():
        for mode in MODES:
            if theirs := good.get(f"torch/{mode}/{name}"):
                found[f"{name}: times as fast as torch/{mode}"] = theirs["p50_ms"] / row["p50_ms"]
                for key in ("queued_ms", "resident_ms"):
                    if key in theirs and key in row:
                        label = f"{name}, {key[:-3]}: times as fast as torch/{mode}"
                        found[label] = theirs[key] / row[key]
                if row.get("process_peak_mib") and theirs.get("process_peak_mib"):
                    ratio = row["process_peak_mib"] / theirs["process_peak_mib"]
                    found[f"{name}: times the memory of torch/{mode}"] = ratio
        if rate and row.get("gflop") and not name.startswith("rates/"):
            found[f"{name}: share of the product's rate"] = row["tflops"] / rate
        if rate and copies and name.startswith("stage/"):
            least = max(row["gflop"] / rate, row["mib"] * 2**20 / max(copies) / 1e6)
            found[f"{name}: times the least"] = row["p50_ms"] / least
        if name.startswith("training/") and name.count("/") == 1:
            found[f"{name}: minutes for an epoch of COCO"] = COCO_IMAGES / row["images_per_s"] / 60
            if parts := row.get("parts"):
                waited = parts["matching_ms"] + parts["score_to_host_ms"]
                found[f"{name}: share of the step in host matching"] = waited / row["p50_ms"]
        if name.startswith("matching/") and (base := good.get("matching/none/8")):
            found[f"{name}: share beyond none"] = 1 - base["p50_ms"] / row["p50_ms"]
        _, _, kind = name.partition("op/deformable_")
        if "/deformable/" in kind and (twin := good.get(name.replace("/deformable/", "/dense/"))):
            label = kind.replace("/deformable/", " ")
            found[f"deformable_{label}: times its dense twin"] = row["p50_ms"] / twin["p50_ms"]
    return found


def text(rows: Sequence[Row], shown: Container[str]) -> str:
    """The table: the rows that are to be shown, what follows of all, the aims."""
    found = figures(rows)
    lines = [line(row) for name, row in gpu_rows.best(rows).items() if name in shown]
    lines += [f"{name}: {value:.4g}" for name, value in found.items() if not name.startswith("op/")]
    for figure, is_least, limit in AIMS:
        value, sign = found.get(figure), ">=" if is_least else "<="
        if value is None:
            lines.append(f"NOT MEASURED  {figure}, aim {sign} {limit:g}")
        else:
            is_met = value >= limit if is_least else value <= limit
            lines.append(
                f"{'met   ' if is_met else 'MISSED'}  {figure}: {value:.3g}, aim {sign} {limit:g}"
            )
    return "\n".join(lines)
