"""What follows from the rows of gpu.py: ratios, shares of the machine's rate, stages, the aims.

Pure arithmetic; what was not measured is left out, and its aim says so.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

import gpu_rows

Row = Mapping[str, Any]
COCO_IMAGES = 117_266  # of train2017 with an object
MODES = ("eager", "compiled", "graphs", "bf16")
# Named tensors of the network: the module that ends in each, and the tensor that it begins with.
STAGES = {
    "stem": ("backbone/stem", ""),
    "res2": ("backbone/res2", "stem"),
    "res3": ("backbone/res3", "res2"),
    "res4": ("backbone/res4", "res3"),
    "res5": ("backbone/res5", "res4"),
    "encoder": ("encoder", "res5"),
    "inst_convs": ("decoder/inst_branch/inst_convs", "encoder"),
    "iam": ("decoder/inst_branch/iam_conv", "inst_convs"),
    "instance_features": ("decoder/inst_branch/fc", "iam"),
    "mask_features": ("decoder/mask_branch", "encoder"),
}
_TIMES = "{}: times as fast as torch/compiled"
_SHARE = "{}: share of the product's rate"
AIMS = (  # figure, whether the limit is the least that is wanted, limit
    (_TIMES.format("training/8"), True, 1.5),
    (_TIMES.format("training/32"), True, 1.5),
    (_TIMES.format("network/1"), True, 2.0),
    (_TIMES.format("with_masks/1"), True, 2.0),
    (_TIMES.format("network/64"), True, 1.5),
    (_SHARE.format("network/64"), True, 0.3),
    (_SHARE.format("training/32"), True, 0.3),
    ("deformable_res4/grad: times its dense twin", False, 2.0),
    ("deformable_res5/grad: times its dense twin", False, 2.0),
)


def figures(rows: Sequence[Row]) -> dict[str, float]:
    """Compute what no row says alone."""
    good = {name: row for name, row in gpu_rows.best(rows).items() if "fault" not in row}
    rate = max((r["tflops"] for n, r in good.items() if n.startswith("rates/product")), default=0)
    found: dict[str, float] = {}
    for name, row in good.items():
        for mode in MODES:
            if theirs := good.get(f"torch/{mode}/{name.removesuffix('/cached')}"):
                found |= _against(f"{{}}: times {{}} torch/{mode}", name, row, theirs)
        work, _, rest = name.partition("/")
        if rate and work in ("network", "training", "with_masks") and row.get("gflop"):
            least = min(row[key] for key in ("p50_ms", "queued_ms", "resident_ms") if key in row)
            found[_SHARE.format(name)] = row["gflop"] / least / rate
        if work == "training" and "parts" in row:
            found[f"{name}: minutes for an epoch of COCO"] = COCO_IMAGES / row["images_per_s"] / 60
            waited = row["parts"]["matching_ms"] + row["parts"]["score_to_host_ms"]
            found[f"{name}: share of the step in host matching"] = waited / row["p50_ms"]
        if work == "matching" and (none := good.get(f"matching/none/{name.rpartition('/')[2]}")):
            found[f"{name}: share beyond none"] = 1 - none["p50_ms"] / row["p50_ms"]
        if work == "stage":
            batch, stage, way = rest.split("/")
            before = good.get(f"stage/{batch}/{STAGES[stage][1]}/{way}", {"p50_ms": 0.0})
            own = row["p50_ms"] - before["p50_ms"]
            found[f"{name}: own ms"] = own
            if rate and own > 0:
                found[_SHARE.format(name)] = row["own_gflop"] / own / rate
        if "/deformable/" in name and (twin := good.get(name.replace("/deformable/", "/dense/"))):
            label = rest.replace("/deformable/", "/")
            found[f"{label}: times its dense twin"] = row["p50_ms"] / twin["p50_ms"]
    return found


def _against(form: str, name: str, row: Row, theirs: Row) -> dict[str, float]:
    """Compare a row of ours with PyTorch's; that of a cached program is for its memory."""
    is_cached = name.endswith("/cached")
    memory = "steady_peak_mib" if is_cached else "peak_mib"
    found = {}
    for key in () if is_cached else ("p50_ms", "queued_ms", "resident_ms"):
        if key in row and key in theirs:
            label = name if key == "p50_ms" else f"{name}, {key[:-3]}"
            found[form.format(label, "as fast as")] = theirs[key] / row[key]
    if row.get("peak_mib") and theirs.get(memory):
        found[form.format(name, "the memory of")] = row["peak_mib"] / theirs[memory]
    return found


def is_met(value: float | None, is_least: bool, limit: float) -> bool | None:
    """Whether an aim is reached; None where nothing was measured."""
    if value is None:
        return None
    return value >= limit if is_least else value <= limit


def text(rows: Sequence[Row], shown: Container[str]) -> str:
    """The table: the rows that are to be shown, what follows of all, the aims."""
    found = figures(rows)
    lines = [gpu_rows.line(dict(r)) for n, r in gpu_rows.best(rows).items() if n in shown]
    lines += [f"{name}: {value:.4g}" for name, value in found.items()]
    words = {True: "met   ", False: "MISSED", None: "NOT MEASURED"}
    for figure, is_least, limit in AIMS:
        value, sign = found.get(figure), ">=" if is_least else "<="
        shown_value = "" if value is None else f": {value:.3g}"
        word = words[is_met(value, is_least, limit)]
        lines.append(f"{word}  {figure}{shown_value}, aim {sign} {limit:g}")
    return "\n".join(lines)
