"""Image files: which may be opened, and how they are read as RGB.

A json often comes from someone else. What it names is opened, decoded and drawn, so it must not
lead to other files of the machine, nor to a device or a pipe that never ends.
"""

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PureWindowsPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from sparseinst_jax.runtime.messages import acting_character, brief, printable

MAX_NAME = 4096  # characters of a file_name: no path may be longer on Linux
_SUSPECT = re.compile(r"^$|^[/\\]|^[A-Za-z]:|://|(?:^|[/\\])\.\.(?:[/\\]|$)")
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
    """Make sure that a path below a folder does not leave it by a symbolic link.

    The folder itself may be reached by links. A file that does not exist passes.

    Raises:
        PathError: it leaves the folder.
    """
    root, target = os.path.realpath(folder), os.path.realpath(path)
    if target != root and not target.startswith(os.path.join(root, "")):
        raise PathError(
            f"image {path} leads by a symbolic link to {target}, out of the image folder {folder}; "
            "copy the file into the folder, or give as image folder the one that holds it"
        )


def refuse_no_regular_file(path: str | os.PathLike, name: object = None) -> None:
    """Refuse folders, devices, pipes and sockets before they are opened: a pipe would wait.

    Raises:
        PathError: describes what it is.
        FileNotFoundError: there is nothing.
    """
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


ImageLike = str | os.PathLike | Image.Image | np.ndarray

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
    with _upright(file, name) as image:
        return _to_rgb(image)


def as_rgb(image: ImageLike) -> np.ndarray:
    """Read or convert an image to uint8 [h, w, 3], RGB.

    Args:
        image: a path, a Pillow image, or an array uint8 [h, w], [h, w, 1], [h, w, 3] (RGB) or
            [h, w, 4] (RGBA; transparency is dropped).

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: the file cannot be read, or the array is of another kind.
    """
    if isinstance(image, (str, os.PathLike)):
        return read_image(image)
    if isinstance(image, Image.Image):
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith(("I", "F")):
            raise ValueError(
                f"expected an image of 8 bits a channel, got Pillow mode {upright.mode}: convert "
                "it, or give the path of the file"
            )
        return np.array(upright.convert("RGB"))
    array = np.asarray(image)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise ValueError(
            f"expected a uint8 array [h, w, 3] (RGB), got {array.dtype} {list(np.shape(image))}: "
            "scale to 0...255, convert, and put the channels last"
        )
    if not array.size:
        raise ValueError(f"expected an image, got an empty array {list(array.shape)}")
    return np.ascontiguousarray(
        np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array[:, :, :3]
    )


@contextmanager
def _upright(file: str | os.PathLike | BinaryIO, name: object = None) -> Iterator[Image.Image]:
    """Open an image with its EXIF orientation applied; errors name it."""
    with _opened(file, name) as image:
        ImageOps.exif_transpose(image, in_place=True)  # else a copy, also of what is upright
        yield image


@contextmanager
def _opened(file: str | os.PathLike | BinaryIO, name: object = None) -> Iterator[Image.Image]:
    """Open an image as it is stored; errors, also those of decoding it later, name it."""
    name = file if name is None else name
    try:
        if isinstance(file, str | os.PathLike):
            refuse_no_regular_file(file, name)
        with Image.open(file, formats=_formats()) as image:
            _refuse_bomb(image, name)
            yield image
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
    """What is written in the head of an image file.

    Attributes:
        kind: format and mode, such as "JPEG RGB" or "PNG I;16".
        stored_size: (height, width) in pixels before the EXIF orientation is applied.
        orientation: of the EXIF data, 1 where there are none; 5 to 8 turn by a quarter.
        is_animated: or has several pages; the first is taken.
    """

    kind: str
    stored_size: tuple[int, int]
    orientation: int
    is_animated: bool


def read_header(file: str | os.PathLike | BinaryIO, name: object = None) -> ImageHeader:
    """Read the head of an image file, no pixel; see `read_image`.

    Raises:
        FileNotFoundError, ValueError: as `read_image`.
    """
    with _opened(file, name) as image:
        return ImageHeader(
            f"{image.format} {image.mode}",
            (image.height, image.width),
            int(image.getexif().get(ExifTags.Base.Orientation, 1) or 1),
            bool(getattr(image, "is_animated", False)),
        )


def read_size(path: str | os.PathLike) -> tuple[int, int]:
    """The (height, width) that `read_image` would give; decodes the file, so a broken one fails.

    Raises:
        FileNotFoundError, ValueError: as `read_image`.
    """
    with _upright(path) as image:
        return image.height, image.width


def _why_values_change(image: Image.Image) -> str | None:
    """What keeps the pixel values of an opened image from being read as they were meant."""
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

    Args:
        file: path, or an open file.
        name: what a message calls it.

    Returns:
        integers [h, w], or [h, w, c] where the image has several channels; upright.

    Raises:
        FileNotFoundError, ValueError: as `read_image`; also where the values that are read would
            not be those that were meant.
    """
    with _opened(file, name) as image:
        if (reason := _why_values_change(image)) is not None:
            raise _Refused(f"image {name} {reason}")
        ImageOps.exif_transpose(image, in_place=True)
        values = np.array(image)
    if values.dtype == bool:
        return values.astype(np.uint8)
    if values.dtype.kind == "f":
        raise ValueError(f"image {name} holds fractions; save the values as 8 or 16 bit integers")
    return values
