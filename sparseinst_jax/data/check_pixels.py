"""Open the images of a data set and find what is wrong with them and with the masks on them."""

from typing import NamedTuple

import numpy as np
from pycocotools import mask as rle

from sparseinst_jax.data.coco import encode_segmentation, read_image, size_fault
from sparseinst_jax.data.faults import Fault
from sparseinst_jax.data.images import read_header
from sparseinst_jax.data.records import ImageRecord

# An image of fewer grey levels is nearly black to the network: 12 bits in a file of 16, mostly.
MIN_LEVELS = 24


class ImageFindings(NamedTuple):
    """What opening one image told.

    Attributes:
        kind: format and mode, such as "JPEG RGB", "animated" after it; empty if it cannot be read.
        faults: of the image and its annotations.
    """

    kind: str
    faults: list[Fault]

    @property
    def is_readable(self) -> bool:
        """Whether the image can be shown with its annotations."""
        return bool(self.kind) and not any(fault.is_fatal for fault in self.faults)


def check_image(record: ImageRecord) -> ImageFindings:
    """Decode an image whole, compare it with the json, and look for masks without a pixel.

    Args:
        record: with an image; that of a missing file finds nothing, the rules of the json name it.
    """
    faults: list[Fault] = []
    kind = ""
    try:
        header = read_header(record.open(), record.source)
        image = read_image(record.open(), record.source)
    except FileNotFoundError:
        pass
    except ValueError as error:
        faults.append(Fault("image that cannot be read", f"image {record.image_id}: {error}"))
    else:
        kind = header.kind + ", animated" * header.is_animated
        if image.shape[:2] != (record.height, record.width):
            message = size_fault(record, image.shape[0], image.shape[1])
            faults.append(
                Fault(
                    "image of another size than the json's", f"image {record.image_id}: {message}"
                )
            )
        levels = int(np.ptp(image)) + 1 if image.size else 0
        if levels < MIN_LEVELS:
            faults.append(_few_levels(record, kind, levels))
    for annotation in record.annotations:
        if not _area(annotation.segmentation, record):
            faults.append(
                Fault(
                    "mask without a pixel",
                    f"annotation {annotation.id} ({record.file_name}): its mask has no pixel in "
                    "the image; it is left out",
                    is_fatal=False,
                )
            )
    return ImageFindings(kind, faults)


def _few_levels(record: ImageRecord, kind: str, levels: int) -> Fault:
    return Fault(
        "image of few levels",
        f"image {record.image_id}: {record.source} ({kind}) has only {levels} of 256 levels when "
        "read as 8 bits: of 16 bits the upper eight are used. If its values use fewer, stretch "
        "them to the whole range and save the image anew",
        is_fatal=False,
    )


def _area(segmentation: list | dict, record: ImageRecord) -> int:
    encoded = encode_segmentation(segmentation, record.height, record.width)
    return int(np.sum(rle.area(encoded)))  # type: ignore[arg-type]
