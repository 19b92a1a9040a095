"""Draw losses and AP over steps as a PNG, with Pillow alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sparseinst_jax.drawing import charts

_FRAME = charts.Frame(size=(900, 340), margin=(70, 34, 170, 44))
_SMOOTHED_POINTS = 300  # a longer series is averaged down to so many


def draw_curves(rows: Sequence[Mapping[str, float | int]], path: Path) -> None:
    """Draw one panel of losses and, where there was an evaluation, one of AP.

    Args:
      rows: of the metrics file, each with `step`.
      path: of the PNG to write.
    """
    losses = _series(rows, lambda name: name.startswith("loss/"))
    scores = _series(rows, lambda name: name in ("AP", "AP50", "AP75"))
    losses = {name.removeprefix("loss/"): line for name, line in losses.items()}
    panels = [charts.line_panel("Losses over steps", losses, _FRAME, "step")]
    if scores:
        frame = _FRAME._replace(y_range=(0.0, 1.0))
        panels.append(charts.line_panel("AP over steps", scores, frame, "step"))
    charts.grid(panels, columns=1).save(path)


def _series(rows: Sequence[Mapping[str, float | int]], wanted) -> charts.Series:
    names = dict.fromkeys(name for row in rows for name in row if wanted(name))
    found = {}
    for name in names:
        points = np.array([(row["step"], row[name]) for row in rows if name in row], float)
        points = points[np.isfinite(points).all(axis=1)]
        if len(points) > _SMOOTHED_POINTS:
            parts = np.array_split(points, _SMOOTHED_POINTS)
            points = np.array([part.mean(axis=0) for part in parts])
        if len(points):
            found[name] = [(float(x), float(y)) for x, y in points]
    return found
