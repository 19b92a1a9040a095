"""Choose fonts that have the characters of class and file names, and make text fit.

Pillow's own font holds little more than ASCII. A text in another script is drawn with a font of the
system where there is one; otherwise accents are dropped (é is drawn as e) and any other character
becomes a question mark: a picture never fails because of a name.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterable
from typing import Any

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
# Tried in this order where the first lacks a character: names that Linux, Windows and macOS know.
_SYSTEM_FONTS = (
    "DejaVuSans.ttf",
    "NotoSansCJK-Regular.ttc",
    "wqy-microhei.ttc",
    "Arial Unicode.ttf",
    "arial.ttf",
    "msyh.ttc",
    "PingFang.ttc",
)
_ELLIPSIS = "..."
MAX_CHARACTERS = 400  # no picture has room for more in a line


@functools.lru_cache(maxsize=64)
def own_font(size: int) -> Font:
    """Load Pillow's own font; `size` in pixels."""
    return ImageFont.load_default(size=size)


@functools.lru_cache(maxsize=64)
def _system_fonts(size: int) -> tuple[Font, ...]:
    fonts: list[Font] = []
    for name in _SYSTEM_FONTS:
        try:
            fonts.append(ImageFont.truetype(name, size))
        except (OSError, ImportError):  # not installed, or Pillow without FreeType
            continue
    return tuple(fonts)


def font_for(texts: Iterable[str], size: int, first: Font | None = None) -> Font:
    """Return the font of `size` pixels that lacks the fewest characters of the text.

    Args:
        texts: to be drawn.
        size: pixels.
        first: preferred where it lacks no more than the system's; Pillow's own by default.
    """
    characters, first = set("".join(map(one_line, texts))), first or own_font(size)
    if not _lacking(characters, first):
        return first
    return min((first, *_system_fonts(size)), key=lambda font: len(_lacking(characters, font)))


def one_line(text: str) -> str:
    """Replace line breaks, tabs and other control characters by single spaces."""
    if len(text) > 2 * MAX_CHARACTERS:
        text = f"{text[:MAX_CHARACTERS]}{_ELLIPSIS}{text[-MAX_CHARACTERS:]}"
    plain = "".join(" " if unicodedata.category(c)[0] in "ZC" else c for c in text)
    return " ".join(plain.split())


def drawable(text: str, font: Font) -> str:
    """Write a text in one line, with characters that the font has."""
    text = one_line(text)
    lacking = _lacking(set(text), font)
    if not lacking:
        return text
    plain = {c: "".join(filter(str.isascii, unicodedata.normalize("NFKD", c))) for c in lacking}
    return "".join(plain[c] or "?" if c in lacking else c for c in text)


def shorten(text: str, font: Font, width: float) -> str:
    """Cut a drawable text to `width` pixels; the middle goes, since names differ at their ends."""
    if len(text) > MAX_CHARACTERS:  # measuring takes time for each character
        text = text[: MAX_CHARACTERS // 2] + text[-MAX_CHARACTERS // 2 :]
    elif font.getlength(text) <= width:
        return text
    for kept in range(len(text) - 1, 0, -1):
        tail = kept // 2
        short = text[: kept - tail] + _ELLIPSIS + (text[-tail:] if tail else "")
        if font.getlength(short) <= width:
            return short
    return ""


def labels(names: Iterable[str], ids: Iterable[int], font: Font) -> list[str]:
    """Make names drawable; one that the font cannot show is preceded by its id."""
    shown = []
    for name, number in zip(names, ids, strict=True):
        text = drawable(name, font)
        is_whole = text and text.count("?") == name.count("?")
        shown.append(text if is_whole else f"{number} {text}".strip())
    return shown


def _lacking(characters: set[str], font: Font) -> set[str]:
    return {c for c in characters if c != " " and not _has(font, c)}


@functools.lru_cache(maxsize=4096)
def _has(font: Font, character: str) -> bool:
    """Whether a font has a character: what it lacks is drawn as the glyph of none."""
    if character.isascii():
        return True
    try:
        return _pixels(font, character) != _pixels(font, "\uffff")
    except (UnicodeError, OSError):
        return False


def _pixels(font: Font, character: str) -> tuple[tuple[int, int], bytes]:
    mask: Any = font.getmask(character)
    return mask.size, bytes(mask)
