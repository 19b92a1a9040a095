"""What is wrong with the json or the images of a data set, collected to report all at once."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sparseinst_jax.runtime.messages import listed, printable
from sparseinst_jax.runtime.pages import page

MAX_FAULTS_SHOWN = 20
MAX_LENGTH = 1_000  # characters of one fault; values are shortened, paths can be long
MISSING_IMAGE = "missing image file"  # a kind of fault; its cure is another one


class Fault(NamedTuple):
    """One thing that is wrong."""

    kind: str  # the same few words for every fault of its kind, to count them by
    message: str  # names the entry (its id and file), what was found and what was expected
    # training or evaluation would fail; otherwise the entry is left out or changed
    is_fatal: bool = True


class DatasetFaults:
    """The faults of one json, in the order in which they were found."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: list[Fault] = []

    def __iter__(self) -> Iterator[Fault]:
        return iter(self.found)

    def add(self, kind: str, message: str, *, is_fatal: bool = True) -> None:
        """Note one fault."""
        self.found.append(Fault(kind, message, is_fatal))

    @property
    def fatal(self) -> list[Fault]:
        """Those that training would fail on."""
        return [fault for fault in self.found if fault.is_fatal]

    def raise_if_fatal(self) -> None:
        """Raise a ValueError with the fatal ones, if any, the first of them word for word."""
        fatal = self.fatal
        if not fatal:
            return
        messages = [printable(fault.message, MAX_LENGTH) for fault in fatal]
        shown = listed(messages, MAX_FAULTS_SHOWN, "\n  ")
        more = " (`sparseinst check-data` lists all)" * (len(fatal) > MAX_FAULTS_SHOWN)
        cure = "Correct the file (its form: https://cocodataset.org/#format-data) "
        cure += page("data-faults")
        missing = [fault.kind == MISSING_IMAGE for fault in fatal]
        if any(missing):
            folder = "set config.data.train.images or config.data.val.images to their folder"
            cure = f"Missing images: {folder}, or take them out of the json " + (
                page("data-faults") if all(missing) else f"\n{cure}"
            )
        raise ValueError(
            f"{self.path}: {len(fatal)} fault(s) in a file read as COCO instances:\n"
            f"  {shown}{more}\n{cure}"
        )


def grouped(faults: list[Fault]) -> dict[str, list[Fault]]:
    """The faults of each kind, the fatal kinds first, then as they came."""
    groups: dict[str, list[Fault]] = {}
    for fault in sorted(faults, key=lambda fault: not fault.is_fatal):
        groups.setdefault(fault.kind, []).append(fault)
    return groups
