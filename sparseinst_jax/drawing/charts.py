"""Charts of a training run and of an evaluation, by matplotlib.

matplotlib is imported when a chart is drawn. Only its objects are used, never `pyplot`: no backend
is chosen, no window opened and no setting of the process changed.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ImageFont

from sparseinst_jax.drawing import fonts
from sparseinst_jax.runtime.files import replace_file
from sparseinst_jax.runtime.messages import in_percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#17becf", "#8c564b")
_DPI = 100
_SMALL, _TEXT = 8, 10  # points
_MOST_POINTS = 2000  # of a line; a longer one is averaged down to this number
_MARK_UP_TO = 60  # points of a line that are marked one by one
_LABEL_WIDTH = 170  # most pixels of a row's or column's name
_CELL, _LARGEST_CELL, _WIDEST = 18, 60, 2800  # pixels: sides of a matrix's cell; all its columns


def training_curves(rows: Sequence[Mapping[str, float | int]]) -> Figure:
    """Draw losses, AP (where there was an evaluation) and the learning rate over the steps.

    A loss is drawn twice: faint as it is, and as the mean of the steps around each; the axis fits
    the means, so that one spike does not flatten the rest.

    Args:
        rows: of `metrics.csv`, each with `step`. Values that are not finite are left out.
    """
    from matplotlib.figure import Figure

    losses = _series(rows, lambda name: name.startswith("loss/"))
    scores = _series(rows, lambda name: name in ("AP", "AP50", "AP75"))
    rates = _series(rows, lambda name: name == "learning_rate")
    heights = [3.4, *[3.0] * bool(scores), *[1.5] * bool(rates)]
    figure = Figure((9, sum(heights)), dpi=_DPI, layout="constrained")
    axes = list(
        figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    )
    axes[-1].set_xlabel("step", fontsize=_TEXT)
    panel = axes.pop(0)
    panel.set_ylabel("loss", fontsize=_TEXT)
    top = 0.0
    for index, (name, line) in enumerate(losses.items()):
        colour, mean = COLOURS[index % len(COLOURS)], _smoothed(line[:, 1])
        top = max(top, float(mean.max()))
        panel.plot(*line.T, color=colour, linewidth=0.8, alpha=0.25)
        label = f"{name.removeprefix('loss/')} {mean[-1]:.3g}"
        _plot(panel, np.stack([line[:, 0], mean], 1), label, colour)
    if not losses:
        panel.text(0.5, 0.5, "no values", ha="center", va="center", transform=panel.transAxes)
    _finish(panel, top)
    if scores:
        panel = axes.pop(0)
        panel.set_ylabel("mask AP, percent", fontsize=_TEXT)
        for (name, line), colour in zip(scores.items(), COLOURS, strict=False):
            _plot(panel, line * (1, 100), f"{name} {in_percent(line[-1, 1])}", colour)
        if "AP" in scores:
            step, best = max(scores["AP"].tolist(), key=lambda point: point[1])
            panel.axvline(step, color="#999999", linewidth=0.8, linestyle=":")
            title = f"best AP {in_percent(best)} at step {step:g}"
            panel.set_title(title, loc="left", fontsize=_TEXT)
        _finish(panel, 100 * max(float(line[:, 1].max()) for line in scores.values()), most=100.0)
    if rates:
        (line,) = rates.values()
        axes[0].set_ylabel("learning rate", fontsize=_TEXT)
        _plot(axes[0], line, f"now {line[-1, 1]:.3g}", COLOURS[0], marked=False)
        axes[0].ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        _finish(axes[0], float(line[:, 1].max()))
    return figure


def precision_recall(
    panels: Sequence[tuple[str, Mapping[str, np.ndarray]]], note: str, small: bool
) -> Figure:
    """Draw precision over recall, a panel for each class.

    Args:
        panels: title, and for each name of a curve the precision at equally spaced recalls 0...1.
        note: written above all panels.
        small: six panels in a row instead of two.
    """
    from matplotlib.figure import Figure

    columns = min(6 if small else 2, max(len(panels), 2))
    rows, side = -(-len(panels) // columns), 2.4 if small else 4.0
    size = _TEXT if small else _TEXT + 1
    figure = Figure((columns * side, rows * side), dpi=_DPI)
    space = dict(left=0, right=1, bottom=0, top=1, wspace=0.62 / side, hspace=0.95 / side)
    shape: dict[str, Any] = dict(nrows=rows, ncols=columns, sharex=True, sharey=True, squeeze=False)
    grid = figure.subplots(**shape, gridspec_kw=space)
    grid[0, 0].set(xlim=(0, 1), ylim=(0, 1.03))  # of all of them: they share their axes
    ticks = (0, 0.5, 1) if small else (0, 0.2, 0.4, 0.6, 0.8, 1)
    grid[0, 0].set_xticks(ticks, [f"{100 * tick:g}" for tick in ticks])
    grid[0, 0].set_yticks(ticks, [f"{100 * tick:g}" for tick in ticks])
    titles, font = _shown([title for title, _ in panels], 94 * side, size + 1)
    for place, axes in enumerate(grid.flat):
        if place >= len(panels):
            axes.remove()
            continue
        widths = (4.0, 2.4, 1.2)  # where lines coincide all of them are seen
        named = zip(panels[place][1].items(), COLOURS, widths, strict=False)
        for (name, curve), colour, line in named:
            recalls = np.linspace(0.0, 1.0, len(curve))
            axes.plot(recalls, curve, color=colour, linewidth=line, label=name)
        axes.set_title(titles[place], font=font, loc="left", parse_math=False, pad=4)
        _tidy(axes, size)
        axes.tick_params(labelbottom=True, labelleft=True)
        axes.set_xlabel("recall, percent", fontsize=size, labelpad=2)
        if place % columns == 0:
            axes.set_ylabel("precision, percent", fontsize=size)
    height = rows * side
    figure.text(0, 1 + 0.65 / height, note, fontsize=_TEXT, va="bottom")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    anchor: dict[str, Any] = dict(
        loc="lower left", bbox_to_anchor=(0, 1 + 0.3 / height), borderaxespad=0
    )
    figure.legend(handles, labels, ncols=3, fontsize=_TEXT, frameon=False, borderpad=0, **anchor)
    return figure


def matrix(counts: np.ndarray, names: Sequence[str], ids: Sequence[int], notes: str) -> Figure:
    """Draw a matrix of counts: the darker a cell, the larger its share of the row.

    A count is written where it fits its cell; zeros are left out. Cells grow with the counts as
    long as the picture does not become too wide, and are never smaller than a line of text, so that
    the names beside and above them do not overlap.

    Args:
        counts: int [K, K]; rows are annotated, columns predicted.
        names: of the rows and of the columns.
        ids: shown instead of names that no font can show.
        notes: lines written above.
    """
    from matplotlib.figure import Figure

    number = len(names)
    shown, font = _shown(names, _LABEL_WIDTH, _TEXT, ids)
    digits = 7 * len(str(int(counts.max(initial=0)))) + 8
    cell = max(_CELL, min(digits, _WIDEST // number, _LARGEST_CELL))
    side = cell * number / _DPI
    figure = Figure((side, side), dpi=_DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    # Small shares must be seen too.
    share = (counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)) ** 0.6
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    every = np.arange(number)
    axes.set_xticks(every, shown, rotation=90, font=font, parse_math=False)
    axes.set_yticks(every, shown, font=font, parse_math=False)
    axes.tick_params(length=0, pad=5, top=False, labeltop=True, bottom=False, labelbottom=False)
    axes.set_xticks(np.arange(number + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(number + 1) - 0.5, minor=True)
    axes.tick_params(which="minor", length=0)
    axes.grid(which="minor", color="#d0d0d0", linewidth=0.6)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted", fontsize=_TEXT, fontweight="bold")
    axes.set_ylabel("annotated", fontsize=_TEXT, fontweight="bold")
    axes.xaxis.set_label_position("top")
    for row, column in np.argwhere(counts):
        text = str(int(counts[row, column]))
        if 6.2 * len(text) <= cell:
            ink = "white" if share[row, column] > 0.5 else "black"
            at: dict[str, Any] = dict(ha="center", va="center", fontsize=_SMALL, color=ink)
            axes.text(column, row, text, gid=f"{row},{column}", **at)
    axes.set_title(notes, loc="left", fontsize=_TEXT, pad=10)
    return figure


def save(figure: Figure, path: str | os.PathLike) -> None:
    """Write a chart as PNG, whole or not at all, cut to what is drawn."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.15)
    replace_file(path, buffer.getvalue())


def _series(rows: Sequence[Mapping[str, float | int]], wanted: Any) -> dict[str, np.ndarray]:
    """Name -> finite points (step, value), float64 [points, 2]."""
    found = {}
    for name in dict.fromkeys(name for row in rows for name in row if wanted(name)):
        points = np.array([(row["step"], row[name]) for row in rows if name in row], float)
        points = points[np.isfinite(points).all(axis=1)]
        if len(points) > _MOST_POINTS:
            parts = np.array_split(points, _MOST_POINTS)
            points = np.array([part.mean(axis=0) for part in parts])
        if len(points):
            found[name] = points
    return found


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Mean of the values around each: a twenty-fifth of all of them, fewer at the ends."""
    reach = len(values) // 50
    sums = np.concatenate([[0.0], np.cumsum(values)])
    every = np.arange(len(values))
    first, end = np.maximum(every - reach, 0), np.minimum(every + reach + 1, len(values))
    return (sums[end] - sums[first]) / (end - first)


def _plot(axes: Axes, line: np.ndarray, label: str, colour: str, marked: bool = True) -> None:
    """Draw a line; few values are marked, so that a single one is seen at all."""
    marker = "o" if marked and len(line) <= _MARK_UP_TO else None
    axes.plot(*line.T, label=label, color=colour, linewidth=1.8, marker=marker, markersize=4)


def _finish(axes: Axes, top: float, most: float = float("inf")) -> None:
    """Fit the axis to values of 0...top and write the legend beside it."""
    if top > 0:
        axes.set_ylim(0, min(1.08 * top, max(most, top)))
    _tidy(axes, _TEXT)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=_TEXT, frameon=False)


def _tidy(axes: Axes, size: int) -> None:
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=size, length=3, color="#888888")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#888888")


def _shown(
    names: Sequence[str], width: float, size: int, ids: Sequence[int] | None = None
) -> tuple[list[str], Any]:
    """Cut names to `width` pixels, and choose a font that has their characters.

    Returns:
        The names as they are drawn, and matplotlib's properties of the font.
    """
    from matplotlib import get_data_path
    from matplotlib.font_manager import FontProperties

    own = os.path.join(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    pixels = round(size * _DPI / 72)
    font = fonts.font_for(names, pixels, ImageFont.truetype(own, pixels))
    shown = fonts.labels(names, ids, font) if ids else [fonts.drawable(n, font) for n in names]
    properties = FontProperties(fname=getattr(font, "path", own), size=size)
    return [fonts.shorten(name, font, width) for name in shown], properties
