"""A TFDS data set of COCO instances, masks included; built without TensorFlow.

TFDS's own ``coco`` has no masks. This one keeps the image files' bytes and the segmentations as
json text, in ArrayRecord files in the order of the json, and beside them the index of the json, so
that ``tfds_source`` need not read the images to plan batches. Other programs read it by TFDS alone:

    build("tfds_data", {"train": Source("train.json", "images/train")})
    source = tfds.data_source("coco_instances", split="train", data_dir="tfds_data")
    record = record_of(source[0])
"""

import contextlib
import functools
import io
import itertools
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import registered

from sparseinst_jax.data.annotations import coco_json
from sparseinst_jax.data.coco import Selection, make_dataset, note_missing, read_record
from sparseinst_jax.data.index.cache import read_index
from sparseinst_jax.data.index.coco_index import CocoIndex, save_index
from sparseinst_jax.data.index.records import Annotation, CocoDataset, ImageRecord

NAME, VERSION = "coco_instances", "1.0.0"
SHARD_SIZE = 128 << 20  # bytes of images in a shard, which is in memory while it is written
NUM_THREADS = 4  # that decode images, to refuse a broken one


class Source(NamedTuple):
    """What a split is made of: a COCO json and the folder that its file names are relative to."""

    annotations: str | os.PathLike
    images: str | os.PathLike


class _Split(NamedTuple):
    index: CocoIndex
    dataset: CocoDataset


def index_folder(directory: str | os.PathLike, split: str) -> Path:
    """Where the index of a split lies in the folder of the data set."""
    return Path(directory) / f"index-{split}"


# Unregistered: ``tfds.data_source`` then reads the files instead of asking for the splits again.
with registered.skip_registration():

    class CocoInstances(tfds.core.ShardBasedBuilder):
        """TFDS builder ``coco_instances``; read it by ``tfds.data_source``.

        Labels are 0 ... K-1 with the json's names; its category ids are in ``info.metadata``.
        """

        VERSION = tfds.core.Version(VERSION)

        def __init__(
            self, *, splits: Mapping[str, _Split], say_done: Callable[[int], None], **options: Any
        ) -> None:
            self._splits, self._say_done = dict(splits), say_done
            super().__init__(file_format="array_record", **options)

        def _info(self) -> tfds.core.DatasetInfo:
            first = next(iter(self._splits.values())).dataset
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
                disable_shuffling=True,  # in the order of the json
            )

        def _shard_iterators_per_split(
            self, dl_manager: Any
        ) -> dict[str, list[Callable[[], Iterator[tuple[int, dict[str, Any]]]]]]:
            del dl_manager  # nothing is downloaded
            shards = {}
            for name, split in self._splits.items():
                folder = index_folder(self.data_dir, name)
                folder.mkdir()
                save_index(split.index, folder)
                number = len(split.dataset.records)
                count = max(1, min(number, math.ceil(_num_bytes(split.dataset) / SHARD_SIZE)))
                ends = [number * place // count for place in range(count + 1)]
                shards[name] = [
                    functools.partial(self._examples, split.dataset, range(first, end))
                    for first, end in itertools.pairwise(ends)
                ]
            return shards

        def _examples(
            self, dataset: CocoDataset, places: Sequence[int]
        ) -> Iterator[tuple[int, dict[str, Any]]]:
            with ThreadPoolExecutor(NUM_THREADS) as pool:
                waiting = deque()
                for place in places:
                    waiting.append(pool.submit(_checked, dataset.records[place]))
                    if len(waiting) > 2 * NUM_THREADS:
                        yield self._example(places.index(place), *waiting.popleft().result())
                while waiting:
                    yield self._example(len(places) - len(waiting), *waiting.popleft().result())

        def _example(
            self, key: int, record: ImageRecord, encoded: bytes
        ) -> tuple[int, dict[str, Any]]:
            self._say_done(1)
            return (
                key,
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


def _checked(record: ImageRecord) -> tuple[ImageRecord, bytes]:
    """A record and the bytes of its image; a broken one is refused now, with its name."""
    read_record(record)
    assert record.path is not None, "splits are made of image files"
    return record, Path(record.path).read_bytes()


def _num_bytes(dataset: CocoDataset) -> int:
    return sum(os.path.getsize(path) for _, path in dataset.files if path is not None)


def build(
    data_dir: str | os.PathLike,
    sources: Mapping[str, Source],
    *,
    start: Callable[[int], contextlib.AbstractContextManager[Callable[[int], None]]] | None = None,
) -> Path:
    """Write a TFDS data set below ``data_dir``: whole, or nothing.

    Args:
        data_dir: TFDS folder; the data set goes to ``coco_instances/1.0.0`` in it.
        sources: what the splits are made of, by their names; of the same categories.
        start: takes the number of images when all jsons are read, and gives a context in which a
            function is told how many images more are written.

    Returns:
        the folder of the data set.

    Raises:
        FileNotFoundError: a json or an image folder does not exist.
        ValueError: there is a data set already, a json has faults, the splits differ in their
            categories, or an image is broken.
    """
    folder = Path(data_dir) / NAME / VERSION
    if folder.exists():
        raise ValueError(f"{folder} exists already: give another folder by --output, or remove it")
    splits = {name: _read(source) for name, source in sources.items()}
    _check_same_classes({name: split.dataset for name, split in splits.items()})
    number = sum(len(split.dataset.records) for split in splits.values())
    start = start or (lambda _: contextlib.nullcontext(lambda _: None))
    with start(number) as say_done, contextlib.redirect_stdout(io.StringIO()):
        builder = CocoInstances(splits=splits, say_done=say_done, data_dir=os.fspath(data_dir))
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(
                compute_stats=tfds.download.ComputeStatsMode.SKIP, try_download_gcs=False
            )
        )
    return folder


def _read(source: Source) -> _Split:
    path = Path(source.annotations)
    coco_json.refuse_no_file(path)
    coco_json.refuse_no_folder(Path(source.images), path)
    index = read_index(path)
    dataset, faults = make_dataset(index, str(path), os.fspath(source.images), Selection())
    note_missing(dataset, Path(source.images), faults)
    faults.raise_if_fatal()
    return _Split(index, dataset)


def _check_same_classes(splits: Mapping[str, CocoDataset]) -> None:
    if not splits:
        raise ValueError("no split was given; expected for example {'train': Source(...)}")
    classes = {name: (data.category_ids, data.class_names) for name, data in splits.items()}
    if len(set(classes.values())) > 1:
        raise ValueError(
            f"the splits {sorted(classes)} have different categories: {classes}; give jsons with "
            "the same ids and names, or build each into a folder of its own"
        )


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
