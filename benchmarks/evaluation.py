"""COCO's twelve numbers of drawn detections, by pycocotools and by us, alternately.

    python benchmarks/evaluation.py --images 5000

Prints how many times as fast ours is (median of the rounds, with the extremes) and the largest
difference of the numbers, which should be 0.
"""

import argparse
import contextlib
import io
import json
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sparseinst_jax.cli.measuring import host_work, machine
from sparseinst_jax.cli.measuring.timing import speed_ratio


def compare(content: dict[str, Any], results: list[dict[str, Any]], rounds: int) -> dict[str, Any]:
    """Score with pycocotools and with ours alternately; plain values, milliseconds."""
    workload = host_work.scores(content, results)
    theirs, ours, difference = [], [], 0.0
    for _ in range(rounds):
        copies = [dict(entry) for entry in results]  # `loadRes` writes into them
        start = time.perf_counter()
        numbers = with_pycocotools(content, copies).stats
        between = time.perf_counter()
        metrics = workload.run()
        ours.append([1e3 * (time.perf_counter() - between)])
        theirs.append([1e3 * (between - start)])
        own = np.array(list(metrics.values.values()))  # the twelve, in pycocotools' order
        difference = max(difference, float(np.abs(own - numbers).max()))
    medians = {"ours_ms": float(np.median(ours)), "pycocotools_ms": float(np.median(theirs))}
    ratio = speed_ratio(theirs, ours)._asdict()
    return {**medians, "ratio": ratio, "largest_difference": difference}


def with_pycocotools(content: Mapping[str, Any], results: list[dict[str, Any]]) -> Any:
    """Score as pycocotools' own examples do, without a print; returns its `COCOeval`.

    Args:
        content: of an annotation file; `id` from 1 on, `area` and `iscrowd` given.
        results: detections without boxes; pycocotools writes into them.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        truth: Any = COCO()
        entries = [dict(entry) for entry in content["annotations"]]
        truth.dataset = {**content, "annotations": entries}
        truth.createIndex()
        found: Any = truth.loadRes(results) if results else COCO()
        evaluation = COCOeval(truth, found, iouType="segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    found = compare(*host_work.drawn_results((480, 640), given.images, 8), given.rounds)
    print(json.dumps({"command": machine.command(), **found, "machine": machine.describe()}))
