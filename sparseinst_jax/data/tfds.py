"""A TFDS data set of COCO instances, masks included; built without TensorFlow.

TFDS's own ``coco`` has no masks. This one keeps the image files' bytes and the segmentations as
json text, in ArrayRecord files in the order of the json, and beside them the index of the json, so
that training need not read the images to plan batches. Other programs read it by TFDS alone:

    build("tfds_data", {"train": SplitSource("train.json", "images/train")})
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
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import constants, registered

from sparseinst_jax.data._index.cache import read_index
from sparseinst_jax.data._index.columns import CocoIndex, open_index, save_index
from sparseinst_jax.data._index.reader import refuse_missing_files
from sparseinst_jax.data.coco import DatasetSelection, make_dataset, note_missing, read_record
from sparseinst_jax.data.faults import DatasetFaults
from sparseinst_jax.data.records import Annotation, CocoDataset, ImageRecord
from sparseinst_jax.runtime.progress import ImageProgress, map_ahead

NAME, VERSION = "coco_instances", "1.0.0"
SHARD_SIZE = 128 << 20  # bytes of images in a shard, which is in memory while it is written
NUM_THREADS = 4  # that decode images, to refuse a broken one


class SplitSource(NamedTuple):
    """What a split is made of: a COCO json and the folder that its file names are relative to."""

    annotations: str | os.PathLike
    images: str | os.PathLike


_IndexedSplit = tuple[CocoIndex, CocoDataset]


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
            self,
            *,
            splits: Mapping[str, _IndexedSplit],
            report_done: Callable[[int], None],
            **options: Any,
        ) -> None:
            self._splits, self._report_done = dict(splits), report_done
            super().__init__(file_format="array_record", **options)

        def _info(self) -> tfds.core.DatasetInfo:
            _, first = next(iter(self._splits.values()))
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
            for name, (index, dataset) in self._splits.items():
                folder = index_folder(self.data_dir, name)
                folder.mkdir()
                save_index(index, folder)
                number = len(dataset.records)
                sizes = [os.path.getsize(path) for _, path in dataset.files if path]
                count = max(1, min(number, math.ceil(sum(sizes) / SHARD_SIZE)))
                ends = [number * place // count for place in range(count + 1)]
                shards[name] = [
                    functools.partial(self._examples, dataset, range(first, end))
                    for first, end in itertools.pairwise(ends)
                ]
            return shards

        def _examples(
            self, dataset: CocoDataset, places: Sequence[int]
        ) -> Iterator[tuple[int, dict[str, Any]]]:
            with ThreadPoolExecutor(NUM_THREADS) as pool:
                records = (dataset.records[place] for place in places)
                checked = map_ahead(pool, _checked, records, 2 * NUM_THREADS)
                for key, (record, encoded) in enumerate(checked):
                    self._report_done(1)
                    yield (
                        key,
                        {
                            "image": io.BytesIO(encoded),
                            "image/id": record.image_id,
                            "image/file_name": record.file_name,
                            "image/height": record.height,
                            "image/width": record.width,
                            "objects": [_object(found) for found in record.annotations],
                        },
                    )


def _object(annotation: Annotation) -> dict[str, Any]:
    return {
        "id": annotation.id,
        "label": annotation.label,
        "is_crowd": annotation.iscrowd,
        "area": annotation.area,
        "segmentation": json.dumps(annotation.segmentation),
    }


def _checked(record: ImageRecord) -> tuple[ImageRecord, bytes]:
    """A record and the bytes of its image; a broken one is refused now, with its name."""
    read_record(record)
    assert record.path is not None, "splits are made of image files"
    return record, Path(record.path).read_bytes()


def build(
    data_dir: str | os.PathLike,
    sources: Mapping[str, SplitSource],
    *,
    progress: TextIO | None = None,
) -> Path:
    """Write a TFDS data set below ``data_dir``: whole, or nothing.

    Args:
        data_dir: TFDS folder; the data set goes to ``coco_instances/1.0.0`` in it.
        sources: what the splits are made of, by their names; of the same categories.
        progress: where progress is written.

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
    _check_same_classes({name: dataset for name, (_, dataset) in splits.items()})
    number = sum(len(dataset.records) for _, dataset in splits.values())
    with (
        ImageProgress(number, progress, "written") as line,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        builder = CocoInstances(
            splits=splits, report_done=line.advance, data_dir=os.fspath(data_dir)
        )
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(
                compute_stats=tfds.download.ComputeStatsMode.SKIP, try_download_gcs=False
            )
        )
    return folder


def _read(source: SplitSource) -> _IndexedSplit:
    path = Path(source.annotations)
    refuse_missing_files(path, Path(source.images))
    index = read_index(path)
    dataset, faults = make_dataset(index, str(path), os.fspath(source.images), DatasetSelection())
    note_missing(dataset, Path(source.images), faults)
    faults.raise_if_fatal()
    return index, dataset


def _check_same_classes(splits: Mapping[str, CocoDataset]) -> None:
    if not splits:
        raise ValueError("no split was given; expected for example {'train': SplitSource(...)}")
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


_NAME = re.compile(r"(?P<name>\w+)(:(?P<version>[\d.]+))?/(?P<split>[\w-]+)")
_CURE = "build it by `sparseinst build-tfds`, or correct config.data.tfds_dir"


class ShardImages:
    """The images in the shards of a split; every process opens the shards itself."""

    def __init__(self, directory: str, split: str, name: str) -> None:
        self.directory, self.split, self.name = directory, split, name
        self._source: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_source": None}

    def read(self, place: int, image_id: int) -> bytes:
        """The encoded bytes of an image.

        Raises a ValueError if the shards are damaged, or of another data set than the index.
        """
        if self._source is None:
            builder: Any = tfds.builder_from_directory(self.directory)
            # Decoded as those of a folder are: turned by EXIF, of any kind.
            decoders = {"image": tfds.decode.SkipDecoding()}
            self._source = builder.as_data_source(split=self.split, decoders=decoders)
        try:
            example = self._source[place]
        except Exception as error:  # whatever the reader of the shards trips over
            raise ValueError(
                f"image {image_id} of {self.name} cannot be read from its shard ({error}); "
                f"build the data set again"
            ) from error
        if int(example["image/id"]) != image_id:
            raise ValueError(
                f"{self.name}: the shards hold image {example['image/id']} where the index has "
                f"{image_id}; build the data set again"
            )
        return example["image"]


def index_tfds(
    name: str, data_dir: str | os.PathLike, selection: DatasetSelection
) -> tuple[CocoDataset, DatasetFaults]:
    """Open a split as a data set; reads no image.

    Args:
        name: such as "coco_instances/train", or "coco_instances:1.0.0/train".
        data_dir: the TFDS folder that it was built into; "" is TFDS's own.
        selection: what is taken of it.

    Raises:
        FileNotFoundError: it, or a part of it, is not there.
        ValueError: the name is of another form, or the data set of another version or damaged.
    """
    directory, split = _find(name, data_dir)
    title = f"{name} in {directory}"
    folder = index_folder(directory, split)
    try:
        index = open_index(folder)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(
            f"the index of {title} is damaged ({error}); remove {directory} and {_CURE}"
        ) from error
    images = ShardImages(str(directory), split, title)
    return make_dataset(index, title, images, selection)


def _find(name: str, data_dir: str | os.PathLike) -> tuple[Path, str]:
    """The folder and the split of a name."""
    match = _NAME.fullmatch(name)
    if match is None or match["name"] != NAME:
        raise ValueError(
            f"config.data.train.tfds and config.data.val.tfds must be such as "
            f'"{NAME}/train", got {name!r}; only {NAME} has masks'
        )
    root = Path(data_dir or constants.DATA_DIR).expanduser()
    version, split = match["version"] or VERSION, match["split"]
    directory = root / NAME / version
    if version != VERSION:
        raise ValueError(f"{name} is of version {version}, this program reads {VERSION}; {_CURE}")
    if not directory.is_dir():
        others = sorted(path.name for path in directory.parent.glob("*.*.*") if path.is_dir())
        there = f"; there is version {', '.join(others)}" if others else ""
        raise FileNotFoundError(f"no {name} in {root}: {directory} does not exist{there}; {_CURE}")
    if not index_folder(directory, split).is_dir():
        splits = [path.name.removeprefix("index-") for path in sorted(directory.glob("index-*"))]
        raise FileNotFoundError(
            f"{directory} has no split {split!r}; it has {', '.join(splits) or 'none'}; {_CURE}"
        )
    _refuse_missing_shards(directory, split, name)
    return directory, split


def _refuse_missing_shards(directory: Path, split: str, name: str) -> None:
    try:
        builder = tfds.builder_from_directory(os.fspath(directory))
        files = builder.info.splits[split].filepaths
    except Exception as error:  # TFDS raises whatever it trips over
        raise ValueError(f"{name} in {directory} cannot be read ({error}); {_CURE}") from error
    missing = [path.name for path in files if not path.exists()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(files)} shards of {name} are missing in {directory}, the "
            f"first is {missing[0]}; {_CURE}"
        )
