"""What a data set holds, and what of it training will not use.

Everything here reads the index, no image: seconds for a hundred thousand images. What needs the
images themselves is in `check_report`.
"""

import functools
import os
import stat
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sparseinst_jax.data.classes import warn_of_alike
from sparseinst_jax.data.doubtful_labels import warn_of_crowd, warn_of_empty, warn_of_sides
from sparseinst_jax.data.records import Annotation, CocoDataset, ImageRecord
from sparseinst_jax.data.target_masks import MASK_STRIDE
from sparseinst_jax.data.transforms import Transform, mask_levels, resized_size
from sparseinst_jax.runtime.files import sha256_of
from sparseinst_jax.runtime.messages import listed, percent

COCO_DETECTIONS = 100  # detections of an image that COCO's AP counts
# Objects that are rasterised for an estimate of how many are lost: about a second for each size.
NUM_SAMPLED = 500
MAX_NAMES = 10


class LostObjects(NamedTuple):
    """What a resize leaves of the objects."""

    shortest: int  # shortest side after the resize, pixels (unless the longest side limits it)
    num_checked: int  # objects looked at
    num_objects: int  # objects that there are; the counts below are of those looked at
    num_gone: int  # no pixel is left: they are dropped
    num_thin: int  # pixels are left, but none at the stride of the masks: their target is empty
    num_small: int  # smaller than one cell of the activation maps, the ones before not counted
    median_side: float  # of the objects, square root of the area, pixels
    # some of the objects that are gone or empty, as (file name, annotation id)
    worst: tuple[tuple[str, int], ...]
    map_stride: int  # side of that cell, pixels

    @property
    def num_lost(self) -> int:
        """Objects that nothing is learned from, of those looked at."""
        return self.num_gone + self.num_thin


def count_lost(
    dataset: CocoDataset, shortest: int, longest: int, map_stride: int, most: int = NUM_SAMPLED
) -> LostObjects:
    """Count the objects of which a resize leaves nothing.

    Args:
        dataset: the index.
        shortest: length that the shortest side is resized to, pixels.
        longest: limit of the longest side, pixels.
        map_stride: of the map on which the model finds objects, pixels.
        most: look at this many objects, spread evenly over the data set.

    Returns:
        the counts, by the very functions that make the targets. An object whose run lengths are
        broken is passed over: the rules of the json or `check_report` name it.
    """
    chosen = _spread(dataset.records, dataset.num_targets, most)
    areas, worst = [], []
    num_gone = num_thin = num_small = 0
    for record, annotation in chosen:
        size = (record.height, record.width)
        transform = Transform(False, None, None, resized_size(size, shortest, longest))
        try:
            levels = mask_levels(annotation.segmentation, size, transform)
        except ValueError:
            continue
        # A level counts 4 of the 16 pixels of its block.
        area = 0 if levels is None else MASK_STRIDE * int(levels.sum())
        areas.append(area)
        if area == 0:
            num_gone += levels is None
            num_thin += levels is not None
            worst.append((record.file_name, annotation.id))
        else:
            num_small += area < map_stride**2
    side = float(np.sqrt(np.median(areas))) if areas else 0.0
    total = int(dataset.num_targets.sum())
    counts = len(areas), total, num_gone, num_thin, num_small
    return LostObjects(shortest, *counts, side, tuple(worst[:MAX_NAMES]), map_stride)


def _spread(
    records: Sequence[ImageRecord], counts: np.ndarray, most: int
) -> list[tuple[ImageRecord, Annotation]]:
    """Choose objects evenly over a data set, all of them where there are no more than `most`."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    places = np.unique(np.linspace(0, total - 1, min(most, total)).astype(np.int64))
    owners = np.searchsorted(ends, places, side="right")
    firsts = ends - counts
    return [
        (records[owner], records[owner].targets[place - firsts[owner]])
        for place, owner in zip(places.tolist(), owners.tolist(), strict=True)
    ]


def describe(dataset: CocoDataset) -> list[str]:
    """Lines that count images, objects and classes."""
    counts = dataset.num_targets
    total = int(counts.sum())
    lines = [
        f"{dataset.annotations_path}: {len(dataset.records)} images, {total} objects, "
        f"{len(dataset.class_names)} classes"
    ]
    if not dataset.has_annotations:
        return [*lines, "no annotations: the file can be predicted, not trained on or scored"]
    mean = total / max(len(counts), 1)
    per_class = zip(dataset.class_names, dataset.targets_per_class, strict=True)
    shown = [f"{name} {count}" for name, count in per_class]
    lines.append(f"objects per class: {listed(shown, 20)}")
    lines.append(
        f"objects per image: mean {mean:.1f}, most {counts.max(initial=0)}, "
        f"images without objects {int((counts == 0).sum())}, "
        f"crowd regions {dataset.crowd_per_class.sum()}"
    )
    if dataset.num_left_out:
        lines.append(f"objects of classes that were not chosen: {dataset.num_left_out}, left out")
    if dataset.num_filtered:
        lines.append(f"objects that the annotation filter leaves out: {dataset.num_filtered}")
    return lines


def warn_of_unusable(dataset: CocoDataset) -> list[str]:
    """A line on objects without a mask, where faults are not listed one by one."""
    if not dataset.num_without_mask:
        return []
    return [
        f"{dataset.num_without_mask} objects have no polygon of three corners or more, in pixels, "
        "and are left out"
    ]


def warn(
    dataset: CocoDataset, num_masks: int, flip_label_pairs: Sequence[str] | None = None
) -> list[str]:
    """Lines on objects and classes that cannot be learned, or that are learned wrongly.

    `flip_label_pairs` are classes that swap in mirrored images, where these are trained on.
    """
    if not dataset.has_annotations:
        return []
    lines = [*warn_of_crowd(dataset), *warn_of_empty(dataset)]
    lines += warn_of_alike(dataset.class_names)
    if flip_label_pairs is not None:
        lines += warn_of_sides(dataset.class_names, flip_label_pairs)
    per_class = zip(dataset.class_names, dataset.targets_per_class, strict=True)
    unseen = [name for name, count in per_class if not count]
    if unseen:
        lines.append(
            f"{len(unseen)} of {len(dataset.class_names)} classes have no object and cannot be "
            f"learned: {listed(unseen)}; leave them out by config.data.exclude_classes, or annotate"
        )
    counts = dataset.num_targets
    crowded = np.flatnonzero(counts > num_masks)
    if len(crowded):
        worst = dataset.records[int(counts.argmax())]
        lines.append(
            f"{len(crowded)} images have more objects than the model has masks ({num_masks}), "
            f"{worst.file_name} has {counts.max()}: the best {num_masks} are matched, the other "
            f"{int((counts[crowded] - num_masks).sum())} are not learned; raise "
            f"--config.model.num_masks to {counts.max()} or more"
        )
    if counts.max(initial=0) > COCO_DETECTIONS:
        lines.append(
            f"{int((counts > COCO_DETECTIONS).sum())} images have more than {COCO_DETECTIONS} "
            f"objects: COCO's AP counts the best {COCO_DETECTIONS} detections of an image, so "
            "theirs stays below 1"
        )
    return lines


def warn_of_lost(lost: Sequence[LostObjects], longest: int) -> list[str]:
    """A line for each size, from `count_lost`, at which objects vanish; `longest` is in pixels."""
    lines = []
    for found in lost:
        if not found.num_lost:
            continue
        about = "" if found.num_checked == found.num_objects else "about "
        factor = found.num_objects / found.num_checked
        gone, thin = round(found.num_gone * factor), round(found.num_thin * factor)
        name, annotation_id = found.worst[0]
        lines.append(
            f"{about}{gone + thin} of {found.num_objects} objects "
            f"({percent(found.num_lost, found.num_checked)}) are lost at the train size "
            f"{found.shortest} (longest side {longest}): {gone} have no pixel left and are "
            f"dropped, {thin} have none at stride {MASK_STRIDE}, that of the masks (the activation "
            f"maps have stride {found.map_stride}); such as annotation {annotation_id} of {name}. "
            "Raise config.data.train_sizes, train_max_size and eval_size together"
        )
    return lines


def lost_at_ends(
    dataset: CocoDataset,
    train_sizes: Sequence[int],
    longest: int,
    map_stride: int,
    most: int = NUM_SAMPLED,
) -> list[LostObjects]:
    """`count_lost` at the smallest and at the largest train size (once where they are one)."""
    ends = sorted({min(train_sizes), max(train_sizes)})
    return [count_lost(dataset, shortest, longest, map_stride, most) for shortest in ends]


def warn_of_classes(train: CocoDataset, val: CocoDataset) -> list[str]:
    """Lines on classes that only one of two data sets has objects of."""
    if not (train.has_annotations and val.has_annotations):
        return []
    seen = [
        {data.class_names[label] for label in np.flatnonzero(data.targets_per_class)}
        for data in (train, val)
    ]
    lines = []
    if seen[1] - seen[0]:
        lines.append(
            f"{val.annotations_path} has objects of {listed(sorted(seen[1] - seen[0]))}, which "
            f"{train.annotations_path} has none of: they cannot be learned, their AP will be 0"
        )
    alike = [warn_of_alike(data.class_names) for data in (train, val)]
    both = warn_of_alike(tuple(dict.fromkeys([*train.class_names, *val.class_names])))
    lines += [line for line in both if line not in alike[0] + alike[1]]
    if seen[0] - seen[1]:
        lines.append(
            f"{val.annotations_path} has no object of {listed(sorted(seen[0] - seen[1]))}: their "
            "AP cannot be measured"
        )
    return lines


class Overlap(NamedTuple):
    """An image that two data sets share: its file name in each."""

    first: str
    second: str


def find_overlap(
    first: CocoDataset, second: CocoDataset, *, every_file: bool = False
) -> list[Overlap]:
    """Find the images that two data sets share.

    Two entries are the same image when they lead to the same file, or to files with the same bytes.
    Bytes are compared of files of one size only: by default of files of one name, else
    (`every_file`) of all.
    """
    by_key: dict[object, list[_ListedImage]] = {}
    for entry in _entries(first):
        by_key.setdefault(_key(entry, every_file), []).append(entry)
    hash_of = functools.cache(sha256_of)
    found = []
    for entry in _entries(second):
        for other in by_key.get(_key(entry, every_file), []):
            if _is_same(other, entry, hash_of):
                found.append(Overlap(other.name, entry.name))
                break
    return found


class _ListedImage(NamedTuple):
    """An image of a data set: its name, its path if any, and where its record is."""

    name: str
    path: str | None
    records: Sequence[ImageRecord]
    place: int


def _entries(dataset: CocoDataset) -> list[_ListedImage]:
    return [
        _ListedImage(name, path, dataset.records, place)
        for place, (name, path) in enumerate(dataset.files)
    ]


def warn_of_overlap(found: Sequence[Overlap], num_images: int) -> list[str]:
    """A line on the number of validation images that are trained on."""
    if not found:
        return []
    names = [a if a == b else f"{a} = {b}" for a, b in found]
    return [
        f"{len(found)} of {num_images} validation images are training images, too: "
        f"{listed(names)}; AP on these says nothing about new images. Take them out of one json"
    ]


def find_repeated(dataset: CocoDataset) -> list[str]:
    """File names that more than one entry of a json has."""
    counts = Counter(name for name, _ in dataset.files)
    return [name for name, count in counts.items() if count > 1]


def _key(entry: _ListedImage, every_file: bool) -> object:
    if every_file and entry.path is not None:
        return _bytes_of(entry.path)
    return os.path.basename(entry.name)


def _bytes_of(path: str) -> int:
    try:
        found = os.stat(path)
        # Reading a device or a pipe might never end.
        return found.st_size if stat.S_ISREG(found.st_mode) else -1
    except (OSError, ValueError):  # not there, or a name that no file can have
        return -1


def _is_same(first: _ListedImage, second: _ListedImage, hash_of: Callable[[str], str]) -> bool:
    if first.path is None or second.path is None:
        contents = _content(first), _content(second)
        if None in contents:
            return first.name == second.name
        return contents[0] == contents[1]
    paths = first.path, second.path
    if paths[0] == paths[1]:
        return True
    if _bytes_of(paths[0]) != _bytes_of(paths[1]) or _bytes_of(paths[0]) < 0:
        return False
    return os.path.samefile(*paths) or hash_of(paths[0]) == hash_of(paths[1])


def _content(entry: _ListedImage) -> bytes | None:
    """The bytes of an image in a shard or a file, None where no image is named."""
    record = entry.records[entry.place]
    if not record.has_image:
        return None
    try:
        file = record.open()
        return Path(file).read_bytes() if isinstance(file, str) else file.read()
    except (OSError, ValueError) as error:  # not there or broken: like nothing else
        return str(error).encode()
