"""Pictures of masks on images, with outlines and captions, by Pillow and NumPy.

Every instance has a colour of its own, the same in every run: hues a golden angle apart, so that
neighbours in the list never look alike. Small images are enlarged so that the text can be read.
"""

from __future__ import annotations

import colorsys
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from sparseinst_jax.drawing import fonts
from sparseinst_jax.drawing.crops import Crop, crop
from sparseinst_jax.drawing.label_places import MOST_COVERED, label_places
from sparseinst_jax.runtime.files import replace_file

MASK_OPACITY = 0.45
# Pictures with a long side below this are enlarged by a whole factor.
READABLE_SIDE = 512
MAX_ENLARGEMENT = 6
GOLDEN_RATIO = (math.sqrt(5.0) - 1.0) / 2.0
# (lightness, saturation). Five of them: hues come near after 8, 13, 21 or 34 colours, none of which
# is a multiple of five, so that near hues always differ in tone.
TONES = ((0.55, 0.95), (0.40, 0.85), (0.72, 0.90), (0.48, 0.70), (0.62, 0.80))
SHADES = ((0, 0.0), (255, 0.4), (0, 0.4), (255, 0.7))  # share of white or black mixed in
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


def draw_instances(
    image: np.ndarray,
    masks: Iterable[np.ndarray | Crop],
    captions: Sequence[str],
    colours: Sequence[Colour | None] | None = None,
    readable_side: int = READABLE_SIDE,
    labels: Sequence[int] | None = None,
) -> Image.Image:
    """Draw objects over an image, each with its caption in its mask or touching it.

    Where masks overlap the first is seen, with the outlines of all. A caption that would hide other
    objects is left out, and so are the last ones when they would cover too much of the picture.

    Args:
        image: uint8 [h, w, 3], RGB.
        masks: D of bool [h, w], or crops of them; the first is on top. Empty ones are left out.
        captions: D strings; an empty one is not drawn.
        colours: D colours, RGB 0...255; where there is none, see `labels`.
        readable_side: pixels; an image with a shorter long side is enlarged.
        labels: D class numbers, for the colours of classes, neighbours in another shade; without
            them each object has a colour of its own.

    Returns:
        The picture, RGB; larger than the image by a whole factor where the image is small.
    """
    factor = enlargement(image.shape[:2], readable_side)
    height, width = image.shape[0] * factor, image.shape[1] * factor
    photo = Image.fromarray(image)
    photo = photo.resize((width, height), Image.Resampling.BICUBIC) if factor > 1 else photo
    canvas, is_filled = np.array(photo), np.zeros((height, width), bool)
    line = max(1, round(min(height, width) / 320))
    font_size = _caption_size(captions, (height, width))
    cell = max(2, font_size // 6)  # of the grid on which places of captions are sought
    cells: dict[int, np.ndarray] = {}  # the masks on this grid
    used, outlines = [(0, 0, 0)] * len(captions), []
    for index, mask in enumerate(masks):
        top, left, part = mask if isinstance(mask, Crop) else crop(mask)
        if not part.size:
            continue
        part = part.repeat(factor, axis=0).repeat(factor, axis=1) if factor > 1 else part
        top, left = factor * top, factor * left
        cells[index] = _on_grid(part, top, left, cell, (height, width))
        colour = colours[index] if colours else None
        if colour is None and labels is not None:
            near = [used[other] for other in cells if _are_near(cells[other], cells[index])]
            colour = min(shades(instance_colour(labels[index])), key=near.count)
        used[index] = colour or instance_colour(index)
        region = np.s_[top : top + part.shape[0], left : left + part.shape[1]]
        covered = Image.fromarray(canvas[region])
        free = Image.fromarray(part & ~is_filled[region])
        covered.paste(covered.point(_tints(used[index])), (0, 0), free)
        canvas[region] = covered
        is_filled[region] |= part
        outlines.append((np.nonzero(contour(part, line)), (top, left), used[index]))
    for (y, x), (top, left), colour in reversed(outlines):
        canvas[y + top, x + left] = colour
    picture = Image.fromarray(canvas)
    _draw_captions(picture, captions, used, cells, cell, fonts.font_for(captions, font_size))
    return picture


def _on_grid(part: np.ndarray, top: int, left: int, cell: int, size: tuple[int, int]) -> np.ndarray:
    """What a mask of which a part is not empty covers on a grid of cells: bool, never empty."""
    first = cell // 2  # the pixel that stands for a cell
    grid = np.zeros([len(range(first, side, cell)) for side in size], bool)
    y, x = -(-(top - first) // cell), -(-(left - first) // cell)
    chosen = part[y * cell + first - top :: cell, x * cell + first - left :: cell]
    grid[y : y + chosen.shape[0], x : x + chosen.shape[1]] = chosen
    if not chosen.any():  # it lies between the cells
        grid[min(top // cell, grid.shape[0] - 1), min(left // cell, grid.shape[1] - 1)] = 1
    return grid


def _tints(colour: Colour) -> list[int]:
    """What each of the 256 values of red, green and blue becomes under a mask."""
    mixed = (1 - MASK_OPACITY) * np.arange(256) + MASK_OPACITY * np.array(colour)[:, None]
    return np.rint(mixed).astype(int).ravel().tolist()


def shades(colour: Colour) -> list[Colour]:
    """A colour, and the same one lighter and darker."""
    mixed = [[round(part + share * (goal - part)) for part in colour] for goal, share in SHADES]
    return [(red, green, blue) for red, green, blue in mixed]


def _are_near(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether less than two cells lie between two masks."""
    top, left, part = crop(first)
    y, x = max(top - 2, 0), max(left - 2, 0)
    other = second[y : top + part.shape[0] + 2, x : left + part.shape[1] + 2]
    if not other.any():
        return False
    grown = np.pad(first, 2)[y : y + other.shape[0] + 4, x : x + other.shape[1] + 4]
    windows = np.lib.stride_tricks.sliding_window_view(grown, (5, 5))
    return bool((windows.any(axis=(2, 3)) & other).any())


def font_of(size: tuple[int, int], texts: Sequence[str] = ()) -> fonts.Font:
    """Load a font with the characters of the texts, fitting a picture of (height, width)."""
    return fonts.font_for(texts, _text_size(size))


def _text_size(size: tuple[int, int]) -> int:
    return max(12, round(min(size) / 36))


def _caption_size(captions: Sequence[str], size: tuple[int, int]) -> int:
    """The size of captions in pixels: smaller where all of them would cover much of a picture."""
    usual = _text_size(size)
    covered = sum(map(len, captions)) * 0.6 * usual * 1.4 * usual
    if covered < MOST_COVERED * size[0] * size[1]:
        return usual
    return max(11, round(0.7 * usual))


def _draw_captions(
    picture: Image.Image,
    captions: Sequence[str],
    colours: Sequence[Colour],
    coarse: Mapping[int, np.ndarray],
    cell: int,
    font: fonts.Font,
) -> None:
    """Write each caption on the colour of its object."""
    draw, pad = ImageDraw.Draw(picture), 2
    texts = {
        index: fonts.shorten(fonts.drawable(captions[index], font), font, picture.width - 2 * pad)
        for index in coarse
    }
    _, above, _, below = font.getbbox("Ag")
    height = math.ceil(below - above) + 2 * pad
    widths = [math.ceil(font.getlength(text)) + 2 * pad for text in texts.values()]
    sizes = [
        (-(-height // cell), -(-width // cell)) if text else (0, 0)
        for width, text in zip(widths, texts.values(), strict=True)
    ]
    places = label_places(list(coarse.values()), sizes)
    for (index, text), place, width in zip(texts.items(), places, widths, strict=True):
        if place is None:
            continue
        y, x = (cell * place[0], cell * place[1])
        x, colour = max(0, min(x, picture.width - width)), colours[index]
        draw.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
        is_light = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
        ink = (0, 0, 0) if is_light else (255, 255, 255)
        draw.text((x + pad, y + pad - above), text, fill=ink, font=font)


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
    picture.save(buffer, format="PNG", compress_level=1)  # a quarter of the time, a sixth more
    replace_file(path, buffer.getvalue())
