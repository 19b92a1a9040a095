"""What a COCO json comes to: objects, images and the data set."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from sparseinst_jax.data.classes import Classes

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
    """One image of the json; ``path`` is None when no image folder was given."""

    image_id: int
    file_name: str
    path: str | None
    height: int
    width: int
    annotations: list[Annotation] = field(default_factory=list)

    @property
    def targets(self) -> list[Annotation]:
        """The objects that training learns from: all but the crowd regions."""
        return [annotation for annotation in self.annotations if not annotation.iscrowd]


@dataclass(slots=True)
class CocoDataset:
    """The records of a COCO json, in its order.

    ``category_ids[label]`` is the json's id of a label. ``num_without_mask`` counts the objects
    that were left out because no polygon of theirs has three corners (as detectron2 does).
    ``classes`` is set when classes were chosen or merged: the json's own ids and names then differ;
    ``num_left_out`` counts the objects of classes that were not chosen, ``num_filtered`` those that
    the annotation filter left out.
    """

    records: list[ImageRecord]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    has_annotations: bool
    annotations_path: str
    num_without_mask: int = 0
    classes: Classes | None = None
    num_left_out: int = 0
    num_filtered: int = 0

    @property
    def num_targets(self) -> np.ndarray:
        """Number of objects without crowd, int64 [images]."""
        return np.array([len(record.targets) for record in self.records], np.int64)

    @property
    def boxes_xyxy(self) -> list[np.ndarray] | None:
        """Boxes of the objects of each image, float32 [objects, 4]; None where none were read."""
        targets = [record.targets for record in self.records]
        if any(target.box_xyxy is None for image in targets for target in image):
            return None
        return [
            np.array([target.box_xyxy for target in image], np.float32).reshape(-1, 4)
            for image in targets
        ]

    @property
    def image_sizes(self) -> np.ndarray:
        """(height, width) in pixels, int64 [images, 2]."""
        return np.array([(r.height, r.width) for r in self.records], np.int64).reshape(-1, 2)
