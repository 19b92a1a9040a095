"""Fetch a published file: by https alone, resumed, bounded in size, whole or not at all.

Plain `requests` and, for the pages that Google Drive puts before large files, gdown's reader of
them: neither gdown's nor pooch's own transfer keeps redirects to https or bounds the size.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from sparseinst_jax.runtime.files import write_json
from sparseinst_jax.runtime.messages import brief
from sparseinst_jax.runtime.progress import ImageProgress

if TYPE_CHECKING:
    import requests

MOST_BYTES = 2 * 2**30  # four times the largest published file
_CHUNK = 2**16  # of a piece that is cut, nothing arrives
_SECONDS = (10, 60)  # to connect, and between two pieces
_MOST_REDIRECTS = 10
_ATTEMPTS = 4
_PAUSE = 1.0  # seconds before the second attempt; twice as long before each further one
_PAGE_BYTES = 2**20
_OWN_HOSTS = ("localhost", "127.0.0.1", "::1")
_DRIVE_FILE = re.compile(r"https://drive\.google\.com/file/d/([\w-]+)")
_STATUS = {
    401: "asks for a login",
    403: "refuses it",
    404: "does not have it any more",
    410: "does not have it any more",
    429: "was asked too often",
}


class DownloadFault(ValueError):
    """Why a file could not be fetched, in words that follow "it could not be downloaded: "."""


class _Cut(Exception):
    """The connection or the server failed in a way that another attempt may mend."""


def fetch(address: str, target: Path, most_bytes: int = MOST_BYTES) -> None:
    """Fetch a file; what arrives lies in `<target>.part` until it is whole, and is continued.

    Args:
      address: https, or http on this machine.
      target: where the file goes; its folder exists.
      most_bytes: a larger file is refused.

    Raises:
      DownloadFault: it could not; what has arrived of it stays.
      OSError: the file cannot be written.
    """
    import requests  # not needed where the file is there already

    part, delay = target.with_name(f"{target.name}.part"), _PAUSE
    fault = ""
    for attempt in range(_ATTEMPTS):
        if attempt:
            print(f"{fault}; trying again", file=sys.stderr)
            time.sleep(delay)
            delay *= 2
        try:
            with requests.Session() as session:
                session.headers["Accept-Encoding"] = "identity"  # the bytes of the file
                _receive(session, address, part, most_bytes)
            break
        except _Cut as error:
            fault = str(error)
        except requests.RequestException as error:
            fault = f"no connection to {urlsplit(address).hostname} ({_reason(error)})"
    else:
        raise DownloadFault(fault)
    part.replace(target)
    _facts_of(part).unlink(missing_ok=True)


def _receive(session: requests.Session, address: str, part: Path, most_bytes: int) -> None:
    """Fetch what is missing of a part; ends when it is whole."""
    import requests

    have, headers = 0, {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        facts = json.loads(_facts_of(part).read_text())
        if facts["address"] == address and facts["validator"]:
            have = part.stat().st_size
            if have == facts["total"]:  # the process ended before it could be moved
                return
            # Where the file has changed meanwhile, all of it is sent.
            headers = {"Range": f"bytes={have}-", "If-Range": facts["validator"]} if have else {}
    with _answer(session, _direct(address), headers) as answer:
        if answer.status_code == 416:  # there is nothing after what we have, or it has changed
            part.unlink(missing_ok=True)
            raise _Cut("what had arrived before does not fit")
        start = have if answer.status_code == 206 else 0
        if start and not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            part.unlink(missing_ok=True)
            raise _Cut("the server continues at another place")
        length = answer.headers.get("Content-Length", "")
        total = start + int(length) if length.isdigit() else None
        _refuse_size(total or 0, most_bytes)
        _refuse_full_disk(part, (total or 0) - start)
        validator = answer.headers.get("ETag", "")
        if not validator or validator.startswith("W/"):
            validator = answer.headers.get("Last-Modified", "")
        write_json(_facts_of(part), {"address": address, "validator": validator, "total": total})
        host = urlsplit(answer.url).hostname
        with (
            part.open("ab" if start else "wb") as file,
            ImageProgress(total, sys.stderr, "downloaded", "B", "") as line,
        ):
            line.advance(start)
            try:
                for chunk in answer.iter_content(_CHUNK):
                    _refuse_size(file.tell() + len(chunk), most_bytes)
                    file.write(chunk)
                    line.advance(len(chunk))
            except requests.RequestException as error:
                raise _Cut(f"the connection to {host} was cut ({_reason(error)})") from error
            have = file.tell()
    if total is not None and have != total:
        raise _Cut(f"the connection to {host} was cut after {have} of {total} bytes")


@contextlib.contextmanager
def _answer(
    session: requests.Session, address: str, headers: dict[str, str]
) -> Iterator[requests.Response]:
    """The answer that holds the file, after redirects and Drive's page of confirmation."""
    start, is_confirmed = address, False
    for _ in range(_MOST_REDIRECTS):
        _refuse_plain(address, start)
        with session.get(
            address, headers=headers, stream=True, timeout=_SECONDS, allow_redirects=False
        ) as answer:
            host = urlsplit(address).hostname
            if answer.is_redirect:
                address = urljoin(address, answer.headers["Location"])
                continue
            if answer.status_code >= 500:
                raise _Cut(f"{host} has a fault of its own ({answer.status_code})")
            kind, says = answer.headers.get("Content-Type", "").lower(), ""
            is_page = kind.startswith("text/html")
            if is_page:
                text = _text(answer)
                if answer.ok and not is_confirmed and (link := _confirmed(text)):
                    address, is_confirmed = urljoin(address, link), True
                    continue
                says = _says(text)
            if is_page and answer.ok:
                raise DownloadFault(f"{host} sends a page in place of the file{says}")
            if answer.status_code not in (200, 206, 416):
                what = _STATUS.get(answer.status_code, "answers with an error")
                raise DownloadFault(f"{host} {what} ({answer.status_code}){says}")
            yield answer
            return
    raise DownloadFault(f"{urlsplit(start).hostname} leads on and on ({_MOST_REDIRECTS} times)")


def _direct(address: str) -> str:
    """The address of the file where the published one is that of a page to look at it."""
    found = _DRIVE_FILE.match(address)
    return f"https://drive.google.com/uc?export=download&id={found[1]}" if found else address


def _text(answer: Any) -> str:
    """The beginning of a page: it is read, never run."""
    return next(answer.iter_content(_PAGE_BYTES), b"").decode(errors="replace")


def _confirmed(page: str) -> str:
    """Where the page leads that Drive puts before a file too large for its virus scan; or ""."""
    from gdown.download import get_url_from_gdrive_confirmation
    from gdown.exceptions import FileURLRetrievalError

    if "download" not in page:
        return ""
    try:
        return get_url_from_gdrive_confirmation(page)
    except (FileURLRetrievalError, AssertionError, KeyError):  # of quota, login, something new
        return ""


def _says(page: str) -> str:
    """What a page says of itself, for a message."""
    found = re.search(r'class="uc-error-subcaption">([^<]+)', page) or re.search(
        r"<title[^>]*>([^<]+)", page, re.IGNORECASE
    )
    return f": {brief(' '.join(found[1].split()))}" if found else ""


def _refuse_plain(address: str, start: str) -> None:
    """Refuse an address without encryption, but for one that begins on this machine."""
    to, of = urlsplit(address), urlsplit(start)
    is_own = to.hostname in _OWN_HOSTS and of.hostname in _OWN_HOSTS and of.scheme == "http"
    if to.scheme != "https" and not (is_own and to.scheme == "http"):
        raise DownloadFault(
            f"{of.hostname} leads to {brief(address)}, which is not https: anybody on the way "
            "could have changed the file"
        )


def _refuse_size(size: int, most: int) -> None:
    if size > most:
        raise DownloadFault(
            f"the file has more than {most / 1e6:.0f} MB, the most that is taken: it is another "
            "one than was published"
        )


def _refuse_full_disk(part: Path, missing: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if missing > free:
        raise DownloadFault(
            f"{missing / 1e6:.0f} MB are still to come and {free / 1e6:.0f} MB are free in "
            f"{part.parent}: free some space, or give another folder by SPARSEINST_WEIGHTS"
        )


def _facts_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _reason(error: BaseException) -> str:
    """The innermost reason of a chain of errors of libraries, in a few words."""
    for _ in range(10):
        inner = getattr(error, "reason", None) or error.__cause__ or error.__context__
        inner = inner or next((each for each in error.args if isinstance(each, Exception)), None)
        if not isinstance(inner, BaseException):
            break
        error = inner
    return brief(str(error).rpartition(": ")[2] or type(error).__name__).strip("'\"")
