"""One image of a data set: its objects, and where its pixels are."""

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

from sparseinst_jax.data.images.paths import refuse_outside

Segmentation = list | dict
BoxXYXY = tuple[float, float, float, float]


class Annotation(NamedTuple):
    """One object: ``label`` in 0 ... K-1, ``area`` in px², ``id`` the json's own.

    ``box_xyxy`` (pixels) is read only where a recipe decides by boxes.
    """

    label: int
    segmentation: Segmentation
    iscrowd: bool
    area: float
    id: int
    box_xyxy: BoxXYXY | None = None


@dataclass(slots=True)
class ImageRecord:
    """One image of the json.

    ``path`` is None when no image folder was given; ``encoded`` reads the bytes of an image that is
    no file of its own, and ``origin`` says where it does. A path does not leave ``folder``, if that
    is set.
    """

    image_id: int
    file_name: str
    path: str | None
    height: int
    width: int
    annotations: list[Annotation] = field(default_factory=list)
    encoded: Callable[[], bytes] | None = field(default=None, compare=False, repr=False)
    origin: str = field(default="", compare=False, repr=False)
    folder: str | None = field(default=None, compare=False, repr=False)

    @property
    def has_image(self) -> bool:
        """Whether the image can be asked for."""
        return self.path is not None or self.encoded is not None

    @property
    def source(self) -> str:
        """What messages call the image."""
        return self.path or f"{self.file_name}{self.origin}"

    def open(self) -> str | BinaryIO:
        """The path of the image, or its encoded bytes as a file.

        Raises:
            ValueError: the path leaves its folder by a symbolic link.
        """
        if self.encoded is not None:
            return io.BytesIO(self.encoded())
        assert self.path is not None, "the index was made with an image folder"
        if self.folder is not None:
            refuse_outside(self.folder, self.path)
        return self.path

    @property
    def targets(self) -> list[Annotation]:
        """The objects that training learns from: all but the crowd regions."""
        return [annotation for annotation in self.annotations if not annotation.iscrowd]
