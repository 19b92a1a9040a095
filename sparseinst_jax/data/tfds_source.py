"""Train on a TFDS data set that ``coco_tfds`` built: the same batches as from the folder."""

import os
import re
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core import constants

from sparseinst_jax.data import coco_tfds
from sparseinst_jax.data.annotations.faults import Faults
from sparseinst_jax.data.coco import Selection, make_dataset
from sparseinst_jax.data.index.coco_index import open_index
from sparseinst_jax.data.index.records import CocoDataset

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

        Raises:
            ValueError: the shards are damaged, or of another data set than the index.
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
                f"build the data set anew"
            ) from error
        if int(example["image/id"]) != image_id:
            raise ValueError(
                f"{self.name}: the shards hold image {example['image/id']} where the index has "
                f"{image_id}; build the data set anew"
            )
        return example["image"]


def index_tfds(
    name: str, data_dir: str | os.PathLike, selection: Selection
) -> tuple[CocoDataset, Faults]:
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
    folder = coco_tfds.index_folder(directory, split)
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
    if match is None or match["name"] != coco_tfds.NAME:
        raise ValueError(
            f"config.data.train.tfds and config.data.val.tfds must be such as "
            f'"{coco_tfds.NAME}/train", got {name!r}; only {coco_tfds.NAME} has masks'
        )
    root = Path(data_dir or constants.DATA_DIR).expanduser()
    version, split = match["version"] or coco_tfds.VERSION, match["split"]
    directory = root / coco_tfds.NAME / version
    if version != coco_tfds.VERSION:
        raise ValueError(
            f"{name} is of version {version}, this program reads {coco_tfds.VERSION}; {_CURE}"
        )
    if not directory.is_dir():
        others = sorted(path.name for path in directory.parent.glob("*.*.*") if path.is_dir())
        there = f"; there is version {', '.join(others)}" if others else ""
        raise FileNotFoundError(f"no {name} in {root}: {directory} does not exist{there}; {_CURE}")
    if not coco_tfds.index_folder(directory, split).is_dir():
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
