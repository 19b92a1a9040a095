"""Read a large json object piece by piece, so that no more than a few elements are held at once.

Python's own parser turns COCO's 450 MB into 3 GB of small objects before the first can be looked
at. Here its scanner is called for one list element at a time over a window of the text.
"""

import codecs
import json
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any, BinaryIO

WINDOW = 1 << 22  # characters read at a time; an element that is longer makes it grow
# Characters of one element, and of one section that is not read element by element: as Python
# values they take about ten times as many bytes. An image's annotation has some hundred.
MAX_VALUE = 1 << 28
# A number or a literal such as -Infinity that the window cuts; a cut text is "Unterminated" anyway.
_CUT = 16
_SPACE = re.compile(r"[ \t\n\r]*")
_decoder: Any = json.JSONDecoder()
_scan_once: Callable[[str, int], tuple[Any, int]] = _decoder.scan_once


class JsonError(ValueError):
    """What is wrong with the text, where (line and column from 1), and whether it is cut off."""

    def __init__(self, reason: str, line: int = 0, column: int = 0, is_cut: bool = False) -> None:
        super().__init__(f"{reason} at line {line}, column {column}" if line else reason)
        self.reason, self.line, self.column, self.is_cut = reason, line, column, is_cut


def read_object(file: BinaryIO, streamed: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Read the keys and values of a json object in the order of the text.

    Args:
        file: at its beginning; UTF-8, or UTF-16 or 32 distinguished as in the json standard.
        streamed: keys whose lists come as iterators over their elements. An iterator must be used
            up before the next key is asked for.

    Yields:
        Key and value. A text that is no object comes as one pair: "" and its value, a list empty.

    Raises:
        JsonError: the text is empty, cut off, no json, or nested too deeply.
    """
    text = _Window(file)
    if text.skip_space() != "{":
        value = [] if text.peek() == "[" else text.value()
        if value != [] and text.skip_space():
            raise text.error("Extra data")
        yield "", value
        return
    text.position += 1
    is_first = True
    while text.skip_space() != "}" or not is_first:
        if text.peek() != '"':
            raise text.error("Expecting property name enclosed in double quotes")
        key = text.value()
        text.expect(":")
        if text.skip_space() == "[" and key in streamed:
            yield key, text.elements()
        else:
            yield key, text.value()
        is_first = False
        if text.skip_space() == "}":
            break
        text.expect(",")
    text.position += 1
    if text.skip_space():
        raise text.error("Extra data")


class _Window:
    """A part of the text, and where in it the next value begins."""

    def __init__(self, file: BinaryIO) -> None:
        head = file.read(4)
        self._file = file
        self._encoding = json.detect_encoding(head)
        self._decode = codecs.getincrementaldecoder(self._encoding)("surrogatepass").decode
        self._is_whole = False
        self._lines = self._columns = 0  # before the window: line ends, characters after the last
        self.text, self.position = "", 0
        self._append(head)
        self.fill()

    def fill(self) -> None:
        """Drop what was read and read more, at least as much as is left."""
        if len(self.text) - self.position > MAX_VALUE:
            raise self.error(f"a value is longer than {MAX_VALUE} characters")
        done, left = self.text[: self.position], self.text[self.position :]
        ends = done.count("\n")
        self._lines += ends
        self._columns = len(done) - done.rfind("\n") - 1 + (0 if ends else self._columns)
        self.text, self.position = left, 0
        raw = self._file.read(max(WINDOW, len(left)))
        self._is_whole = not raw
        self._append(raw)

    def _append(self, raw: bytes) -> None:
        try:
            self.text += self._decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            raise JsonError(f"the text is not in {self._encoding}: {error}") from error

    def peek(self) -> str:
        """The next character, "" at the end."""
        return self.text[self.position : self.position + 1]

    def skip_space(self) -> str:
        """Skip to the next character that is not a space; returns it, "" at the end."""
        while True:
            match = _SPACE.match(self.text, self.position)
            assert match is not None, "the pattern matches the empty text"
            self.position = match.end()
            if self.position < len(self.text) or self._is_whole:
                return self.peek()
            self.fill()

    def expect(self, character: str) -> None:
        """Skip a character that must come next."""
        if self.skip_space() != character:
            raise self.error(f"Expecting '{character}' delimiter")
        self.position += 1

    def value(self) -> Any:
        """Read the value that begins here."""
        if not self.text.startswith("{", self.position):
            self.skip_space()
        while True:
            try:
                value, end = _scan_once(self.text, self.position)
            except StopIteration as stop:
                reason, place = "Expecting value", stop.value
            except json.JSONDecodeError as error:
                reason, place = error.msg, error.pos
            except RecursionError:
                raise self.error("lists or objects are nested too deeply") from None
            except ValueError as error:  # Python refuses integers of more than about 4300 digits
                raise self.error(str(error).partition(";")[0]) from None
            else:
                # A number at the end of the window may go on: "2" as "2.5", "2.5" as "2.5e-3".
                if end + 2 < len(self.text) or self._is_whole:
                    self.position = end
                    return value
                reason, place = "", end
            may_go_on = place > len(self.text) - _CUT or reason.startswith("Unterminated")
            if self._is_whole or not may_go_on:
                raise self.error(reason, place)
            self.fill()

    def elements(self) -> Iterator[Any]:
        """Read the elements of the list that begins here, one by one."""
        self.position += 1
        if self.skip_space() == "]":
            self.position += 1
            return
        while True:
            yield self.value()
            if self.text.startswith(",", self.position):  # as most are; the rest is slower
                self.position += 1
                continue
            if self.skip_space() == "]":
                break
            self.expect(",")
        self.position += 1

    def error(self, reason: str, place: int | None = None) -> JsonError:
        """Make the error of a place in the window, by default where the next value begins."""
        place = self.position if place is None else place
        before = self.text[:place]
        ends = before.count("\n")
        column = len(before) - before.rfind("\n") + (0 if ends else self._columns)
        is_cut = self._is_whole and (
            place >= len(self.text.rstrip()) or reason.startswith("Unterminated")
        )
        return JsonError(reason, self._lines + ends + 1, column, is_cut)
