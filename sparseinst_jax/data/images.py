"""Read image files of any kind as RGB."""

import os
import struct

import numpy as np
from PIL import Image, ImageOps

# What Pillow raises, depending on the format, for a file that is broken, cut off or far too large.
_DECODING_ERRORS = (
    OSError,
    SyntaxError,
    EOFError,
    ValueError,
    struct.error,
    Image.DecompressionBombError,
)


def read_image(path: str | os.PathLike) -> np.ndarray:
    """Read any image that Pillow knows as RGB.

    The EXIF orientation is applied, transparency is dropped as Pillow's ``convert`` does
    (detectron2 too), grey, palette and CMYK are converted, 16 bit keeps the upper eight, of an
    animation the first frame is taken.

    Returns:
        uint8 [h, w, 3].

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be read as an image; names it.
    """
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            return np.array(_to_rgb(image))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"image {path} does not exist; check the path (of a data set: the image folder and the "
            "json's file_name)"
        ) from None
    except _DECODING_ERRORS as error:
        raise ValueError(
            f"image {path} cannot be read ({error}); replace the file or leave it out"
        ) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        # convert("RGB") would clip everything above 255 to white.
        values = np.asarray(image).astype(np.float64)
        if image.mode != "F" and values.max(initial=0) > 255:
            values = values // 256
        image = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
    return image.convert("RGB")
