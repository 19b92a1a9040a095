"""Put names and values into messages: short, and unable to act on a terminal or a page.

A name in an untrusted file may hold escape sequences that steer a terminal, line ends that
forge a message, marks that reorder the text around them, or ten million characters.
"""

import re
import reprlib
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

MAX_MESSAGE = 20_000  # characters of a message: some screens, and more than twenty long faults
# Control characters, surrogates, line and paragraph separators, and the marks that reorder
# what stands beside them (Unicode's "bidirectional embeddings, overrides and isolates"). The marks
# that Arabic, Persian and Hebrew need in ordinary words (U+200C to U+200F) are none of these.
_ACTS = "\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff"
_ACTING = re.compile(f"[{_ACTS}]")
_ACTING_IN_MESSAGE = re.compile(f"(?![\n\t])[{_ACTS}]")

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = 80
_brief.maxlong = 40
_brief.maxlevel = 3


def acting_character(text: str) -> str | None:
    """The first character of a name that controls the output instead of being shown, or None."""
    found = _ACTING.search(text)
    return None if found is None else found[0]


def brief(value: Any) -> str:
    """A value as Python writes it, in few characters, whatever its length and depth."""
    return _brief.repr(value)


def listed(values: Iterable[object], most: int = 10, between: str = ", ") -> str:
    """Write out the first few values and count the others: "a, b, c and 5 more"."""
    texts = [str(value) for value in values]
    rest = len(texts) - most
    last = f"{' ' if between == ', ' else between}and {rest} more" if rest > 0 else ""
    return between.join(texts[:most]) + last


def columns(lines: Sequence[Sequence[str]], num_texts: int = 1) -> list[str]:
    """Lay out cells below each other: the first columns to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place < num_texts else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def counted(number: int, noun: str) -> str:
    """Write a number and what it counts: "no object", "1 object", "2 objects"."""
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def next_commands(*commands: Sequence[object]) -> str:
    """Write the commands to run next, each a list of its words, ready to paste."""
    return "\n".join(["Next:", *(f"  {shlex.join(map(str, words))}" for words in commands)])


def in_percent(fraction: float) -> str:
    """An AP or a recall as papers print it: "39.4", and "-" where it is undefined (-1)."""
    return "-" if fraction < 0 else f"{100 * fraction:.1f}"


def rounded(value: float) -> str:
    """A number in three digits and without an exponent: "0.0123", "12.8", "18,000"."""
    return f"{float(f'{value:.3g}'):,.15g}"


def percent(part: float, whole: float) -> str:
    """A share, "12 %"; only nothing is 0 % and only the whole 100 %."""
    share = 100 * part / whole
    if 0 < share < 0.1:
        return "below 0.1 %"
    if 99.9 < share < 100:
        return "above 99.9 %"
    return f"{share:.{int(share < 10 or 99 < share) if 0 < share < 100 else 0}f} %"


def printable(text: str, most: int = MAX_MESSAGE) -> str:
    r"""A text for terminals and pages: line ends and tabs stay, other such characters are escaped.

    Escape becomes ``\x1b``; of a text that is too long the middle is left out.
    """
    if len(text) > most:
        half = most // 2
        text = f"{text[:half]} [... {len(text) - 2 * half} characters left out ...] {text[-half:]}"
    return _ACTING_IN_MESSAGE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
