"""Draw losses and AP over steps as a PNG, with Pillow alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_PANEL_SIZE = (900, 340)  # (width, height) in pixels
_MARGIN = (70, 34, 170, 44)  # left (numbers), top (title), right (legend), bottom (steps)
_COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#17becf", "#8c564b")
_SMOOTHED_POINTS = 300  # a longer series is averaged down to so many

Series = Mapping[str, Sequence[tuple[float, float]]]


def draw_curves(rows: Sequence[Mapping[str, float | int]], path: Path) -> None:
    """Draw one panel of losses and, where there was an evaluation, one of AP.

    Args:
      rows: of the metrics file, each with `step`.
      path: of the PNG to write.
    """
    losses = _series(rows, lambda name: name.startswith("loss/"))
    scores = _series(rows, lambda name: name in ("AP", "AP50", "AP75"))
    panels = [
        _panel("Losses over steps", {k.removeprefix("loss/"): v for k, v in losses.items()}, None)
    ]
    if scores:
        panels.append(_panel("AP over steps", scores, (0.0, 1.0)))
    width, height = _PANEL_SIZE
    image = Image.new("RGB", (width, height * len(panels)), "white")
    for i, panel in enumerate(panels):
        image.paste(panel, (0, i * height))
    image.save(path)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers (1, 2 or 5 times a power of ten) from low to high."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** np.floor(np.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    first, last = np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9)
    return [float(i * step) + 0.0 for i in np.arange(first, last + 1)]  # + 0.0: never -0


def _series(rows: Sequence[Mapping[str, float | int]], wanted) -> Series:
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


def _panel(title: str, series: Series, y_range: tuple[float, float] | None) -> Image.Image:
    image = Image.new("RGB", _PANEL_SIZE, "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    left, top = _MARGIN[0], _MARGIN[1]
    right, bottom = _PANEL_SIZE[0] - _MARGIN[2], _PANEL_SIZE[1] - _MARGIN[3]
    draw.text((left, 10), title, fill="black", font=font)
    points = [point for line in series.values() for point in line]
    if not points:
        draw.text((left, top + 10), "no values", fill="black", font=font)
        return image
    x_high = max(x for x, _ in points)
    y_low, y_high = y_range or (min(0.0, min(y for _, y in points)), max(y for _, y in points))
    x_scale = (right - left) / max(x_high, 1.0)
    y_scale = (bottom - top) / max(y_high - y_low, 1e-12)

    def place(x: float, y: float) -> tuple[float, float]:
        return left + x * x_scale, bottom - (y - y_low) * y_scale

    for y in nice_ticks(y_low, y_high):
        height = place(0, y)[1]
        draw.line([(left, height), (right, height)], fill="#dddddd")
        draw.text((left - 8, height), f"{y:g}", fill="black", font=font, anchor="rm")
    for x in nice_ticks(0, x_high):
        across = place(x, y_low)[0]
        draw.line([(across, bottom), (across, bottom + 4)], fill="black")
        draw.text((across, bottom + 8), f"{x:g}", fill="black", font=font, anchor="mt")
    draw.text(((left + right) / 2, bottom + 26), "step", fill="black", font=font, anchor="mt")
    draw.line([(left, top), (left, bottom), (right, bottom)], fill="black")
    for i, (name, line) in enumerate(series.items()):
        color = _COLORS[i % len(_COLORS)]
        placed = [place(x, y) for x, y in line]
        draw.line(placed, fill=color, width=2)
        if len(placed) <= 30:  # few values: show where they are, and a single one at all
            for x, y in placed:
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=color)
        legend_y = top + 10 + 20 * i
        draw.line([(right + 12, legend_y), (right + 34, legend_y)], fill=color, width=3)
        draw.text(
            (right + 40, legend_y),
            f"{name} {line[-1][1]:.3g}",
            fill="black",
            font=font,
            anchor="lm",
        )
    return image
