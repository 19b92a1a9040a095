"""A TFDS data set of COCO instances, masks included; built and read without TensorFlow.

TFDS's own ``coco`` has no masks. This one keeps the image files' bytes and the segmentations as
json text, in ArrayRecord files, and is read back by ``tfds.data_source``:

    build("tfds_data", {"train": load_coco("train.json", "images/train")})
    source = tfds.data_source("coco_instances", split="train", data_dir="tfds_data")
    record = record_of(source[0])
"""

import io
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import registered

from sparseinst_jax.data.coco import Annotation, CocoDataset, ImageRecord, read_record

# Unregistered: ``tfds.data_source`` then reads the files instead of asking for the splits again.
with registered.skip_registration():

    class CocoInstances(tfds.core.GeneratorBasedBuilder):
        """TFDS builder ``coco_instances``; read it by ``tfds.data_source``.

        Labels are 0 ... K-1 with the json's names; its category ids are in ``info.metadata``.
        """

        VERSION = tfds.core.Version("1.0.0")

        def __init__(self, *, splits: Mapping[str, CocoDataset], **options: Any) -> None:
            self._splits = dict(splits)
            _check_same_classes(self._splits)
            super().__init__(file_format="array_record", **options)

        def _info(self) -> tfds.core.DatasetInfo:
            first = next(iter(self._splits.values()))
            objects = {
                "id": np.int64,
                "label": tfds.features.ClassLabel(names=list(first.class_names)),
                "is_crowd": np.bool_,
                "area": np.float64,
                "segmentation": tfds.features.Text(),
            }
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "image/id": np.int64,
                "image/file_name": tfds.features.Text(),
                "image/height": np.int64,
                "image/width": np.int64,
                "objects": tfds.features.Sequence(objects),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                description="Images and instance masks of a COCO json.",
                features=tfds.features.FeaturesDict(features),
                metadata=tfds.core.MetadataDict({"category_ids": list(first.category_ids)}),
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
            del dl_manager  # nothing is downloaded
            return {name: self._generate_examples(data) for name, data in self._splits.items()}

        def _generate_examples(self, dataset: CocoDataset) -> Iterator[tuple[int, dict[str, Any]]]:
            for record in dataset.records:
                read_record(record)  # refuse a broken image now, with its name
                assert record.path is not None  # or it could not be read
                with open(record.path, "rb") as file:
                    encoded = file.read()
                yield (
                    record.image_id,
                    {
                        "image": io.BytesIO(encoded),
                        "image/id": record.image_id,
                        "image/file_name": record.file_name,
                        "image/height": record.height,
                        "image/width": record.width,
                        "objects": [
                            {
                                "id": annotation.id,
                                "label": annotation.label,
                                "is_crowd": annotation.iscrowd,
                                "area": annotation.area,
                                "segmentation": json.dumps(annotation.segmentation),
                            }
                            for annotation in record.annotations
                        ],
                    },
                )


def _check_same_classes(splits: Mapping[str, CocoDataset]) -> None:
    if not splits:
        raise ValueError("no split was given; expected for example {'train': load_coco(...)}")
    classes = {name: (data.category_ids, data.class_names) for name, data in splits.items()}
    if len(set(classes.values())) > 1:
        raise ValueError(
            f"the splits {sorted(classes)} have different categories: {classes}; give jsons with "
            "the same ids and names"
        )


def build(data_dir: str | os.PathLike, splits: Mapping[str, CocoDataset]) -> CocoInstances:
    """Write a TFDS data set below ``data_dir``, unless it is there already.

    Args:
        data_dir: TFDS folder; the data set goes to ``coco_instances/1.0.0`` in it.
        splits: data sets with image folders, by the name of the split; of the same categories.

    Returns:
        the builder, for ``as_data_source``.

    Raises:
        ValueError: the splits differ in their categories, or an image is broken.
    """
    builder = CocoInstances(splits=splits, data_dir=os.fspath(data_dir))
    builder.download_and_prepare()
    return builder


def record_of(example: Mapping[str, Any]) -> ImageRecord:
    """The record of an example read from the data source; its ``path`` is None."""
    objects = example["objects"]
    columns = (objects[name] for name in ("label", "segmentation", "is_crowd", "area", "id"))
    annotations = [
        Annotation(int(label), json.loads(segmentation), bool(crowd), float(area), int(number))
        for label, segmentation, crowd, area, number in zip(*columns, strict=True)
    ]
    return ImageRecord(
        int(example["image/id"]),
        _text(example["image/file_name"]),
        None,
        int(example["image/height"]),
        int(example["image/width"]),
        annotations,
    )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
