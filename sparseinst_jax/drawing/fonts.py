"""Choose fonts that have the letters of class and file names, and make texts fit.

Pillow's own font holds little more than ASCII. A text in another script is drawn with a font of the
system where there is one; otherwise marks are taken off letters (é is drawn as e) and what is left
is shown as a question mark: a picture never fails because of a name.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterable
from typing import Any

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
# Tried in this order where Pillow's own lacks a letter: names that Linux, Windows and macOS know.
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
MAX_LETTERS = 400  # no picture has room for more in a line


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


def font_for(texts: Iterable[str], size: int) -> Font:
    """Return the font of `size` pixels that lacks the fewest letters of the texts."""
    letters = set("".join(map(one_line, texts)))
    own = own_font(size)
    if not _lacking(letters, own):
        return own
    return min((own, *_system_fonts(size)), key=lambda font: len(_lacking(letters, font)))


def one_line(text: str) -> str:
    """Replace line breaks, tabs and other control characters by single spaces."""
    if len(text) > 2 * MAX_LETTERS:
        text = f"{text[:MAX_LETTERS]}{_ELLIPSIS}{text[-MAX_LETTERS:]}"
    plain = "".join(" " if unicodedata.category(c)[0] in "ZC" else c for c in text)
    return " ".join(plain.split())


def drawable(text: str, font: Font) -> str:
    """Write a text in one line, with letters that the font has."""
    text = one_line(text)
    lacking = _lacking(set(text), font)
    if not lacking:
        return text
    drawn = []
    for letter in text:
        if letter not in lacking:
            drawn.append(letter)
            continue
        bare = "".join(c for c in unicodedata.normalize("NFKD", letter) if c.isascii())
        drawn.append(bare or "?")
    return "".join(drawn)


def shorten(text: str, font: Font, width: float) -> str:
    """Cut a drawable text to `width` pixels; the middle goes, both ends tell names apart."""
    if len(text) > MAX_LETTERS:  # measuring takes time for each letter
        text = text[: MAX_LETTERS // 2] + text[-MAX_LETTERS // 2 :]
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


def _lacking(letters: set[str], font: Font) -> set[str]:
    return {letter for letter in letters if letter != " " and not _has(font, letter)}


@functools.lru_cache(maxsize=4096)
def _has(font: Font, letter: str) -> bool:
    """Whether a font has a letter: what it lacks is drawn as the glyph of no character."""
    if letter.isascii():
        return True
    try:
        return _pixels(font, letter) != _pixels(font, "\uffff")
    except (UnicodeError, OSError):
        return False


def _pixels(font: Font, letter: str) -> tuple[tuple[int, int], bytes]:
    mask: Any = font.getmask(letter)
    return mask.size, bytes(mask)
