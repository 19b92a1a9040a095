"""What follows from the parts of gpu.py: ratios, shares, an epoch's hours, and the aims.

Pure arithmetic on the report; what was not measured is left out, and its aim says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

COCO_IMAGES = 117_266  # of train2017 with an object
MODES = ("eager", "compiled")
BASE_FORM = "none"  # of matching_forms.py: nothing is matched


class Aim(NamedTuple):
    """What a figure should reach.

    Attributes:
      figure: its name.
      is_least: whether `limit` is the least that is wanted, or the most.
      limit: number.
    """

    figure: str
    is_least: bool
    limit: float


def conclude(parts: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries `figures` and `aims` of the report."""
    found = figures(parts)
    verdicts = []
    for aim in aims(found, settings):
        value = found.get(aim.figure)
        reached = None
        if value is not None:
            reached = value >= aim.limit if aim.is_least else value <= aim.limit
        verdicts.append({**aim._asdict(), "value": value, "is_met": reached})
    return {"figures": found, "aims": verdicts}


def aims(found: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[Aim]:
    """List what is aimed at."""
    trained, batches = settings["train_batches"], settings["batches"]
    for batch in (trained[0], trained[-1]):
        yield Aim(f"training, batch {batch}: times as fast as compiled", True, 1.5)
    for work in ("network", "inference"):
        yield Aim(f"{work}, batch 1: times the time of compiled", False, 0.5)
        for batch in batches[-2:]:
            yield Aim(f"{work}, batch {batch}: times as fast as compiled", True, 1.5)
    most = trained[-1]
    yield Aim(f"network, batch {most}: share of the matrix product's rate", True, 0.3)
    yield Aim(f"training, batch {most}: share of the matrix product's rate", True, 0.3)
    measured = [name for name in found if name.startswith("deformable, ")]
    for name in measured or ["deformable: times its dense twin"]:
        yield Aim(name, False, 2.0)


def figures(parts: Mapping[str, Any]) -> dict[str, float]:
    """Compute what no part says alone, in the order of the report."""
    results = {name: part["result"] for name, part in parts.items() if part["result"]}
    ours, theirs = our_rows(results), their_rows(results)
    found: dict[str, float] = {}
    for (work, batch), row in ours.items():
        found |= _of_one(f"{work}, batch {batch}", row)
    found |= _further_images("ours", ours)
    for mode in MODES:
        rows = {(work, batch): row for (work, batch, m), row in theirs.items() if m == mode}
        found |= _further_images(f"PyTorch {mode}", rows)
        for key in rows.keys() & ours.keys():
            found |= _against(f"{key[0]}, batch {key[1]}", mode, ours[key], rows[key])
    found |= _training(ours)
    if roof := results.get("roofline"):
        found |= _utilisation(roof, ours)
    found |= _matching(results)
    for row in (results.get("deformable") or {"rows": []})["rows"]:
        if row["alternative"] == "version 2":
            found[f"deformable, {row['what']}: times its dense twin"] = row["ratio"]
    return found


def our_rows(results: Mapping[str, Any]) -> dict[tuple[str, int], Mapping[str, Any]]:
    """Find our measurements by work, in PyTorch's words, and batch."""
    works = {"network": "network", "with_masks": "inference"}
    found = {}
    for part in results:
        if part.startswith(("latency", "throughput", "training")):
            for row in results[part]["results"]:
                kind, _, rest = row["name"].partition("/")
                word = rest.partition("/")[0]
                work = {"post": "post-processing", "training": "training"}.get(kind)
                if work := work or works.get(word):
                    found[work, row["images"]] = row
    return found


def their_rows(results: Mapping[str, Any]) -> dict[tuple[str, int, str], Mapping[str, Any]]:
    """Find PyTorch's measurements by work, batch and mode."""
    found = {}
    for part in results:
        if part.startswith("torch/"):
            for row in results[part]["results"]:
                if "fault" not in row:
                    work, batch, mode = row["name"].split("/")
                    found[work, int(batch), mode] = row
    return found


def _of_one(name: str, row: Mapping[str, Any]) -> dict[str, float]:
    found = {f"{name}: ms": row["p50_ms"], f"{name}: images/s": row["images_per_s"]}
    if row["peak_device_mib"] is not None:
        found[f"{name}: MiB an image, weights included"] = row["peak_device_mib"] / row["images"]
    return found


def _against(
    name: str, mode: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]
) -> dict[str, float]:
    found = {
        f"{name}: times as fast as {mode}": theirs["p50_ms"] / ours["p50_ms"],
        f"{name}: times the time of {mode}": ours["p50_ms"] / theirs["p50_ms"],
    }
    if ours["peak_device_mib"] is not None and theirs["peak_device_mib"]:
        memory = ours["peak_device_mib"] / theirs["peak_device_mib"]
        found[f"{name}: times the memory of {mode}"] = memory
    return found


def _further_images(
    whose: str, rows: Mapping[tuple[str, int], Mapping[str, Any]]
) -> dict[str, float]:
    """Memory that one more image takes, from the two largest batches of each work."""
    found = {}
    for work in ("network", "training"):
        peaks = sorted(
            (batch, row["peak_device_mib"])
            for (name, batch), row in rows.items()
            if name == work and row["peak_device_mib"] is not None
        )
        if len(peaks) > 1:
            (fewer, small), (more, large) = peaks[-2:]
            slope = (large - small) / (more - fewer)
            found[f"{work}, {whose}: MiB for each further image"] = slope
    return found


def _training(ours: Mapping[tuple[str, int], Mapping[str, Any]]) -> dict[str, float]:
    """An epoch, and the matching's share of the step."""
    found = {}
    for (work, batch), row in ours.items():
        if work != "training":
            continue
        name = f"training, batch {batch}"
        found[f"{name}: minutes for an epoch of COCO"] = COCO_IMAGES / row["images_per_s"] / 60
        if row["peak_device_mib"] is not None:
            found[f"{name}: GiB at most"] = row["peak_device_mib"] / 1024
        if "parts" in row:
            host = row["parts"]["matching_ms"] + row["parts"]["score_to_host_ms"]
            found[f"{name}: share of the step in host matching"] = host / row["p50_ms"]
    return found


def _utilisation(
    roof: Mapping[str, Any], ours: Mapping[tuple[str, int], Mapping[str, Any]]
) -> dict[str, float]:
    """Operations per second of the network over those of a matrix product."""
    rate = roof["rates"]["flops"] / 1e9
    found = {"matrix product: TFLOP/s": rate / 1e3}
    (whole,) = [row["gflops"] for row in roof["stages"] if row["name"] == "whole network"] or [0.0]
    per_image = whole / roof["settings"]["batch"]
    if per_image:
        found["network: GFLOP an image"] = per_image
        for (work, batch), row in ours.items():
            # A training step is a forward pass and two backward, of inputs and of weights.
            if times := {"network": 1, "training": 3}.get(work):
                share = times * per_image * row["images_per_s"] / rate
                found[f"{work}, batch {batch}: share of the matrix product's rate"] = share
    return found


def _matching(results: Mapping[str, Any]) -> dict[str, float]:
    """Each form's step, and which part of it goes to the matching.

    Each beside the step without matching of its own process, as none other is like it.
    """
    found: dict[str, float] = {}
    for part in results:
        if part.partition("/")[0] == "matching":
            forms = {row["name"]: row["p50_ms"] for row in results[part]["rows"]}
            base = forms.get(BASE_FORM)
            for name, ms in forms.items():
                found.setdefault(f"step, matching {name}: ms", ms)
                if base and name != BASE_FORM:
                    found[f"step, matching {name}: share beyond none"] = 1 - base / ms
    return found


def best_form(found: Mapping[str, float]) -> str:
    """Name the way to match that adds least to the step; "" if none was measured."""
    start, end = "step, matching ", ": share beyond none"
    forms = {
        name[len(start) : -len(end)]: share
        for name, share in found.items()
        if name.startswith(start) and name.endswith(end)
    }
    return min(forms, key=lambda name: forms[name], default="")


def text(report: Mapping[str, Any]) -> str:
    """The figures, the aims and what failed, for a terminal."""
    lines = [f"{name}: {value:.4g}" for name, value in report["figures"].items()]
    if best := best_form(report["figures"]):
        lines.append(f"fastest matching: {best}")
    lines += [describe(aim) for aim in report["aims"]]
    lines += failures(report["parts"])
    return "\n".join(lines)


def describe(aim: Mapping[str, Any]) -> str:
    """One line on an aim."""
    sign = ">=" if aim["is_least"] else "<="
    if aim["value"] is None:
        return f"NOT MEASURED  {aim['figure']}, aim {sign} {aim['limit']:g}"
    word = "met   " if aim["is_met"] else "MISSED"
    return f"{word}  {aim['figure']}: {aim['value']:.3g}, aim {sign} {aim['limit']:g}"


def failures(parts: Mapping[str, Any]) -> Sequence[str]:
    """Say what went wrong in which part, at which point of PyTorch's, in which form."""
    lines = [f"FAILED  {name}: {part['fault']}" for name, part in parts.items() if part["fault"]]
    for name, part in parts.items():
        for row in (part["result"] or {}).get("results", []):
            if "fault" in row:
                lines.append(f"FAILED  {name}, {row['name']}: {row['fault']}")
        for form, fault in (part["result"] or {}).get("faults", {}).items():
            lines.append(f"FAILED  {name}, {form}: {fault}")
    return lines
