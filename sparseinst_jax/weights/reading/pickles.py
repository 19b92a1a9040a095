"""Pickles read without running what they ask for.

A pickle is a program. Python's own unpickler imports the names that it gives and calls them, and
to forbid names (`find_class`) leaves the rest of its machinery open: sizes that are allocated
before anything was read, `__setstate__`, memos and extension registries. So this is an interpreter
of its own for the operations that Python's `pickletools` finds, which has no way to import or call
anything:

* A name (`os.system`, `torch._utils._rebuild_tensor_v2`) becomes a `Name`, a string in a box.
* What a pickle wants called is looked up in one table of ours, `pickled_values.MEANINGS`, by the
  text of the name. It holds the few names that arrays are made of, and gives inert stand-ins.
* Every other call gives a `Foreign`: an object without content that remembers the name of its
  class. Checkpoints carry such things beside the weights (loggers, configurations, paths);
  one found among the weights is refused by that name.

Sizes are compared with the file before anything is read, operations are counted, and no call makes
more bytes than the file has. A file can therefore neither take much memory nor much time.
"""

from __future__ import annotations

import pickletools
import re
import struct
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

from sparseinst_jax.weights.reading.pickled_values import (
    MEANINGS,
    Foreign,
    Name,
    Settable,
    set_items,
)
from sparseinst_jax.weights.reading.stored_arrays import (
    DamagedFileError,
    WeightsFileError,
    short,
)

# A checkpoint of 500 arrays with its optimizer takes 50,000 operations.
MAX_OPERATIONS, MAX_INTEGER_BITS, MAX_LINE = 300_000, 512, 4096
_REFUSED_OPERATIONS = {
    "PERSID": "a persistent id of text",
    "NEXT_BUFFER": "a buffer outside of the file",
    "READONLY_BUFFER": "a buffer outside of the file",
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


class _BoundedFile:
    """A file that is asked for no more bytes than it has.

    Args:
      file: at the first byte of a pickle.
      end: where the pickles must have ended, in bytes from the beginning of the file.
    """

    def __init__(self, file: BinaryIO, end: int):
        self._file, self.end = file, end
        self.tell, self.seek = file.tell, file.seek

    def read(self, size: int) -> bytes:
        start = self.tell()
        if size > max(self.end - start, 1):  # one byte is cheap, and `load` looks where it ended
            what = f"the pickle claims {size} bytes at byte {start}"
            raise DamagedFileError(f"{what}, of {self.end - start} left")
        return self._file.read(size)

    def readline(self) -> bytes:
        line = self._file.readline(MAX_LINE)
        if len(line) == MAX_LINE:
            raise WeightsFileError(
                f"the pickle holds a line of more than {MAX_LINE} bytes, as protocol 0 has for "
                "arrays; load it where it was made and save it with protocol 2 or later"
            )
        return line


class Unpickler:
    """Reads one pickle after the other from a file, without calling anything.

    Args:
      file: at the first byte of a pickle.
      end: where the pickles must have ended, in bytes from the beginning of the file.
      persistent: gives the object for a persistent id (PyTorch's storages); None refuses them.
    """

    def __init__(self, file: BinaryIO, end: int, persistent: Callable[[Any], object] | None = None):
        self._file, self._persistent = _BoundedFile(file, end), persistent
        self._num_operations = self._num_bytes = 0  # done; given to calls
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        """Reads the next pickle.

        Raises:
          WeightsFileError: if it is damaged, cut off, too large, or names what it should not.
        """
        self._stack, self._marks, self._memo = [], [], {}
        operations: Any = pickletools.genops(self._file)  # type: ignore[arg-type]
        try:
            for operation, argument, _ in operations:
                self._spend(1)
                if operation.name in _VALUES:
                    self._stack.append(_VALUES[operation.name](self, argument))
                elif operation.name in _OPERATIONS:
                    _OPERATIONS[operation.name](self, argument)
                else:
                    self._refuse(operation)
            result = self._stack.pop()
        except WeightsFileError:
            raise
        except _DAMAGE as error:
            what = f"the pickle makes no sense before byte {self._file.tell()}"
            raise DamagedFileError(f"{what} ({short(error)})") from error
        if self._file.tell() > self._file.end:
            raise DamagedFileError("the pickle ends in the middle")
        return result

    def _spend(self, operations: int) -> None:
        self._num_operations += operations
        if self._num_operations > MAX_OPERATIONS:
            raise WeightsFileError(
                f"the pickle takes more than {MAX_OPERATIONS} operations, expected about 50,000: "
                "it is not a weights file"
            )

    def _refuse(self, operation: pickletools.OpcodeInfo) -> None:
        what = _REFUSED_OPERATIONS.get(operation.name, "a name from a registry")
        raise WeightsFileError(
            f"the pickle holds the operation {operation.name} ({what}) before byte "
            f"{self._file.tell()}, which no weights file needs: damaged, or not weights"
        )

    # Operations on the stack

    def _integer(self, value: int) -> int:
        if value.bit_length() > MAX_INTEGER_BITS:
            raise WeightsFileError(
                f"the pickle holds an integer of {value.bit_length()} bits, expected at most "
                f"{MAX_INTEGER_BITS}"
            )
        return value

    def _protocol(self, protocol: int) -> None:
        if protocol > 5:
            raise WeightsFileError(f"a pickle of protocol {protocol}, expected 0 to 5")

    def _frame(self, size: int) -> None:
        left = self._file.end - self._file.tell()
        if size > left:
            raise DamagedFileError(f"the pickle claims a frame of {size} bytes of {left} left")

    def _pop(self, number: int) -> list[Any]:
        values = self._stack[-number:]
        if len(values) < number:
            raise IndexError("values that are not there")
        del self._stack[-number:]
        return values

    def _pop_to_mark(self) -> list[Any]:
        mark = self._marks.pop()
        values = self._stack[mark:]
        del self._stack[mark:]
        return values

    def _pop_one(self) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._stack.pop()

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
        self._stack.append({})
        self._set_items(values)

    def _memoize(self, index: int | None) -> None:
        self._memo[len(self._memo) if index is None else index] = self._stack[-1]

    # Names and calls

    def _name(self, module: object, name: object) -> Name:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError("a name that is no text")
        self._spend(10)
        path = f"{module}.{name}"
        for old, new in _OLD_NAMES.items():
            path = new + path.removeprefix(old) if path.startswith(old) else path
        if not _NAME.fullmatch(path) or _is_of_programs(path):
            raise WeightsFileError(
                f"the pickle names {short(path)}, which no weights need and which could run "
                "programs: nothing was run; do not use this file, take it from its publisher"
            )
        return Name(path)

    def _call(self, function: object, arguments: object, *_: object) -> object:
        """What a call would make, by our own table; nothing is called."""
        if isinstance(arguments, list):
            arguments = tuple(arguments)
        if not isinstance(function, Name | Foreign) or type(arguments) is not tuple:
            raise TypeError("a call of what has no name")
        if function.path == "builtins.getattr":
            return self._attribute(arguments)
        if isinstance(function, Foreign) or function.path not in MEANINGS:
            return Foreign(function.path)
        for value in arguments:
            if type(value) in (list, tuple):
                self._spend(len(value))
            elif type(value) in (str, bytes):
                self._num_bytes += len(value)
        if self._num_bytes > self._file.end:
            raise WeightsFileError(
                "the pickle makes more bytes of its texts than it has: it is not a weights file"
            )
        return MEANINGS[function.path](*arguments)

    def _instance(self, values: list[Any]) -> object:
        return self._call(values[0], values[1:])

    def _attribute(self, arguments: tuple[Any, ...]) -> Name:
        """The name of a method of a foreign class: so do protocols below 4 write it.

        Nothing is looked up. Anything else that `getattr` could be asked for is refused.
        """
        if len(arguments) == 2 and isinstance(arguments[0], Name) and isinstance(arguments[1], str):
            return self._name(arguments[0].path, arguments[1])
        raise WeightsFileError(
            "the pickle names builtins.getattr for something else than a method of a class, which "
            "no weights need: nothing was run; do not use this file"
        )

    def _build(self, state: object) -> None:
        """Gives an array or dtype its content; the state of anything else is dropped."""
        if isinstance(self._stack[-1], Settable):
            self._stack[-1].set_state(state)

    def _stored(self, identity: object) -> object:
        if self._persistent is None:
            raise WeightsFileError(
                "the pickle refers to data outside of it, expected a file of plain arrays; give "
                "the checkpoint as torch.save wrote it"
            )
        place = self._file.tell()
        found = self._persistent(identity)
        self._file.seek(place)
        return found


def _is_of_programs(path: str) -> bool:
    """Whether a name belongs to code and not to data; see `_PLAIN_MODULES`."""
    module, _, name = path.partition(".")
    if module == "builtins":
        return name not in _PLAIN_BUILTINS
    if ".__" in path and path not in ("copyreg.__newobj__", "copyreg.__newobj_ex__"):
        return True
    return module in sys.stdlib_module_names and module not in _PLAIN_MODULES


# By the names of `pickletools`: the value that an operation pushes, from its argument.
_VALUES: dict[str, Callable[[Unpickler, Any], object]] = {
    **dict.fromkeys(
        "BININT BININT1 BININT2 STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE "
        "SHORT_BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8 FLOAT BINFLOAT".split(),
        lambda u, argument: argument,
    ),
    **dict.fromkeys(("INT", "LONG", "LONG1", "LONG4"), Unpickler._integer),
    "BYTEARRAY8": lambda u, argument: bytes(argument),
    "NONE": lambda u, _: None,
    "NEWTRUE": lambda u, _: True,
    "NEWFALSE": lambda u, _: False,
    "EMPTY_LIST": lambda u, _: [],
    "EMPTY_TUPLE": lambda u, _: (),
    "EMPTY_DICT": lambda u, _: {},
    "EMPTY_SET": lambda u, _: Foreign("builtins.set"),
    "LIST": lambda u, _: u._pop_to_mark(),
    "TUPLE": lambda u, _: tuple(u._pop_to_mark()),
    "TUPLE1": lambda u, _: tuple(u._pop(1)),
    "TUPLE2": lambda u, _: tuple(u._pop(2)),
    "TUPLE3": lambda u, _: tuple(u._pop(3)),
    "FROZENSET": lambda u, _: Foreign(f"builtins.frozenset of {len(u._pop_to_mark())}"),
    "DUP": lambda u, _: u._stack[-1],
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda u, index: u._memo[index]),
    "GLOBAL": lambda u, path: u._name(*path.split(" ", 1)),
    "STACK_GLOBAL": lambda u, _: u._name(*u._pop(2)),
    "REDUCE": lambda u, _: u._call(*u._pop(2)),
    "NEWOBJ": lambda u, _: u._call(*u._pop(2)),
    "NEWOBJ_EX": lambda u, _: u._call(*u._pop(3)),  # with keywords, which none of ours takes
    "INST": lambda u, path: u._call(u._name(*path.split(" ", 1)), u._pop_to_mark()),
    "OBJ": lambda u, _: u._instance(u._pop_to_mark()),
    "BINPERSID": lambda u, _: u._stored(u._stack.pop()),
}
# What the others do.
_OPERATIONS: dict[str, Callable[[Unpickler, Any], object]] = {
    "PROTO": Unpickler._protocol,
    "FRAME": Unpickler._frame,
    "STOP": lambda u, _: None,
    "MARK": lambda u, _: u._marks.append(len(u._stack)),
    "POP": lambda u, _: u._pop_one(),
    "POP_MARK": lambda u, _: u._pop_to_mark(),
    "APPEND": lambda u, _: u._append(u._pop(1)),
    "APPENDS": lambda u, _: u._append(u._pop_to_mark()),
    "ADDITEMS": lambda u, _: u._append(u._pop_to_mark()),
    "DICT": lambda u, _: u._dict(u._pop_to_mark()),
    "SETITEM": lambda u, _: u._set_items(u._pop(2)),
    "SETITEMS": lambda u, _: u._set_items(u._pop_to_mark()),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), Unpickler._memoize),
    "BUILD": lambda u, _: u._build(u._stack.pop()),
}
