"""Pictures of masks on images, with outlines and captions, by Pillow and NumPy.

Every instance has a colour of its own, the same in every run: hues a golden angle apart, so that
neighbours in the list never look alike. Small images are enlarged so that the text can be read.
"""

from __future__ import annotations

import colorsys
import io
import math
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from sparseinst_jax.drawing import fonts
from sparseinst_jax.runtime.files import replace_file

MASK_OPACITY = 0.45
# Pictures with a long side below this are enlarged by a whole factor.
READABLE_SIDE = 512
MAX_ENLARGEMENT = 6
GOLDEN_RATIO = (math.sqrt(5.0) - 1.0) / 2.0
# (lightness, saturation). Five of them: hues come near after 8, 13, 21 or 34 colours, none of which
# is a multiple of five, so that near hues always differ in tone.
TONES = ((0.55, 0.95), (0.40, 0.85), (0.72, 0.90), (0.48, 0.70), (0.62, 0.80))
Box = tuple[int, int, int, int]
Colour = tuple[int, int, int]


def instance_colour(index: int) -> Colour:
    """Return the RGB colour (0...255) of instance `index`, always the same."""
    hue = (0.02 + index * GOLDEN_RATIO) % 1.0
    lightness, saturation = TONES[index % len(TONES)]
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, saturation)
    return round(255 * red), round(255 * green), round(255 * blue)


def enlargement(size: tuple[int, int], readable_side: int = READABLE_SIDE) -> int:
    """Choose the whole factor that makes text on an image of (height, width) readable."""
    return max(1, min(MAX_ENLARGEMENT, math.ceil(readable_side / max(size)) if max(size) else 1))


def contour(mask: np.ndarray, width: int) -> np.ndarray:
    """Mark the pixels of a mask within `width` pixels of its outside: bool [h, w].

    The border of the image counts as outside, so that cut objects are closed.
    """
    inner = mask
    for _ in range(width):
        padded = np.pad(inner, 1)
        inner = inner & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def mask_bounds(mask: np.ndarray) -> Box | None:
    """Enclose a mask: x0, y0, x1, y1 with exclusive ends, or None where it is empty."""
    rows = np.flatnonzero(mask.any(axis=1))
    if not rows.size:
        return None
    columns = np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def draw_instances(
    image: np.ndarray,
    masks: Sequence[np.ndarray] | np.ndarray,
    captions: Sequence[str],
    colours: Sequence[Colour] | None = None,
    readable_side: int = READABLE_SIDE,
) -> Image.Image:
    """Draw instances over an image.

    Args:
        image: uint8 [h, w, 3], RGB.
        masks: bool [D, h, w]; the first is drawn on top. Empty masks are left out.
        captions: D strings; an empty one draws no label.
        colours: D colours, RGB 0...255; by default each instance has one of its own.
        readable_side: pixels; an image with a shorter long side is enlarged.

    Returns:
        The picture, RGB; larger than the image by a whole factor where the image is small.
    """
    factor = enlargement(image.shape[:2], readable_side)
    height, width = image.shape[0] * factor, image.shape[1] * factor
    base = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    canvas = np.asarray(base, np.float32).copy()
    line = max(1, round(min(height, width) / 320))
    colours = colours or [instance_colour(index) for index in range(len(masks))]
    bounds: list[Box | None] = []
    for mask in masks:
        box = mask_bounds(mask)
        bounds.append(None if box is None else tuple(side * factor for side in box))  # type: ignore[misc]
    for index in reversed(range(len(bounds))):
        box = bounds[index]
        if box is None:
            continue
        left, top, right, bottom = box
        part = masks[index][top // factor : bottom // factor, left // factor : right // factor]
        part = part.repeat(factor, axis=0).repeat(factor, axis=1)
        colour = np.asarray(colours[index], np.float32)
        view = canvas[top:bottom, left:right]
        view[part] = (1.0 - MASK_OPACITY) * view[part] + MASK_OPACITY * colour
        view[contour(part, line)] = colour
    picture = Image.fromarray(np.rint(canvas).astype(np.uint8))
    _draw_captions(picture, bounds, captions, colours)
    return picture


def font_of(size: tuple[int, int], texts: Sequence[str] = ()) -> fonts.Font:
    """Load a font with the characters of the texts, fitting a picture of (height, width)."""
    return fonts.font_for(texts, max(12, round(min(size) / 36)))


def _draw_captions(
    picture: Image.Image,
    bounds: Sequence[Box | None],
    captions: Sequence[str],
    colours: Sequence[Colour],
) -> None:
    """Write each caption beside its box, on its colour, away from the captions before it.

    A caption that finds no free place is left out: one over another could not be read.
    """
    draw = ImageDraw.Draw(picture)
    font = font_of((picture.height, picture.width), captions)
    taken: list[Box] = []
    for box, caption, colour in zip(bounds, captions, colours, strict=True):
        if box is None or not caption:
            continue
        caption = fonts.shorten(fonts.drawable(caption, font), font, picture.width - 6)
        left, top, right, bottom = draw.textbbox((0, 0), caption, font=font)
        size = (math.ceil(right - left) + 6, math.ceil(bottom - top) + 6)
        place = _free_place(box, size, (picture.width, picture.height), taken)
        if place is None:
            continue
        taken.append(place)
        draw.rectangle((place[0], place[1], place[2] - 1, place[3] - 1), fill=colour)
        dark = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
        draw.text(
            (place[0] + 3 - left, place[1] + 3 - top),
            caption,
            fill=(0, 0, 0) if dark else (255, 255, 255),
            font=font,
        )


def _free_place(
    box: Box, size: tuple[int, int], picture_size: tuple[int, int], taken: Sequence[Box]
) -> Box | None:
    """Try above, inside, below and the middle of a box; the first free place, or None."""
    left, top, right, bottom = box
    width, height = size
    middle = ((left + right - width) // 2, (top + bottom - height) // 2)
    wishes = [
        (left, top - height),
        (left, top),
        (right - width, top - height),
        (left, bottom),
        (right - width, bottom),
        middle,
        (left, bottom - height),
        (left, middle[1]),
        (right - width, middle[1]),
    ]
    for x, y in wishes:
        x = max(0, min(x, picture_size[0] - width))
        y = max(0, min(y, picture_size[1] - height))
        place = (x, y, x + width, y + height)
        if not any(_overlap(place, other) for other in taken):
            return place
    return None


def _overlap(first: Box, second: Box) -> bool:
    return (
        first[0] < second[2]
        and second[0] < first[2]
        and first[1] < second[3]
        and second[1] < first[3]
    )


def beside(pictures: Sequence[Image.Image], titles: Sequence[str]) -> Image.Image:
    """Put pictures of equal size in a row, each under its title."""
    height, width = pictures[0].height, pictures[0].width
    font = font_of((height, width), titles)
    bar = round(font.getbbox("Ag")[3]) + 8
    gap = 6
    row = Image.new(
        "RGB", (len(pictures) * (width + gap) - gap, height + bar), color=(255, 255, 255)
    )
    draw = ImageDraw.Draw(row)
    for number, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
        left = number * (width + gap)
        shown = fonts.shorten(fonts.drawable(title, font), font, width - 8)
        draw.text((left + 4, 3), shown, fill=(0, 0, 0), font=font)
        row.paste(picture, (left, bar))
    return row


def below(pictures: Sequence[Image.Image]) -> Image.Image:
    """Put pictures below one another, aligned on the left."""
    size = max(picture.width for picture in pictures), sum(picture.height for picture in pictures)
    column, top = Image.new("RGB", size, color=(255, 255, 255)), 0
    for picture in pictures:
        column.paste(picture, (0, top))
        top += picture.height
    return column


def colour_key(
    entries: Sequence[tuple[Colour, str]], size: tuple[int, int], title: str = ""
) -> Image.Image:
    """Draw a title and, below, colours with what they mean, in as many rows as they need.

    Args:
        entries: colours and their meanings.
        size: (height, width) of the picture that the key belongs to; the key is as wide.
        title: cut in the middle where it is too long.
    """
    font = font_of(size, [title, *(text for _, text in entries)])
    step = round(font.getbbox("Ag")[3]) + 8
    width, gap = size[1], step // 2
    places, x, y = [], gap, step if title else 0
    for _, text in entries:
        needed = step + math.ceil(font.getlength(fonts.drawable(text, font))) + gap
        if x + needed > width and x > gap:
            x, y = gap, y + step
        places.append((x, y))
        x += needed
    key = Image.new("RGB", (width, y + step), color=(255, 255, 255))
    draw = ImageDraw.Draw(key)
    shown = fonts.shorten(fonts.drawable(title, font), font, width - 2 * gap)
    draw.text((gap, 3), shown, fill=(0, 0, 0), font=font)
    for (colour, text), (x, y) in zip(entries, places, strict=True):
        draw.rectangle((x, y + 5, x + step - 10, y + step - 5), fill=colour)
        draw.text((x + step - 4, y + 3), fonts.drawable(text, font), fill=(0, 0, 0), font=font)
    return key


def save_png(picture: Image.Image, path: str | os.PathLike) -> None:
    """Write a picture whole or not at all."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    replace_file(path, buffer.getvalue())
