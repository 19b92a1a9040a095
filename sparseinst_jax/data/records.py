"""The records of a data set: objects, images, and all images of a json."""

import functools
import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple, Protocol, overload

import numpy as np

from sparseinst_jax.data._index import columns as stored
from sparseinst_jax.data._index.columns import Columns, read_box, read_segmentation
from sparseinst_jax.data.classes import Classes
from sparseinst_jax.data.images import refuse_outside
from sparseinst_jax.data.segmentations import BoxXYXY, Segmentation
from sparseinst_jax.runtime.files import sha256_of


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
    no file of its own, and ``origin`` tells messages where it is. A path does not leave ``folder``,
    if that is set.
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

        Raises a ValueError if the path leaves its folder by a symbolic link.
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


class StoredImages(Protocol):
    """A source of images that are not separate files; sent to other processes by pickle."""

    name: str

    def read(self, place: int, image_id: int) -> bytes:
        """The encoded bytes of the image at a place of the index."""
        ...


class IndexedRecords(Sequence[ImageRecord]):
    """Records that are made from columns when they are asked for.

    A process that gets them by pickle opens the files of the columns itself, so that all processes
    share one copy in memory.
    """

    def __init__(
        self,
        columns: Columns,
        folder: str | None,
        images: str | StoredImages | None,
        label_of: np.ndarray,
        is_kept: np.ndarray | None = None,
        has_boxes: bool = False,
    ) -> None:
        """Store what the records are made from.

        Args:
            columns: see ``_index.columns``.
            folder: of their files; None where they are in memory.
            images: folder that file names are relative to, or where they come from, if any.
            label_of: label of each category, -1 for those left out.
            is_kept: bool [annotations], which of them count; None for all of the labels.
            has_boxes: whether annotations have boxes.
        """
        self._columns, self._folder, self._images = columns, folder, images
        self._label_of, self._is_kept, self.has_boxes = label_of, is_kept, has_boxes
        self._places = np.arange(len(columns["image_ids"]))  # of the images that are there

    def choose(self, is_chosen: np.ndarray) -> None:
        """Leave out images: bool, one for each that is there now."""
        self._places = self._places[np.flatnonzero(is_chosen)]

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> ImageRecord: ...

    @overload
    def __getitem__(self, index: slice) -> list[ImageRecord]: ...

    def __getitem__(self, index: int | slice) -> ImageRecord | list[ImageRecord]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        place = int(self._places[index])
        name, path = self._file(place)
        image_id = int(self._columns["image_ids"][place])
        record = ImageRecord(
            image_id,
            name,
            path,
            int(self._columns["heights"][place]),
            int(self._columns["widths"][place]),
            list(self._annotations(place)),
        )
        if isinstance(self._images, str):
            record.folder = self._images
        elif self._images is not None:
            record.encoded = functools.partial(self._images.read, place, image_id)
            record.origin = f" of {self._images.name}"
        return record

    def __getstate__(self) -> dict[str, Any]:
        if self._folder is None:
            return self.__dict__
        lengths = {name: len(column) for name, column in self._columns.items()}
        return {**self.__dict__, "_columns": lengths}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._folder is not None:
            self._columns = stored.open_columns(self._folder, state["_columns"])

    def _file(self, place: int) -> tuple[str, str | None]:
        name = stored.file_name(self._columns, place)
        return name, os.path.join(self._images, name) if isinstance(self._images, str) else None

    def _annotations(self, place: int) -> Iterator[Annotation]:
        columns = self._columns
        first, end = columns["annotation_ends"][place : place + 2].tolist()
        labels = self._label_of[columns["categories"][first:end]].tolist()
        for row, label in enumerate(labels, start=first):
            if label < 0 or (self._is_kept is not None and not self._is_kept[row]):
                continue
            area = float(columns["areas"][row])
            yield Annotation(
                label,
                read_segmentation(columns, row, place),
                bool(columns["is_crowd"][row]),
                area if area == area else 0.0,
                int(columns["annotation_ids"][row]),
                read_box(columns, row, place) if self.has_boxes else None,
            )

    def entries(self, category_ids: Sequence[int]) -> list[dict[str, Any]]:
        """The annotations as a json has them, without boxes; an area only where there was one."""
        found = ((record.image_id, each) for record in self for each in record.annotations)
        return [
            {
                "id": annotation.id,
                "image_id": image_id,
                "category_id": category_ids[annotation.label],
                "segmentation": annotation.segmentation,
                "iscrowd": int(annotation.iscrowd),
            }
            | ({"area": area} if area == area else {})
            for (image_id, annotation), area in zip(
                found, self.column("areas").tolist(), strict=True
            )
        ]

    # What follows looks at whole columns and opens no record.

    @property
    def has_files(self) -> bool:
        """Whether the records are of a json, with image files or without images."""
        return self._images is None or isinstance(self._images, str)

    @property
    def files(self) -> list[tuple[str, str | None]]:
        """File name and path of each image."""
        return [self._file(place) for place in self._places.tolist()]

    @property
    def image_ids(self) -> np.ndarray:
        """The json's own ids, int64 [images]."""
        return self._columns["image_ids"][self._places]

    @property
    def image_sizes(self) -> np.ndarray:
        """(height, width) in pixels, int64 [images, 2]."""
        sizes = np.stack([self._columns["heights"], self._columns["widths"]], axis=1)
        return sizes[self._places]

    @property
    def num_targets(self) -> np.ndarray:
        """Number of objects without crowd, int64 [images]."""
        return self._per_image(self._is_target)

    @property
    def num_annotations(self) -> np.ndarray:
        """Number of annotations, with crowd and those that do not count, int64 [images]."""
        return self._per_image(self._is_labelled)

    def num_passing(self, keeps: Callable[[Columns], np.ndarray]) -> np.ndarray:
        """Number of objects without crowd that a filter keeps, int64 [images]."""
        return self._per_image(self._is_target & keeps(self._columns))

    def _per_image(self, is_counted: np.ndarray) -> np.ndarray:
        before = np.concatenate([[0], np.cumsum(is_counted)])[self._columns["annotation_ends"]]
        return np.diff(before)[self._places]

    @property
    def num_filtered(self) -> int:
        """Number of annotations of chosen classes that do not count."""
        return int((self._is_labelled & ~self._is_there).sum())

    @property
    def target_labels(self) -> np.ndarray:
        """Label of every object, without crowd, in the order of the images."""
        return self._labels(self._is_target)

    @property
    def crowd_labels(self) -> np.ndarray:
        """Label of every crowd region."""
        return self._labels(self._is_there & ~self._is_target)

    def _labels(self, is_counted: np.ndarray) -> np.ndarray:
        return self._label_of[self._columns["categories"][is_counted & self._is_in_place]]

    def column(self, name: str) -> np.ndarray:
        """A column of the annotations in the order of `_index.columns`; boxes are [n, 4]."""
        column = self._columns[name]
        is_there = self._is_there & self._is_in_place
        return (column.reshape(-1, 4) if name == "boxes" else column)[is_there]

    @property
    def num_corners(self) -> np.ndarray:
        """Corners of the annotations that are one polygon, 0 of the others, int64."""
        is_one = (self.column("kinds") == stored.POLYGONS) & (self.column("num_parts") == 1)
        lengths = np.append(np.diff(self._columns["polygon_ends"]), 0)
        return np.where(is_one, lengths[self.column("first_parts") * is_one] // 2, 0)

    @property
    def _is_there(self) -> np.ndarray:
        return self._is_labelled if self._is_kept is None else self._is_labelled & self._is_kept

    @property
    def _is_labelled(self) -> np.ndarray:
        return self._label_of[self._columns["categories"]] >= 0

    @property
    def _is_target(self) -> np.ndarray:
        return self._is_there & (self._columns["is_crowd"] == 0)

    @property
    def _is_in_place(self) -> np.ndarray:
        """Which annotations are of images that are there."""
        number = np.diff(self._columns["annotation_ends"])
        is_chosen = np.zeros(len(number), bool)
        is_chosen[self._places] = True
        return np.repeat(is_chosen, number)


class _TargetBoxes(Sequence[np.ndarray]):
    """Boxes of the objects of each image, made when they are asked for."""

    def __init__(self, records: IndexedRecords) -> None:
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        boxes = [target.box_xyxy for target in self._records[index].targets]
        return np.array(boxes, np.float32).reshape(-1, 4)


@dataclass(slots=True)
class CocoDataset:
    """The records of a COCO json, in its order.

    ``category_ids[label]`` is the json's id of a label. ``num_without_mask`` counts the objects
    that were left out because no polygon of theirs has three corners.
    ``classes`` is set when classes were chosen or merged: the json's own ids and names then differ;
    ``num_left_out`` counts the objects of classes that were not chosen, ``num_filtered`` those that
    the annotation filter left out.

    ``records`` are made when they are asked for. What only counts asks the properties here, which
    open no record.
    """

    records: IndexedRecords
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    has_annotations: bool
    annotations_path: str
    num_without_mask: int = 0
    classes: Classes | None = None
    num_left_out: int = 0
    num_filtered: int = 0

    @property
    def truth(self) -> str | dict[str, Any]:
        """What detections are scored against: the path of the json, or its content without one."""
        if self.records.has_files:
            return self.annotations_path
        sizes, names = self.image_sizes.tolist(), self.files
        return {
            "images": [
                {"id": image_id, "file_name": name, "height": height, "width": width}
                for image_id, (name, _), (height, width) in zip(
                    self.records.image_ids.tolist(), names, sizes, strict=True
                )
            ],
            "annotations": self.records.entries(self.category_ids),
            "categories": [
                {"id": category_id, "name": name}
                for category_id, name in zip(self.category_ids, self.class_names, strict=True)
            ],
        }

    @property
    def num_targets(self) -> np.ndarray:
        """Number of objects without crowd, int64 [images]."""
        return self.records.num_targets

    @property
    def image_ids(self) -> np.ndarray:
        """The json's own ids, int64 [images]."""
        return self.records.image_ids

    @property
    def image_sizes(self) -> np.ndarray:
        """(height, width) in pixels, int64 [images, 2]."""
        return self.records.image_sizes

    @property
    def crowd_per_class(self) -> np.ndarray:
        """Number of crowd regions of each label, int64 [classes]."""
        return np.bincount(self.records.crowd_labels, minlength=len(self.class_names))

    @property
    def targets_per_class(self) -> np.ndarray:
        """Number of objects of each label, without crowd, int64 [classes]."""
        return np.bincount(self.records.target_labels, minlength=len(self.class_names))

    @property
    def boxes_xyxy(self) -> Sequence[np.ndarray] | None:
        """Boxes of the objects of each image, float32 [objects, 4]; None where none were read."""
        return _TargetBoxes(self.records) if self.records.has_boxes else None

    @property
    def files(self) -> list[tuple[str, str | None]]:
        """File name and path of each image."""
        return self.records.files


def fingerprint(dataset: CocoDataset) -> dict[str, str | int]:
    """Identify a data set: the hash of its annotations, and the number of chosen images.

    Of a json the hash is that of its bytes; of other data sets that of the ids and sizes of their
    images and the labels of their objects. Pixels are not looked at: that would take hours.

    Returns:
        `sha256` and `images`.
    """
    if os.path.isfile(dataset.annotations_path):
        sha256 = sha256_of(dataset.annotations_path)
    else:
        digest = hashlib.sha256()
        columns = dataset.image_ids, dataset.image_sizes, dataset.num_targets
        for column in (*columns, dataset.records.target_labels):
            digest.update(np.ascontiguousarray(column).tobytes())
        sha256 = digest.hexdigest()
    return {"sha256": sha256, "images": len(dataset.records)}
