"""Pickles read without running what they ask for.

A pickle is a program. Python's own unpickler imports the names that it gives and calls them, and
to forbid names (`find_class`) leaves the rest of its machinery open: sizes that are allocated
before anything was read, `__setstate__`, memos and extension registries. So this is an interpreter
of its own for the same operations, which has no way to import or call anything:

* A name (`os.system`, `torch._utils._rebuild_tensor_v2`) becomes a `Name`, a string in a box.
* What a pickle wants called is looked up in one table of ours, `pickled_values.MEANINGS`, by the
  text of the name. It holds the few names that arrays are made of, and gives inert stand-ins.
* Every other call gives a `Foreign`: an object without content that remembers the name of its
  class. Checkpoints carry such things beside the weights (loggers, configurations, paths);
  one found among the weights is refused by that name.

Long runs of bytes are not read but remembered as a place in the file, and their sizes compared
with it; operations, short texts and integers are counted. A file can therefore neither take much
memory nor much time.

Source: the operations as documented in Python's `pickletools`, protocols 0 to 5.
"""

from __future__ import annotations

import codecs
import re
import struct
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

from sparseinst_jax.weights.reading.pickled_values import (
    MEANINGS,
    Foreign,
    LongText,
    Name,
    Settable,
    set_items,
)
from sparseinst_jax.weights.reading.stored_arrays import (
    DamagedFileError,
    Piece,
    WeightsFileError,
    short,
)

SHORT_BYTES = 1024
# A checkpoint of 500 arrays with its optimizer takes 50,000 operations and 50 kB of names.
MAX_OPERATIONS, MAX_SHORT_BYTES, MAX_INTEGER_BYTES, MAX_LINE = 300_000, 16 << 20, 64, 4096
_REFUSED_OPERATIONS = {
    b"\x82": "a name from a registry",
    b"\x83": "a name from a registry",
    b"\x84": "a name from a registry",
    b"P": "a persistent id of text",
    b"\x97": "a buffer outside of the file",
    b"\x98": "a buffer outside of the file",
}
_DAMAGE = (
    IndexError,
    KeyError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,  # also of Unicode
    AttributeError,
    struct.error,
)

_NAME = re.compile(r"[\w<>]+(\.[\w<>]+)*")
_OLD_NAMES = {"__builtin__.": "builtins.", "copy_reg.": "copyreg.", "numpy.core.": "numpy._core."}
# Nothing runs whatever a pickle names. But no checkpoint needs Python's own library beyond classes
# of plain data, and every known attack does: such a file is refused as a whole, so that its user
# learns of it.
_PLAIN_MODULES = frozenset(
    """
    _codecs _io abc argparse array collections copyreg dataclasses datetime decimal enum fractions
    functools inspect io itertools logging numbers pathlib random re string time types typing uuid
    """.split()
)
_PLAIN_BUILTINS = frozenset(
    """
    bool bytearray bytes complex dict float frozenset int list long object range set slice str
    tuple unicode xrange Ellipsis NotImplemented getattr
    """.split()
)


class _PickleBytes:
    """Reads the parts of pickles from a file and counts what they take.

    Args:
      file: at the first byte of a pickle.
      end: where the pickles must have ended, in bytes from the beginning of the file.
    """

    def __init__(self, file: BinaryIO, end: int):
        self.file, self.end = file, end
        self._operations, self._short_bytes = 0, 0

    def refuse_short(self) -> None:
        """Refuses a file that ended too early."""
        raise DamagedFileError("the pickle ends in the middle")

    def spend(self, operations: int = 0, short_bytes: int = 0) -> None:
        """Counts what a pickle takes; too much is refused."""
        self._operations += operations
        self._short_bytes += short_bytes
        if self._operations > MAX_OPERATIONS:
            raise WeightsFileError(
                f"the pickle takes more than {MAX_OPERATIONS} operations, expected about 50,000: "
                "it is not a weights file"
            )
        if self._short_bytes > MAX_SHORT_BYTES:
            raise WeightsFileError(
                f"the pickle holds more than {MAX_SHORT_BYTES} bytes of names and short strings: "
                "it is not a weights file"
            )

    def fixed(self, format: str) -> Any:
        """A number of a fixed size, by its `struct` format."""
        return struct.unpack(format, self.read(struct.calcsize(format)))[0]

    def read(self, size: int) -> bytes:
        """A few bytes."""
        content = self.file.read(size)
        if len(content) < size:
            self.refuse_short()
        return content

    def line(self) -> bytes:
        """The rest of a line, without its end."""
        line = self.file.readline(MAX_LINE)
        self.spend(short_bytes=len(line))
        if len(line) == MAX_LINE:
            raise WeightsFileError(
                f"the pickle holds a line of more than {MAX_LINE} bytes, as protocol 0 has for "
                "arrays; load it where it was made and save it with protocol 2 or later"
            )
        if not line.endswith(b"\n"):
            self.refuse_short()
        return line[:-1]

    def run(self, size: int) -> bytes | Piece:
        """Bytes of a claimed size: read if they are short, else only their place."""
        start = self.file.tell()
        if not 0 <= size <= self.end - start:
            what = f"the pickle claims {size} bytes at byte {start}"
            raise DamagedFileError(f"{what}, of {self.end - start} left")
        if size <= SHORT_BYTES:
            self.spend(short_bytes=size)
            return self.read(size)
        self.file.seek(start + size)
        return Piece(self.file, start, size)

    def frame(self) -> None:
        """A frame says how many bytes follow; it is checked like any other size."""
        size, left = self.fixed("<Q"), self.end - self.file.tell()
        if size > left:
            raise DamagedFileError(f"the pickle claims a frame of {size} bytes of {left} left")

    def text(self, size: int) -> str | LongText:
        """A text of a claimed size: a long one stays in the file."""
        run = self.run(size)
        return LongText(run) if isinstance(run, Piece) else run.decode("utf-8", "surrogatepass")

    def old_text(self, size: int) -> str | Piece:
        """Python 2's strings: names and bytes alike."""
        run = self.run(size)
        return run if isinstance(run, Piece) else run.decode("latin-1")

    def integer(self, size: int) -> int:
        """A signed little-endian integer of a claimed size."""
        if not 0 <= size <= MAX_INTEGER_BYTES:
            raise WeightsFileError(
                f"the pickle holds an integer of {size} bytes, expected at most {MAX_INTEGER_BYTES}"
            )
        return int.from_bytes(self.read(size), "little", signed=True)

    def decimal(self) -> int | bool:
        """An integer in digits, or 00 and 01 for a flag."""
        line = self.line().decode().removesuffix("L")
        if line in ("00", "01"):
            return line == "01"
        if len(line) > 2 * MAX_INTEGER_BYTES:
            raise WeightsFileError(f"the pickle holds an integer of {len(line)} digits")
        return int(line)

    def quoted(self) -> str:
        """A string in quotes."""
        line = self.line()
        if len(line) < 2 or line[0] != line[-1] or line[0] not in b"'\"":
            raise ValueError("a string without quotes")
        return codecs.decode(line[1:-1], "unicode_escape")


class Unpickler:
    """Reads one pickle after the other from a file, without calling anything.

    Args:
      file: at the first byte of a pickle.
      end: where the pickles must have ended, in bytes from the beginning of the file.
      persistent: gives the object for a persistent id (PyTorch's storages); None refuses them.
    """

    def __init__(self, file: BinaryIO, end: int, persistent: Callable[[Any], object] | None = None):
        self._bytes, self._persistent = _PickleBytes(file, end), persistent
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        """Reads the next pickle.

        Raises:
          WeightsFileError: if it is damaged, cut off, too large, or names what it should not.
        """
        self._stack, self._marks, self._memo = [], [], {}
        try:
            while True:
                code = self._bytes.file.read(1)
                if code == b".":
                    break
                if code not in _OPERATIONS:
                    self._refuse_operation(code)
                self._bytes.spend(operations=1)
                _OPERATIONS[code](self)
            result = self._stack.pop()
        except WeightsFileError:
            raise
        except _DAMAGE as error:
            what = f"the pickle makes no sense before byte {self._bytes.file.tell()}"
            raise DamagedFileError(f"{what} ({short(error)})") from error
        if self._bytes.file.tell() > self._bytes.end:
            self._bytes.refuse_short()
        return result

    def _refuse_operation(self, code: bytes) -> None:
        if not code:
            self._bytes.refuse_short()
        what = _REFUSED_OPERATIONS.get(code, "unknown to Python")
        raise WeightsFileError(
            f"the pickle holds the operation {code!r} ({what}) before byte "
            f"{self._bytes.file.tell()}, which no weights file needs: damaged, or not weights"
        )

    # Operations on the stack

    def _push(self, value: object) -> None:
        self._stack.append(value)

    def _pop_to_mark(self) -> list[Any]:
        mark = self._marks.pop()
        values = self._stack[mark:]
        del self._stack[mark:]
        return values

    def _drop_to_mark(self) -> None:
        self._pop_to_mark()

    def _pop_one(self) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._stack.pop()

    def _push_tuple(self, size: int) -> None:
        values = tuple(self._stack[-size:])
        if len(values) < size:
            raise IndexError("a tuple of values that are not there")
        self._stack[-size:] = [values]

    def _append(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif not isinstance(target, Foreign):
            raise TypeError("appending to what is no list")

    def _set_items(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, Foreign):
            return
        if type(target) is not dict or len(values) % 2:
            raise TypeError("items for what is no dict")
        set_items(target, zip(values[::2], values[1::2], strict=True))

    def _dict(self, values: list[Any]) -> None:
        self._push({})
        self._set_items(values)

    def _memoize(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    # Names and calls

    def _push_name(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError("a name that is no text")
        self._push(self._name(f"{module}.{name}"))

    def _name(self, path: str) -> Name:
        self._bytes.spend(operations=10, short_bytes=len(path))
        for old, new in _OLD_NAMES.items():
            path = new + path.removeprefix(old) if path.startswith(old) else path
        if not _NAME.fullmatch(path) or _is_of_programs(path):
            raise WeightsFileError(
                f"the pickle names {short(path)}, which no weights need and which could run "
                "programs: nothing was run; do not use this file, take it from its publisher"
            )
        return Name(path)

    def _call(self, function: object, arguments: object) -> None:
        """What a call would make, by our own table; nothing is called."""
        if isinstance(arguments, list):
            arguments = tuple(arguments)
        if not isinstance(function, Name | Foreign) or type(arguments) is not tuple:
            raise TypeError("a call of what has no name")
        if function.path == "builtins.getattr":
            self._push(self._attribute(arguments))
        elif isinstance(function, Name) and function.path in MEANINGS:
            self._bytes.spend(operations=_items(arguments), short_bytes=_short_bytes(arguments))
            place = self._bytes.file.tell()
            self._push(MEANINGS[function.path](*arguments))
            self._bytes.file.seek(place)  # a long text may have been read
        else:
            self._push(Foreign(function.path))

    def _attribute(self, arguments: tuple[Any, ...]) -> Name:
        """The name of a method of a foreign class: so do protocols below 4 write it.

        Nothing is looked up. Anything else that `getattr` could be asked for is refused.
        """
        if len(arguments) == 2 and isinstance(arguments[0], Name) and isinstance(arguments[1], str):
            return self._name(f"{arguments[0].path}.{arguments[1]}")
        raise WeightsFileError(
            "the pickle names builtins.getattr for something else than a method of a class, which "
            "no weights need: nothing was run; do not use this file"
        )

    def _build(self, state: object) -> None:
        """Gives an array or dtype its content; the state of anything else is dropped."""
        if isinstance(self._stack[-1], Settable):
            self._stack[-1].set_state(state)

    def _new_with_keywords(self) -> None:
        self._stack.pop()
        arguments, function = self._stack.pop(), self._stack.pop()
        self._call(function, arguments)

    def _instance(self, path: str | None) -> None:
        """Calls of protocols 0 and 1: the arguments lie behind the mark."""
        values = self._pop_to_mark()
        function = values.pop(0) if path is None else self._name(path)
        self._call(function, tuple(values))

    def _persistent_id(self) -> None:
        if self._persistent is None:
            raise WeightsFileError(
                "the pickle refers to data outside of it, expected a file of plain arrays; give "
                "the checkpoint as torch.save wrote it"
            )
        place = self._bytes.file.tell()
        self._push(self._persistent(self._stack.pop()))
        self._bytes.file.seek(place)

    def _protocol(self) -> None:
        protocol = self._bytes.fixed("B")
        if protocol > 5:
            raise WeightsFileError(f"a pickle of protocol {protocol}, expected 0 to 5")


def _is_of_programs(path: str) -> bool:
    """Whether a name belongs to code and not to data; see `_PLAIN_MODULES`."""
    module, _, name = path.partition(".")
    if module == "builtins":
        return name not in _PLAIN_BUILTINS
    if ".__" in path and path not in ("copyreg.__newobj__", "copyreg.__newobj_ex__"):
        return True
    return module in sys.stdlib_module_names and module not in _PLAIN_MODULES


def _items(arguments: tuple[Any, ...]) -> int:
    return sum(len(value) for value in arguments if type(value) in (list, tuple))


def _short_bytes(arguments: tuple[Any, ...]) -> int:
    return sum(len(value) for value in arguments if type(value) in (str, bytes))


Operation = Callable[[Unpickler], None]
_READ: dict[bytes, Callable[[Unpickler], object]] = {
    b"N": lambda u: None,
    b"\x88": lambda u: True,
    b"\x89": lambda u: False,
    b"I": lambda u: u._bytes.decimal(),
    b"L": lambda u: u._bytes.decimal(),
    b"F": lambda u: float(u._bytes.line()),
    b"G": lambda u: u._bytes.fixed(">d"),
    b"J": lambda u: u._bytes.fixed("<i"),
    b"K": lambda u: u._bytes.fixed("B"),
    b"M": lambda u: u._bytes.fixed("<H"),
    b"\x8a": lambda u: u._bytes.integer(u._bytes.fixed("B")),
    b"\x8b": lambda u: u._bytes.integer(u._bytes.fixed("<i")),
    b"S": lambda u: u._bytes.quoted(),
    b"T": lambda u: u._bytes.old_text(u._bytes.fixed("<i")),
    b"U": lambda u: u._bytes.old_text(u._bytes.fixed("B")),
    b"C": lambda u: u._bytes.run(u._bytes.fixed("B")),
    b"B": lambda u: u._bytes.run(u._bytes.fixed("<I")),
    b"\x8e": lambda u: u._bytes.run(u._bytes.fixed("<Q")),
    b"\x96": lambda u: u._bytes.run(u._bytes.fixed("<Q")),
    b"V": lambda u: codecs.decode(u._bytes.line(), "raw_unicode_escape"),
    b"\x8c": lambda u: u._bytes.text(u._bytes.fixed("B")),
    b"X": lambda u: u._bytes.text(u._bytes.fixed("<I")),
    b"\x8d": lambda u: u._bytes.text(u._bytes.fixed("<Q")),
    b"]": lambda u: [],
    b")": lambda u: (),
    b"}": lambda u: {},
    b"\x8f": lambda u: Foreign("builtins.set"),
    b"l": lambda u: u._pop_to_mark(),
    b"t": lambda u: tuple(u._pop_to_mark()),
    b"\x91": lambda u: Foreign(f"builtins.frozenset of {len(u._pop_to_mark())}"),
    b"2": lambda u: u._stack[-1],
    b"g": lambda u: u._memo[int(u._bytes.line())],
    b"h": lambda u: u._memo[u._bytes.fixed("B")],
    b"j": lambda u: u._memo[u._bytes.fixed("<I")],
}
_DO: dict[bytes, Operation] = {
    b"\x80": lambda u: u._protocol(),
    b"\x95": lambda u: u._bytes.frame(),
    b"(": lambda u: u._marks.append(len(u._stack)),
    b"0": lambda u: u._pop_one(),
    b"1": lambda u: u._drop_to_mark(),
    b"\x85": lambda u: u._push_tuple(1),
    b"\x86": lambda u: u._push_tuple(2),
    b"\x87": lambda u: u._push_tuple(3),
    b"a": lambda u: u._append([u._stack.pop()]),
    b"e": lambda u: u._append(u._pop_to_mark()),
    b"\x90": lambda u: u._append(u._pop_to_mark()),
    b"d": lambda u: u._dict(u._pop_to_mark()),
    b"s": lambda u: u._set_items([u._stack.pop(-2), u._stack.pop()]),
    b"u": lambda u: u._set_items(u._pop_to_mark()),
    b"p": lambda u: u._memoize(int(u._bytes.line())),
    b"q": lambda u: u._memoize(u._bytes.fixed("B")),
    b"r": lambda u: u._memoize(u._bytes.fixed("<I")),
    b"\x94": lambda u: u._memoize(len(u._memo)),
    b"c": lambda u: u._push_name(u._bytes.line().decode(), u._bytes.line().decode()),
    b"\x93": lambda u: u._push_name(u._stack.pop(-2), u._stack.pop()),
    b"R": lambda u: u._call(u._stack.pop(-2), u._stack.pop()),
    b"\x81": lambda u: u._call(u._stack.pop(-2), u._stack.pop()),
    b"\x92": lambda u: u._new_with_keywords(),
    b"i": lambda u: u._instance(f"{u._bytes.line().decode()}.{u._bytes.line().decode()}"),
    b"o": lambda u: u._instance(None),
    b"b": lambda u: u._build(u._stack.pop()),
    b"Q": lambda u: u._persistent_id(),
}


def _pushing(read: Callable[[Unpickler], object]) -> Operation:
    return lambda unpickler: unpickler._push(read(unpickler))


_OPERATIONS = {**_DO, **{code: _pushing(read) for code, read in _READ.items()}}
