"""Read the class names of a YOLO data set: the ``names:`` of its data.yaml, or a list of lines.

Only the forms that such files have are read (a list or a mapping from numbers, on one line or on
several, quoted or not); whatever else YAML allows is refused rather than guessed.
"""

import json
import re
from pathlib import Path

_QUOTED = r"'(?:[^']|'')*'|\"(?:\\.|[^\"\\])*\""
_ITEM = re.compile(rf"\s*({_QUOTED}|[^,\[\]{{}}'\"\s][^,\[\]{{}}]*?)\s*(?:,|$)")
_NUMBERED = re.compile(rf"\s*(\d+|'\d+'|\"\d+\")\s*:\s+({_QUOTED}|[^,\[\]{{}}'\"\s].*?)\s*$")
_NUMBERED_ITEM = re.compile(
    rf"\s*(\d+|'\d+'|\"\d+\")\s*:\s+({_QUOTED}|[^,\[\]{{}}'\"\s][^,\[\]{{}}]*?)\s*(?:,|$)"
)
_FORMS = "names: [apple, pear], or a line '  - apple' or '  0: apple' for each class"


def read_names(path: Path) -> dict[int, str]:
    """Class number to name.

    Args:
        path: a data.yaml, or a text file with one name a line, numbered from 0.

    Raises:
        ValueError: the file has no names, or in a form that is not read; says the line.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); give --names APPLE PEAR") from error
    if path.suffix.lower() in (".yaml", ".yml"):
        names, num_classes = _yaml_names(text, path)
    else:
        lines = [line.strip() for line in text.splitlines()]
        names, num_classes = dict(enumerate(line for line in lines if line)), None
    if not names:
        raise ValueError(f"{path} has no class names; expected {_FORMS}, or give --names APPLE")
    if num_classes is not None and num_classes != len(names):
        raise ValueError(f"{path} says nc: {num_classes} and has {len(names)} names; correct it")
    values = list(names.values())
    twice = sorted({name for name in values if values.count(name) > 1})
    if twice:
        raise ValueError(
            f"{path} gives the name {', '.join(map(repr, twice))} to several classes; names must "
            "differ: correct the file, or give --names"
        )
    return names


def _yaml_names(text: str, path: Path) -> tuple[dict[int, str], int | None]:
    lines = [_without_comment(line) for line in text.splitlines()]
    counts = [re.match(r"nc\s*:\s*(\d+)\s*$", line) for line in lines]
    num_classes = next((int(match[1]) for match in counts if match), None)
    starts = [i for i, line in enumerate(lines) if re.match(r"names\s*:(\s|$)", line)]
    if len(starts) != 1:
        raise ValueError(
            f"{path} has {len(starts)} entries 'names:', expected one: {_FORMS}; or give --names"
        )
    start = starts[0]
    value = lines[start].split(":", 1)[1].strip()
    # An entry ends before the next line that starts at the left and is no item of a list.
    following: list[tuple[int, str]] = []
    for number, line in enumerate(lines[start + 1 :], start + 2):
        if line and not line[0].isspace() and not line.startswith(("- ", "]", "}")):
            break
        if line.strip():
            following.append((number, line.strip()))
    if value:
        flow = " ".join([value, *(line for _, line in following)])
        return _flow(flow, f"{path}:{start + 1}"), num_classes
    return _block(following, path), num_classes


def _without_comment(line: str) -> str:
    """The line up to a `#` that stands at its start or after a space, outside of quotes."""
    quote = ""
    for i, char in enumerate(line):
        before = line[:i].rstrip()
        if quote:
            quote = "" if char == quote and line[i - 1 : i] != "\\" else quote
        elif char in "'\"" and (not before or before[-1] in ",[{:-"):
            quote = char
        elif char == "#" and (i == 0 or line[i - 1].isspace()):
            return line[:i].rstrip()
    return line.rstrip()


def _flow(text: str, where: str) -> dict[int, str]:
    """``[a, b]`` or ``{0: a, 1: b}``."""
    is_list, is_mapping = (text[0] + text[-1] == pair for pair in ("[]", "{}"))
    if not (is_list or is_mapping):
        raise ValueError(f"{where}: names: {text[:60]} is not read; expected {_FORMS}; or --names")
    inner, names, position = text[1:-1].strip(), {}, 0
    while position < len(inner):
        match = (_ITEM if is_list else _NUMBERED_ITEM).match(inner, position)
        if match is None:
            raise ValueError(
                f"{where}: names: {inner[position:][:60]!r} is not read; expected {_FORMS}; or "
                "give --names"
            )
        number = len(names) if is_list else int(match[1].strip("'\""))
        _add(names, number, match[match.re.groups], where)
        position = match.end()
    return names


def _block(lines: list[tuple[int, str]], path: Path) -> dict[int, str]:
    """A line ``- a`` or ``0: a`` for each name."""
    names: dict[int, str] = {}
    is_list = bool(lines) and lines[0][1].startswith("- ")
    for line_number, line in lines:
        where = f"{path}:{line_number}"
        if is_list and line.startswith("- "):
            _add(names, len(names), line[2:].strip(), where)
            continue
        match = None if is_list else _NUMBERED.match(line)
        if match is None:
            raise ValueError(f"{where}: {line[:60]!r} is not read; expected {_FORMS}; or --names")
        _add(names, int(match[1].strip("'\"")), match[2], where)
    return names


def _add(names: dict[int, str], number: int, scalar: str, where: str) -> None:
    """Unquote a name and note it."""
    text = scalar.strip()
    if re.fullmatch(r"'(?:[^']|'')*'", text):
        name = text[1:-1].replace("''", "'")
    elif re.fullmatch(r'"(?:\\.|[^"\\])*"', text):
        try:
            name = json.loads(text)
        except ValueError:
            raise ValueError(f"{where}: the quoted name {text} is not read; give --names") from None
    elif not text or text[0] in "&*!|>%@`\"'[{#?" or re.search(r":(\s|$)", text):
        raise ValueError(f"{where}: the name {text!r} is not read; quote it or give --names")
    else:
        name = text
    if not name.strip():
        raise ValueError(f"{where}: class {number} has an empty name; give it one")
    if number in names:
        raise ValueError(f"{where}: class {number} occurs more than once; correct the file")
    names[number] = name.strip()
