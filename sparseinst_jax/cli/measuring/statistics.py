"""What is said of repeated measurements: medians, percentiles, ratios and their spread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Times(NamedTuple):
    """Repeated timings of one thing, in milliseconds.

    Attributes:
      p50: the median.
      p90: nine of ten are at most so long (linear between two samples).
      mean: of all samples; published frame rates are 1000 / mean.
      least: the shortest.
      number: how many samples.
    """

    p50: float
    p90: float
    mean: float
    least: float
    number: int


def times(samples: Sequence[float]) -> Times:
    """Summarise timings in milliseconds; there must be at least one."""
    values = np.asarray(samples, np.float64)
    p50, p90 = np.percentile(values, [50, 90])
    return Times(float(p50), float(p90), float(values.mean()), float(values.min()), len(values))


class Ratio(NamedTuple):
    """How many times as fast one is as another, measured in alternating rounds.

    Attributes:
      median: of the rounds' ratios, each of them of the two medians of one round.
      least, most: the extreme rounds.
      of_medians: ratio of the two medians over all rounds.
    """

    median: float
    least: float
    most: float
    of_medians: float


def speed_ratio(theirs: Sequence[Sequence[float]], ours: Sequence[Sequence[float]]) -> Ratio:
    """Compare timings [rounds][samples] that were taken in turn; above 1 ours is faster.

    Raises:
      ValueError: the numbers of rounds differ, or there is none.
    """
    if len(theirs) != len(ours) or not ours:
        raise ValueError(f"expected as many rounds of both, got {len(theirs)} and {len(ours)}")
    rounds = [float(np.median(a) / np.median(b)) for a, b in zip(theirs, ours, strict=True)]
    overall = float(np.median(np.concatenate(theirs)) / np.median(np.concatenate(ours)))
    return Ratio(float(np.median(rounds)), min(rounds), max(rounds), overall)


def table(lines: Sequence[Sequence[str]], texts: int = 1) -> str:
    """Lay out cells in columns, the first line as a heading.

    Args:
      lines: the heading and the rows, of equal length.
      texts: how many columns from the left are text; numbers stand to the right.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < texts else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
