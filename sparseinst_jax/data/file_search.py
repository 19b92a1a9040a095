"""Look for files: the one walk through folders of every command, and names that almost fit.

A walk never loses a file in silence: it gathers what it leaves out, for the command to print.
"""

import functools
import os
import unicodedata
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from urllib.parse import unquote

from sparseinst_jax.runtime.messages import listed

# Made by file systems, sharing tools and archives beside real data, mostly copies in small.
_SYSTEM_FOLDERS = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN", "#recycle"})
_HIDDEN = "hidden or made by the system"
_LINKS = "links to other folders"
_UNREAD = "pictures and films of a kind that is not read"
# What people keep among photos; where they can be read they are among the suffixes looked for.
_OTHER_SUFFIXES = frozenset(
    ".heic .heif .avif .jxl .svg .psd .pdf .eps .exr .dng .cr2 .cr3 .nef .arw .orf .raf .rw2 "
    ".mp4 .mov .avi .mkv .webm".split()
)
MAX_NAMES = 5  # of what is left out, in one line


class FileSearch:
    """The walks of one command through its folders.

    Hidden files and folders, those that systems make and files that cannot be opened are left out.
    Links to folders are followed, or left out where what they lead to must not be opened later
    (see ``images.refuse_outside``).

    Args:
        follows_links: whether links to folders are followed; each folder is seen once.
        excluded: a folder that is passed over in silence, such as the output's.
    """

    def __init__(self, *, follows_links: bool = False, excluded: Path | None = None) -> None:
        self._follows_links = follows_links
        self._excluded = None if excluded is None else os.path.realpath(excluded)
        self._left_out: dict[str, dict[str, None]] = {}

    def find(self, folder: Path, suffixes: Set[str] | None = None) -> list[Path]:
        """The files in and below a folder in the order of their paths.

        Args:
            folder: may be a link itself, and hidden.
            suffixes: endings in small letters with the dot; those of files may be in capitals. None
                for all files.
        """
        root = os.path.realpath(folder)
        seen, links = {root}, list[str]()
        found = list(self._below(str(folder), suffixes, seen, links))
        for link in links:  # grows while it is walked through
            target = os.path.realpath(link)
            if target in seen or Path(target).is_relative_to(root):
                continue  # its files are found where they are
            if self._follows_links and not Path(root).is_relative_to(target):
                seen.add(target)
                found += self._below(link, suffixes, seen, links)
            else:
                self._leave_out(_LINKS, f"{link} -> {os.readlink(link)}")
        return sorted(found)

    def _below(
        self, start: str, suffixes: Set[str] | None, seen: set[str], links: list[str]
    ) -> Iterator[Path]:
        """Walk through a folder; links to others are added to ``links``."""
        for parent, folders, files in os.walk(start, onerror=self._note_unreadable):
            if self._excluded and Path(os.path.realpath(parent)).is_relative_to(self._excluded):
                folders.clear()
                continue
            visible = []
            for name in sorted(folders):
                path = os.path.join(parent, name)
                if _is_hidden(name):
                    inside = (name for _, _, names in os.walk(path) for name in names)
                    if any(_has_ending(name, suffixes) for name in inside):
                        self._leave_out(_HIDDEN, path)
                elif os.path.islink(path):
                    links.append(path)
                elif os.path.realpath(path) not in seen:
                    seen.add(os.path.realpath(path))
                    visible.append(name)
            folders[:] = visible
            for name in files:
                path = os.path.join(parent, name)
                if not _has_ending(name, suffixes):
                    is_picture = suffixes and ".jpg" in suffixes and not _is_hidden(name)
                    if is_picture and _has_ending(name, _OTHER_SUFFIXES):
                        self._leave_out(_UNREAD, path)
                elif _is_hidden(name):
                    self._leave_out(_HIDDEN, path)
                elif os.path.isfile(path):
                    yield Path(path)
                else:
                    what = "links that lead nowhere" if os.path.islink(path) else "not plain files"
                    self._leave_out(what, path)

    def _note_unreadable(self, error: OSError) -> None:
        self._leave_out("cannot be opened", f"{error.filename} ({error.strerror})")

    def _leave_out(self, why: str, path: str) -> None:
        self._left_out.setdefault(why, {})[path] = None

    def nothing(self, message: str) -> ValueError:
        """An error for a walk that found no file, with what it left out."""
        return ValueError("".join([message, *(f" ({line})" for line in self.left_out())]))

    def left_out(self) -> list[str]:
        """A line for each reason why something was left out: how many, and which."""
        lines = []
        for why, paths in self._left_out.items():
            cure = "; copy their files into it, or give each by itself" if why == _LINKS else ""
            warning = "" if why == _HIDDEN else "WARNING: "
            shown = listed(paths, MAX_NAMES)
            lines.append(f"{warning}left out, {why}: {len(paths)}: {shown}{cure}")
        return lines


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _SYSTEM_FOLDERS


def _has_ending(name: str, suffixes: Set[str] | None) -> bool:
    return suffixes is None or os.path.splitext(name)[1].lower() in suffixes


# In what the names of one file differ between tools and systems.
_SPELLINGS: dict[str, Callable[[str], str]] = {
    "\\ in place of /": lambda name: name.replace("\\", "/"),
    "codes such as %20": unquote,
    "the way accents are stored (NFC or NFD of Unicode)": lambda name: unicodedata.normalize(
        "NFC", name
    ),
    "capital letters": str.casefold,
    "spaces or _": lambda name: name.strip().replace(" ", "_"),
}


class FileNames:
    """The names of the files below a folder, to say what a file that is missing may be called.

    Args:
        root: is walked through when first asked.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @functools.cached_property
    def paths(self) -> list[str]:
        """Relative to the folder."""
        found = FileSearch(follows_links=True).find(self.root)
        return [str(path.relative_to(self.root)) for path in found]

    @functools.cached_property
    def _known(self) -> tuple[dict[str, str], ...]:
        """Paths by their plain path, by their plain name, and by their path without ending."""
        plain = [(_plain(path), path) for path in reversed(self.paths)]  # the first is kept
        return (
            dict(plain),
            {os.path.basename(key): path for key, path in plain},
            {os.path.splitext(key)[0]: path for key, path in plain},
        )

    def hint(self, name: str) -> str:
        """The end of a message: which file ``name`` may mean, and what differs; "" if none.

        The name is relative to the folder, as a label file writes it.
        """
        wanted = _plain(name)
        by_path, by_name, by_stem = self._known
        if found := by_path.get(wanted):
            what = f"it differs in {_differences(name, found)}"
        elif found := by_name.get(os.path.basename(wanted)):
            what = "was another folder meant?"
            above = wanted.removesuffix(_plain(found)).strip("/")
            if above and _plain(str(self.root)).endswith(f"/{above}"):
                what = f"is the folder that holds {above} meant?"
        elif found := by_stem.get(os.path.splitext(wanted)[0]):
            what = "it has another ending"
        return f"; there is {self.root / found}: {what}" if found else ""


def _plain(name: str) -> str:
    """A name without what differs between tools."""
    for spelling in _SPELLINGS.values():
        name = spelling(name)
    return name


def _differences(first: str, second: str) -> str:
    """In which of the spellings two names differ that are one without them."""
    needed = []
    for what in _SPELLINGS:
        names = [first, second]
        for other, spelling in _SPELLINGS.items():
            if other != what:
                names = [spelling(name) for name in names]
        if names[0] != names[1]:
            needed.append(what)
    return " and ".join(needed) or "several spellings"
