"""Read image files of any kind as RGB."""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

ImageLike = str | os.PathLike | Image.Image | np.ndarray
# What Pillow raises, depending on the format, for a file that is broken, cut off or far too large.
_DECODING_ERRORS = (
    OSError,
    SyntaxError,
    EOFError,
    ValueError,
    struct.error,
    Image.DecompressionBombError,
)


def read_image(file: str | os.PathLike | BinaryIO, name: object = None) -> np.ndarray:
    """Read any image that Pillow knows as RGB.

    The EXIF orientation is applied, transparency is dropped as Pillow's ``convert`` does
    (detectron2 too), grey, palette and CMYK are converted, 16 bit keeps the upper eight, fractions
    in 0...1 become 0...255, of an animation or of several pages the first is taken.

    Args:
        file: path, or an open file.
        name: what a message calls it; by default the path.

    Returns:
        uint8 [h, w, 3].

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be read as an image; names it.
    """
    with _upright(file, name) as image:
        return np.array(_to_rgb(image))


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
        yield ImageOps.exif_transpose(image)


@contextmanager
def _opened(file: str | os.PathLike | BinaryIO, name: object = None) -> Iterator[Image.Image]:
    """Open an image as it is stored; errors, also those of decoding it later, name it."""
    name = file if name is None else name
    try:
        with Image.open(file) as image:
            yield image
    except FileNotFoundError:
        raise FileNotFoundError(
            f"image {name} does not exist; check the path (of a data set: the image folder and the "
            "json's file_name)"
        ) from None
    except UnidentifiedImageError as error:
        raise ValueError(
            f"image {name} cannot be read: it is damaged, no image, or of a kind that Pillow does "
            "not know; replace the file, convert it to JPEG or PNG, or leave it out"
        ) from error
    except _DECODING_ERRORS as error:
        raise ValueError(
            f"image {name} cannot be read ({error}); replace the file or leave it out"
        ) from error


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
    return image.convert("RGB")


class ImageHeader(NamedTuple):
    """What a file says of itself.

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
    """Read what an image file says of itself, no pixel; see `read_image`.

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


def read_values(file: str | os.PathLike | BinaryIO, name: str) -> np.ndarray:
    """Read pixel values as they are stored: palette indices, 16 bit, no conversion of colours.

    Args:
        file: path, or an open file.
        name: what a message calls it.

    Returns:
        integers [h, w], or [h, w, c] where the image has several channels; upright.

    Raises:
        FileNotFoundError, ValueError: as `read_image`.
    """
    with _upright(file, name) as image:
        values = np.array(image)
    if values.dtype == bool:
        return values.astype(np.uint8)
    if values.dtype.kind == "f":
        raise ValueError(f"image {name} holds fractions; save the values as 8 or 16 bit integers")
    return values
