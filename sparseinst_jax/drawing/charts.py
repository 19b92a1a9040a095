"""Draw lines over axes and coloured matrices as pictures, with Pillow alone."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from sparseinst_jax.drawing import fonts
from sparseinst_jax.runtime.files import replace_file

COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#17becf", "#8c564b")
Series = Mapping[str, Sequence[tuple[float, float]]]

_CELL = 18  # smallest side of a matrix cell, pixels: a line of text fits beside it
_LARGEST_CELL = 60
_WIDEST = 2800  # pixels of all cells, where they grow
_TEXT = 13  # pixels
_LABEL_WIDTH = 170  # most pixels of a row's or column's name
_MARK_UP_TO = 30  # points of a line that are marked one by one
_FULL, _EMPTY = np.array([8, 64, 129]), np.array([255, 255, 255])


class Frame(NamedTuple):
    """Where a panel's axes lie.

    Attributes:
        size: (width, height) of the panel in pixels.
        margin: pixels left (numbers), top (title), right (legend), bottom (numbers, x label).
        text: height of the letters in pixels.
        x_range: values at the left and right end; None takes 0 to the largest, 1 at least.
        y_range: values at the bottom and top; None takes what the lines need, 0 included.
        num_ticks: about so many numbers along each axis.
    """

    size: tuple[int, int]
    margin: tuple[int, int, int, int]
    text: int = _TEXT
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    num_ticks: int = 5

    @property
    def inside(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of the axes."""
        left, top, right, bottom = self.margin
        return left, top, self.size[0] - right, self.size[1] - bottom


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers (1, 2 or 5 times a power of ten) from low to high."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** np.floor(np.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    first, last = np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9)
    return [float(i * step) + 0.0 for i in np.arange(first, last + 1)]  # + 0.0: never -0


def line_panel(
    title: str, series: Series, frame: Frame, x_label: str = "", legend: bool = True
) -> Image.Image:
    """Draw lines over axes.

    Args:
        title: written above the axes, cut where it is too long.
        series: name -> points (x, y).
        frame: sizes and ranges.
        x_label: written below the axes.
        legend: write each line's name and last value into the right margin.
    """
    image = Image.new("RGB", frame.size, "white")
    draw, font = ImageDraw.Draw(image), fonts.font_for([title, *series], frame.text)
    left, top, right, bottom = frame.inside
    title = fonts.shorten(fonts.drawable(title, font), font, frame.size[0] - left - 2)
    draw.text((left, max(2, top - 24)), title, fill="black", font=font)
    points = [point for line in series.values() for point in line]
    if not points:
        draw.text((left, top + 10), "no values", fill="black", font=font)
        return image
    x_low, x_high = frame.x_range or (0.0, max(1.0, *(x for x, _ in points)))
    y_low, y_high = frame.y_range or (min(0.0, *(y for _, y in points)), max(y for _, y in points))
    x_scale = (right - left) / (x_high - x_low)
    y_scale = (bottom - top) / max(y_high - y_low, 1e-12)

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (x - x_low) * x_scale, bottom - (y - y_low) * y_scale

    for y in nice_ticks(y_low, y_high, frame.num_ticks):
        height = place(x_low, y)[1]
        draw.line([(left, height), (right, height)], fill="#dddddd")
        draw.text((left - 6, height), f"{y:g}", fill="black", font=font, anchor="rm")
    for x in nice_ticks(x_low, x_high, frame.num_ticks):
        across = place(x, y_low)[0]
        draw.line([(across, bottom), (across, bottom + 4)], fill="black")
        draw.text((across, bottom + 7), f"{x:g}", fill="black", font=font, anchor="mt")
    draw.text(((left + right) / 2, bottom + 26), x_label, fill="black", font=font, anchor="mt")
    draw.line([(left, top), (left, bottom), (right, bottom)], fill="black")
    for index, line in enumerate(series.values()):
        _draw_line(draw, [place(x, y) for x, y in line], COLORS[index % len(COLORS)])
    if legend:
        texts = [f"{name} {line[-1][1]:.3g}" for name, line in series.items()]
        _draw_legend(draw, texts, (right + 12, top + 10), font)
    return image


def _draw_line(
    draw: ImageDraw.ImageDraw, placed: Sequence[tuple[float, float]], color: str
) -> None:
    draw.line(list(placed), fill=color, width=2)
    if len(placed) <= _MARK_UP_TO:  # show where the few values are, and a single one at all
        for x, y in placed:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=color)


def _draw_legend(
    draw: ImageDraw.ImageDraw, texts: Sequence[str], corner: tuple[int, int], font: fonts.Font
) -> None:
    for index, text in enumerate(texts):
        x, y = corner[0], corner[1] + 20 * index
        draw.line([(x, y), (x + 22, y)], fill=COLORS[index % len(COLORS)], width=3)
        draw.text((x + 28, y), fonts.drawable(text, font), fill="black", font=font, anchor="lm")


def legend_row(texts: Sequence[str], width: int) -> Image.Image:
    """Draw names beside samples of their line colours, in one row of `width` pixels."""
    image = Image.new("RGB", (width, _TEXT + 12), "white")
    draw, font, x = ImageDraw.Draw(image), fonts.font_for(texts, _TEXT), 10.0
    for index, text in enumerate(texts):
        draw.line([(x, 12), (x + 22, 12)], fill=COLORS[index % len(COLORS)], width=3)
        text = fonts.drawable(text, font)
        draw.text((x + 28, 12), text, fill="black", font=font, anchor="lm")
        x += 28 + font.getlength(text) + 24
    return image


def grid(panels: Sequence[Image.Image], columns: int) -> Image.Image:
    """Put panels of equal size into rows of so many columns."""
    width, height = panels[0].size
    rows = math.ceil(len(panels) / columns)
    image = Image.new("RGB", (width * columns, height * rows), "white")
    for index, panel in enumerate(panels):
        image.paste(panel, (index % columns * width, index // columns * height))
    return image


def below(pictures: Sequence[Image.Image]) -> Image.Image:
    """Put pictures below one another, aligned on the left."""
    width = max(picture.width for picture in pictures)
    image = Image.new("RGB", (width, sum(picture.height for picture in pictures)), "white")
    top = 0
    for picture in pictures:
        image.paste(picture, (0, top))
        top += picture.height
    return image


def text_line(text: str, width: int) -> Image.Image:
    """Draw one line of text, cut to `width` pixels."""
    image = Image.new("RGB", (width, _TEXT + 10), "white")
    font = fonts.font_for([text], _TEXT)
    shown = fonts.shorten(fonts.drawable(text, font), font, width - 20)
    ImageDraw.Draw(image).text((10, 5), shown, fill="black", font=font)
    return image


def matrix(
    counts: np.ndarray, row_names: Sequence[str], column_names: Sequence[str]
) -> Image.Image:
    """Draw a matrix of counts: the darker a cell, the larger its share of the row.

    A count is written where it fits its cell; zeros are left out. Cells grow with the counts as
    long as the picture does not become too wide, and are never smaller than a line of text, so that
    the names beside and above them do not overlap.

    Args:
        counts: int [rows, columns].
        row_names: written to the left.
        column_names: written above, turned by a quarter.
    """
    font = fonts.font_for([*row_names, *column_names], _TEXT)
    rows, columns = (
        [fonts.shorten(fonts.drawable(name, font), font, _LABEL_WIDTH) for name in names]
        for names in (row_names, column_names)
    )
    widest = math.ceil(font.getlength(str(int(counts.max(initial=0))))) + 6
    cell = max(_CELL, min(widest, _WIDEST // len(columns), _LARGEST_CELL))
    left = math.ceil(max(map(font.getlength, rows))) + 12
    top = math.ceil(max(map(font.getlength, columns))) + 12
    image = Image.new("RGB", (left + cell * len(columns) + 8, top + cell * len(rows) + 8), "white")
    draw = ImageDraw.Draw(image)
    for index, name in enumerate(columns):
        _draw_upright(image, name, font, (left + index * cell, top - 6), cell)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    for row, name in enumerate(rows):
        y = top + row * cell
        draw.text((left - 6, y + cell / 2), name, fill="black", font=font, anchor="rm")
        for column in range(len(columns)):
            x = left + column * cell
            part = float(share[row, column]) ** 0.6  # small shares must be seen too
            color = tuple(np.rint(_EMPTY + part * (_FULL - _EMPTY)).astype(int).tolist())
            draw.rectangle((x, y, x + cell, y + cell), fill=color, outline="#cccccc")
            text = str(int(counts[row, column]))
            if counts[row, column] and font.getlength(text) < cell:
                ink = "white" if part > 0.5 else "black"
                center = (x + cell / 2, y + cell / 2)
                draw.text(center, text, fill=ink, font=font, anchor="mm")
    return image


def _draw_upright(
    image: Image.Image, text: str, font: fonts.Font, foot: tuple[int, int], cell: int
) -> None:
    """Write a text from bottom to top, above the cell whose upper left corner is `foot`."""
    strip = Image.new("RGB", (math.ceil(font.getlength(text)) + 2, cell), "white")
    draw = ImageDraw.Draw(strip)
    draw.text((0, cell / 2), text, fill="black", font=font, anchor="lm")
    turned = strip.transpose(Image.Transpose.ROTATE_90)
    image.paste(turned, (foot[0], foot[1] - turned.height))


def save_png(picture: Image.Image, path: str | os.PathLike) -> None:
    """Write a picture whole or not at all."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    replace_file(path, buffer.getvalue())
