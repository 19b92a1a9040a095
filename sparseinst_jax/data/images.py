"""Image files: which may be opened, and how they are read as RGB.

A json often comes from someone else. What it names is opened, decoded and drawn, so it must not
lead to other files of the machine, nor to a device or a pipe that never ends.
"""

import io
import logging
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path, PureWindowsPath
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from sparseinst_jax.runtime.messages import acting_character, brief, printable

MAX_NAME = 4096  # characters of a file_name: no path may be longer on Linux
_SUSPECT = re.compile(r"^$|^[/\\]|^[A-Za-z]:|://|(?:^|[/\\])\.\.(?:[/\\]|$)")
# What a web page or a store is named by; pathlib makes one slash of two.
_ADDRESS = re.compile(r"[A-Za-z][\w+.-]+:/|data:")
_CURE = "move the images into the image folder, and name them relative to it in the json"


class PathError(ValueError):
    """An image file that may not be opened."""


def name_fault(name: str) -> str | None:
    """Why a `file_name` cannot be in the image folder; None if it can.

    No file is looked at.
    """
    acting = acting_character(name)
    if acting is None and len(name) <= MAX_NAME and not _SUSPECT.search(name):
        return None
    if len(name) > MAX_NAME:
        return f"file_name has {len(name)} characters, a path has at most {MAX_NAME}: {brief(name)}"
    if acting is not None:
        return f"file_name {brief(name)} holds the control character {acting!r}; rename the file"
    windows = PureWindowsPath(name)
    if not name:
        reason = "is empty"
    elif "://" in name:
        reason = "is an address, not a file: nothing is downloaded"
    elif name[0] in "/\\" or windows.is_absolute():
        reason = "is an absolute path"
    elif ".." in windows.parts:
        reason = "leads upwards by '..'"
    elif windows.drive:
        reason = "names a drive"
    else:
        return None
    return f"file_name {brief(name)} {reason}; {_CURE}"


def refuse_outside(folder: str, path: str) -> None:
    """Refuse (PathError) a path below a folder that leaves it by a symbolic link.

    The folder itself may be reached by links. A file that does not exist passes.
    """
    root, target = os.path.realpath(folder), os.path.realpath(path)
    if not Path(target).is_relative_to(root):
        raise PathError(
            f"image {path} leads by a symbolic link to {target}, out of the image folder {folder}; "
            "copy the file into the folder, or give as image folder the one that holds it"
        )


def refuse_address(path: str | os.PathLike) -> None:
    """Refuse (PathError) what names a page or an object of a store, unless there is such a file."""
    if _ADDRESS.match(os.fspath(path)) and not os.path.exists(path):
        raise PathError(
            f"image {brief(os.fspath(path))} is an address, not a file, and nothing is downloaded: "
            "fetch it first, then give the file or its bytes"
        )


def refuse_no_regular_file(path: str | os.PathLike, name: object = None) -> None:
    """Refuse (PathError) folders, devices, pipes and sockets, unopened: a pipe would wait."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kinds = (
            (stat.S_ISDIR, "a folder"),
            (stat.S_ISFIFO, "a pipe"),
            (stat.S_ISSOCK, "a socket"),
        )
        kind = next((kind for is_kind, kind in kinds if is_kind(mode)), "a device")
        raise PathError(f"image {path if name is None else name} is {kind}; expected a file")


class FolderRule:
    """`refuse_outside` made fast for the many files of one folder."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._has_passed: set[str] = set()  # folders below it

    def state(self, path: str) -> tuple[bool, str | None]:
        """Whether there is a regular file, and why it must still not be opened."""
        try:
            mode = os.lstat(path).st_mode
            parent = os.path.dirname(path)
            if stat.S_ISLNK(mode) or parent not in self._has_passed:
                refuse_outside(self._folder, path)
                if not stat.S_ISLNK(mode):
                    self._has_passed.add(parent)
            refuse_no_regular_file(path)
        except PathError as error:
            return True, str(error)
        except (OSError, ValueError):  # ValueError: a zero byte in the path
            return False, None
        return True, None


ImageLike = str | os.PathLike | bytes | BinaryIO | Image.Image | np.ndarray

# What is read of what Pillow can. Some other kinds are handed to other programs (EPS to
# Ghostscript), or to code that few have looked at. HEIF is there where its plugin is installed.
FORMATS = (
    *("JPEG", "PNG", "WEBP", "TIFF", "BMP", "DIB", "GIF", "PPM", "JPEG2000", "AVIF", "HEIF"),
    "TGA",  # the last: it has no mark at its beginning
)
# Pillow's own limit, which a program may have lifted: 0.5 GB as RGB, up to 5 GB while 16 bits a
# channel become 8. A file of a few kilobytes can claim any size.
MAX_PIXELS = 178_956_970
MAX_BYTES = 1 << 30  # of a file: more than that many pixels need uncompressed
# A progressive JPEG is decoded once more for each of its scans, and a scan of nothing takes a
# hundred bytes. Encoders write about ten.
MAX_SCANS = 64
_CHUNK = 1 << 20
_LOSSY = frozenset(("JPEG", "MPO", "JPEG2000", "AVIF", "HEIF"))
Value = TypeVar("Value")
_warned: list[object] = []  # the image that this process warned of


class _Refused(ValueError):
    """An image that Pillow would read but should not."""


def read_image(file: str | os.PathLike | BinaryIO, name: object = None) -> np.ndarray:
    """Read an image of any of `FORMATS` as RGB.

    The EXIF orientation is applied, transparency is dropped as Pillow's ``convert`` does, grey,
    palette and CMYK are converted, 16 bit keeps the upper eight, fractions in 0...1 become 0...255,
    of an animation or of several pages the first is taken.

    Args:
        file: path, or an open file.
        name: what a message calls it; by default the path.

    Returns:
        uint8 [h, w, 3].

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be read as an image; names it.
    """
    return np.array(read_picture(file, name))


def read_picture(file: str | os.PathLike | BinaryIO, name: object = None) -> Image.Image:
    """Read an image as `read_image` does, but as Pillow's: what it does next needs no copies."""
    return _read(file, name, lambda *opened: _to_rgb(_upright(*opened)))


def as_rgb(image: ImageLike) -> np.ndarray:
    """Read or convert an image to uint8 [h, w, 3], RGB; always an array of its own.

    Args:
        image: a path, the bytes of an image file, a file open for reading, a Pillow image, or an
            array uint8 [h, w], [h, w, 1], [h, w, 3] (RGB) or [h, w, 4] (RGBA; transparency is
            dropped).

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: it is an address, the file cannot be read, or the array is of another kind.
    """
    if isinstance(image, str | os.PathLike):
        refuse_address(image)
        return read_image(os.path.expanduser(image))
    if isinstance(image, bytes | bytearray | memoryview):
        return read_image(io.BytesIO(image), f"of {len(image)} bytes")
    if callable(getattr(image, "read", None)):
        return read_image(cast(BinaryIO, image), getattr(image, "name", "of an open file"))
    if isinstance(image, Image.Image):
        return _of_pillow(image)
    try:
        array: Any = np.asarray(image)
    except ValueError:  # a list of rows of several lengths
        array = np.empty(0, object)
    shape = list(array.shape)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        got = f"{array.dtype} {shape}"
        kind = "" if hasattr(image, "shape") else f"{type(image).__name__}, as an array "
        raise ValueError(
            "expected an image: a path, a file or its bytes, a Pillow image, or a uint8 array "
            f"[h, w, 3] (RGB), got {kind}{got}: scale an array to 0...255, convert it "
            "(numpy.asarray(..., numpy.uint8)), and put its channels last"
        )
    if not array.size:
        raise ValueError(f"expected an image, got an empty array {list(array.shape)}")
    return np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array[:, :, :3].copy()


def _of_pillow(image: Image.Image) -> np.ndarray:
    if image.mode.startswith(("I", "F")):
        raise ValueError(
            f"expected an image of 8 bits a channel, got Pillow mode {image.mode}: convert "
            "it, or give the path of the file"
        )
    name = getattr(image, "filename", "") or "of Pillow"
    with _naming(name):
        image.load()
        try:
            orientation = _orientation(image)
        except Exception as error:  # Pillow raises almost anything
            _warn_of_metadata(name, error)
            orientation = None
        return np.array(_to_rgb(_upright(image, orientation)))


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 for any other value."""
    value = image.getexif().get(ExifTags.Base.Orientation)
    return value if isinstance(value, int) and value in _TURNS else 1


def _upright(image: Image.Image, orientation: int | None) -> Image.Image:
    """Apply an EXIF orientation. Pillow's `exif_transpose` also writes the EXIF data anew."""
    image.load()
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _read(
    file: str | os.PathLike | BinaryIO,
    name: object,
    use: Callable[[Image.Image, int | None], Value],
    refuse: Callable[[Image.Image, object], None] | None = None,
) -> Value:
    """Open an image as it is stored and make something of it; errors, also of decoding, name it.

    Damaged metadata keep nobody from the pixels: what fails is tried again without them.

    Args:
        file: path, or an open file.
        name: what a message calls it; None: the path.
        use: takes the image and its EXIF orientation, None where the metadata are damaged.
        refuse: looks at the opened image and its name; `_refuse_bomb` by default.
    """
    refuse = refuse or _refuse_bomb
    name = file if name is None else name
    with _naming(name):
        if isinstance(file, str | os.PathLike):
            refuse_no_regular_file(file, name)
        try:
            with Image.open(file, formats=_formats()) as image:
                refuse(image, name)
                return use(image, _orientation(image))
        except Exception as error:
            if isinstance(error, _Refused | MemoryError) or getattr(error, "errno", None):
                raise
            try:
                with Image.open(_without_metadata(file), formats=_formats()) as image:
                    refuse(image, name)
                    value = use(image, None)
            except Exception:
                raise error from None
            _warn_of_metadata(name, error)
            return value


def _without_metadata(file: str | os.PathLike | BinaryIO) -> str | os.PathLike | BinaryIO:
    """The file; of a PNG a copy without text, EXIF and all that does not make its pixels.

    Of other kinds Pillow reads no metadata before they are asked for.
    """
    is_path = isinstance(file, str | os.PathLike)
    with open(file, "rb") if is_path else nullcontext(file) as opened:
        opened.seek(0)
        signature, kept = opened.read(8), []
        size = opened.seek(0, os.SEEK_END)
        if signature != b"\x89PNG\r\n\x1a\n" or size > MAX_BYTES:
            return file
        opened.seek(8)
        while start := opened.read(8):
            content = opened.read(min(int.from_bytes(start[:4]) + 4, size))
            if start[4:5].isupper() or start[4:] == b"tRNS":  # a capital: needed for the pixels
                kept += [start, content]
    return io.BytesIO(b"".join([signature, *kept]))


def _warn_of_metadata(name: object, error: Exception) -> None:
    """Warn of the first such image of this process: there may be thousands."""
    if not _warned:
        _warned.append(name)
        logging.warning(
            "image %s: its metadata are damaged (%s); its pixels are used as they are stored, not"
            " turned. Others like it are read without a word; `sparseinst check-data` counts them.",
            name,
            printable(str(error) or type(error).__name__, 300),
        )


@contextmanager
def _naming(name: object) -> Iterator[None]:
    """Turn what Pillow raises into an error that names the image."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(
            f"image {name} does not exist; check the path (of a data set: the image folder and the "
            "json's file_name)"
        ) from None
    except (PathError, _Refused):
        raise
    except UnidentifiedImageError as error:
        raise ValueError(
            f"image {name} cannot be read: it is damaged, no image, or of a kind that is not read; "
            "replace the file, convert it to JPEG or PNG, or leave it out"
        ) from error
    # For a file that is broken, cut off or too large Pillow raises almost anything.
    except Exception as error:
        reason = printable(str(error) or type(error).__name__, 300)
        raise ValueError(
            f"image {name} cannot be read ({reason}); replace the file or leave it out"
        ) from error


def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow has; asking it for others fails."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def image_suffixes() -> frozenset[str]:
    """The endings of file names of what can be read, such as ".jpg"."""
    kinds = {*_formats(), "MPO"}  # photos of two pictures, read as JPEG
    return frozenset(end for end, kind in Image.registered_extensions().items() if kind in kinds)


def _refuse_bomb(image: Image.Image, name: object) -> None:
    """Refuse, before a pixel is decoded, what would take too much memory or time."""
    fp: Any = image.fp  # type: ignore[attr-defined]
    place = fp.tell()
    num_bytes = fp.seek(0, os.SEEK_END)
    fp.seek(place)
    cure = "make it smaller, or leave it out"
    if image.width * image.height > MAX_PIXELS:
        raise _Refused(
            f"image {name} claims {image.width} x {image.height} pixels, expected "
            f"{MAX_PIXELS} in all or fewer; {cure}"
        )
    if num_bytes > MAX_BYTES:
        raise _Refused(f"image {name} has {num_bytes} bytes, expected {MAX_BYTES} at most; {cure}")
    if image.info.get("progressive") and (scans := _count_scans(fp)) > MAX_SCANS:
        raise _Refused(
            f"image {name} is a JPEG of {scans} scans, expected {MAX_SCANS} at most: each takes "
            "as long as the whole picture; save it again, or leave it out"
        )


def _count_scans(fp: BinaryIO) -> int:
    """Count the marks at which scans of a JPEG begin; inside a scan they cannot occur."""
    place = fp.tell()
    fp.seek(0)
    count, tail = 0, b""
    while chunk := fp.read(_CHUNK):
        count += (tail + chunk).count(b"\xff\xda")
        tail = chunk[-1:]
    fp.seek(place)
    return count


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        # convert("RGB") would clip everything above 255 to white.
        values = np.nan_to_num(np.asarray(image).astype(np.float64))
        if image.mode == "F":
            values = values * 255 if values.max(initial=0) <= 1 else values
        elif values.max(initial=0) > 255:
            values = values // 256
        image = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours; Pillow asks for it with a warning
    return image if image.mode == "RGB" else image.convert("RGB")


class ImageHeader(NamedTuple):
    """What is written in the head of an image file."""

    kind: str  # format and mode, such as "JPEG RGB" or "PNG I;16"
    stored_size: tuple[int, int]  # (height, width) in pixels before the EXIF orientation is applied
    orientation: int  # of the EXIF data, 1 where there are none; 5 to 8 turn by a quarter
    is_animated: bool  # or has several pages; the first is taken
    has_damaged_metadata: bool = False  # the image is read without them


def read_header(file: str | os.PathLike | BinaryIO, name: object = None) -> ImageHeader:
    """Read the head of an image file, no pixel; errors as of `read_image`."""
    return _read(
        file,
        name,
        lambda image, orientation: ImageHeader(
            f"{image.format} {image.mode}",
            (image.height, image.width),
            orientation or 1,
            bool(getattr(image, "is_animated", False)),
            orientation is None,
        ),
    )


def read_size(path: str | os.PathLike) -> tuple[int, int]:
    """The (height, width) that `read_image` would give; decodes the file, and fails as it does."""
    width, height = _read(path, None, lambda *opened: _upright(*opened).size)
    return height, width


def _refuse_changed(image: Image.Image, name: object) -> None:
    """Refuse an opened image whose pixel values are not read as they were meant."""
    _refuse_bomb(image, name)
    if (reason := _why_values_change(image)) is not None:
        raise _Refused(f"image {name} {reason}")


def _why_values_change(image: Image.Image) -> str | None:
    fp: Any = image.fp  # type: ignore[attr-defined]
    place = fp.tell()
    fp.seek(0)
    head = fp.read(64)
    fp.seek(place)
    if image.format in _LOSSY or (image.format == "WEBP" and b"VP8L" not in head):
        return f"is a {image.format} file, a format that changes values; save the values as PNG"
    if (pages := getattr(image, "n_frames", 1)) > 1:
        return f"has {pages} pages, of which one can be read; save each as a file of its own"
    # Pillow reads these as 8 bits, without a word: 257 and 258 become one value.
    parameters = image.tile[0][3] if image.tile else ""  # type: ignore[attr-defined]
    kind = parameters[0] if isinstance(parameters, tuple) and parameters else parameters
    is_deep = ";16" in kind if isinstance(kind, str) else isinstance(kind, int) and kind > 255
    if is_deep and len(image.getbands()) > 1:
        return (
            "has several channels of 16 bits, of which only 8 can be read; save the values as one "
            "channel of 16 bits, or as colours of 8"
        )
    return None


def read_values(file: str | os.PathLike | BinaryIO, name: str) -> np.ndarray:
    """Read pixel values as they are stored: palette indices, 16 bit, no conversion of colours.

    Returns integers [h, w], or [h, w, c] where the image has several channels; upright. Errors are
    those of `read_image`, and one where the values that are read would not be those that were
    meant.
    """
    values = _read(file, name, lambda *opened: np.array(_upright(*opened)), _refuse_changed)
    if values.dtype == bool:
        return values.astype(np.uint8)
    if values.dtype.kind == "f":
        raise ValueError(f"image {name} holds fractions; save the values as 8 or 16 bit integers")
    return values
