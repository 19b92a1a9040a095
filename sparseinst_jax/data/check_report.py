"""Gather everything that is known of training and validation data: counts, faults, warnings."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np

from sparseinst_jax.data import check_dataset
from sparseinst_jax.data.coco import CocoDataset, ImageRecord, size_fault
from sparseinst_jax.data.doubtful_labels import Measured, find_contradictions, measure
from sparseinst_jax.data.faults import Fault
from sparseinst_jax.data.file_search import FileNames
from sparseinst_jax.data.images import ImageHeader, image_suffixes, read_header, read_image
from sparseinst_jax.runtime.messages import listed, percent
from sparseinst_jax.runtime.progress import map_ahead, with_progress

# Objects that are rasterised to count the lost ones: minutes at most, exact for most data sets.
MAX_OBJECTS = 20_000
# An image of fewer grey levels is nearly black to the network: 12 bits in a file of 16, mostly.
MIN_LEVELS = 24


class SplitReport(NamedTuple):
    """What is known of one json."""

    title: str  # "train" or "val"
    dataset: CocoDataset  # the index
    lines: list[str]  # counts and sizes; the first names the json
    warnings: list[str]  # lines on what is allowed and spoils the result
    faults: list[Fault]  # all of them, also those that training gets over
    readable: list[ImageRecord]  # images that can be drawn


class DataReport(NamedTuple):
    """What is known of training data and of the validation data beside it."""

    splits: list[SplitReport]  # training data, then validation data where there are some
    warnings: list[str]  # lines on both together
    num_masks: int  # of the model, instances that it can find in an image
    overlap: list[check_dataset.Overlap]  # images that both have

    @property
    def fatal(self) -> list[Fault]:
        """The faults that training would fail on."""
        return [fault for split in self.splits for fault in split.faults if fault.is_fatal]

    @property
    def num_warnings(self) -> int:
        """Warnings and faults that training gets over, each counted."""
        harmless = sum(not fault.is_fatal for split in self.splits for fault in split.faults)
        return harmless + len(self.warnings) + sum(len(split.warnings) for split in self.splits)


def make_report(
    indexed: Mapping[str, tuple[CocoDataset, Iterable[Fault]]],
    num_masks: int,
    map_stride: int,
    train_sizes: Sequence[int],
    train_max_size: int,
    num_workers: int,
    progress: TextIO | None = None,
    flip_label_pairs: Sequence[str] = (),
) -> DataReport:
    """Check training data, and validation data where there are some: every entry, every image.

    Args:
        indexed: "train", and maybe "val", to a data set and the faults of its json.
        num_masks: of the model.
        map_stride: of the map on which it finds objects, pixels.
        train_sizes: shortest sides that images are resized to in training, pixels.
        train_max_size: longest side, pixels.
        num_workers: threads that open images.
        progress: where progress is written while images are opened.
        flip_label_pairs: classes that swap in mirrored images.
    """
    splits = []
    for title, (dataset, faults) in indexed.items():
        findings = _open_images(dataset, num_workers, progress)
        found = [*faults, *(fault for image in findings for fault in image.faults)]
        kinds = Counter(image.kind or "missing or broken" for image in findings)
        pairs = zip(dataset.records, findings, strict=True)
        readable = [record for record, image in pairs if image.is_readable]
        if not dataset.num_targets.sum():
            found.append(_nothing(dataset, title == "train"))
        sides = flip_label_pairs if title == "train" else None
        warnings, lost = check_dataset.warn(dataset, num_masks, sides), []
        warnings += find_contradictions(dataset, [image.measured for image in findings])
        warnings += _warn_of_files(findings)
        if title == "train":
            lost = check_dataset.lost_at_ends(
                dataset, train_sizes, train_max_size, map_stride, MAX_OBJECTS
            )
            warnings += check_dataset.warn_of_lost(lost, train_max_size)
        if repeated := check_dataset.find_repeated(dataset):
            warnings.append(
                f"{len(repeated)} files are named by more than one image entry, such as "
                f"{repeated[0]}: each entry sees the other's objects as background; make them one"
            )
        lines = [*check_dataset.describe(dataset), *_size_lines(dataset)]
        lines.append("files: " + ", ".join(f"{n} {kind}" for kind, n in kinds.most_common()))
        lines += [_lost_line(entry) for entry in lost if entry.num_checked]
        splits.append(SplitReport(title, dataset, lines, warnings, found, readable))
    overlap, warnings = [], []
    if len(splits) == 2:
        train, val = splits[0].dataset, splits[1].dataset
        splits[1].faults.extend(_strange_classes(train, val))
        overlap = check_dataset.find_overlap(train, val, every_file=True)
        warnings = [
            *check_dataset.warn_of_classes(train, val),
            *check_dataset.warn_of_overlap(overlap, len(val.records)),
        ]
    warnings += _warn_of_unnamed([split.dataset for split in splits])
    return DataReport(splits, warnings, num_masks, overlap)


def _open_images(
    dataset: CocoDataset, num_workers: int, progress: TextIO | None
) -> list[ImageFindings]:
    """Look at every image, several at a time."""
    workers, records = max(1, num_workers), dataset.records
    with ThreadPoolExecutor(workers) as pool:
        check = functools.partial(check_image, class_names=dataset.class_names)
        findings = map_ahead(pool, check, records, ahead=4 * workers)
        return list(with_progress(findings, len(records), progress, "checked"))


def _warn_of_files(findings: Sequence[ImageFindings]) -> list[str]:
    """Lines on image files that can be read in more than one way."""
    lines = []
    turned = Counter(image.orientation for image in findings if image.is_unclear)
    if turned:
        shown = ", ".join(
            f"{number} of orientation {key}" for key, number in sorted(turned.items())
        )
        lines.append(
            f"{turned.total()} images are turned or mirrored by their EXIF orientation ({shown}) "
            "without a change of size. They are used upright, as they are shown: look at the "
            "sheet, whether the labels were drawn on them like this"
        )
    if several := sum(image.is_animated for image in findings):
        lines.append(
            f"{several} files hold several pages or pictures of an animation: the first is used"
        )
    return lines


def _warn_of_unnamed(datasets: Sequence[CocoDataset]) -> list[str]:
    """A line on folders of images that no json names an image of."""
    named: dict[str, set[str]] = {}
    for dataset in datasets:
        folder = dataset.records[0].folder if len(dataset.records) else None
        if folder is not None:
            known = named.setdefault(folder, set())
            known.update(os.path.normpath(name) for name, _ in dataset.files)
    lines, suffixes = [], image_suffixes()
    for root, names in named.items():
        used = {os.path.dirname(name) for name in names}
        found = Counter(
            os.path.dirname(name)
            for name in FileNames(Path(root)).paths
            if os.path.splitext(name)[1].lower() in suffixes
        )
        unused = {folder: number for folder, number in found.items() if folder not in used}
        if unused:
            shown = [f"{folder or '.'} ({number})" for folder, number in unused.items()]
            lines.append(
                f"{sum(unused.values())} images below {root} lie in folders of which the json names"
                f" none: {listed(shown)}: are their labels missing?"
            )
    return lines


def _nothing(dataset: CocoDataset, is_train: bool) -> Fault:
    if is_train:
        cure = "annotate some, or give another json (crowd regions and empty masks do not count)"
        return Fault("nothing to learn", f"{dataset.annotations_path} has no object; {cure}")
    cure = "give a json with annotations, or set --config.train.eval_every=0"
    return Fault("nothing to score", f"{dataset.annotations_path} has no object; {cure}")


def _strange_classes(train: CocoDataset, val: CocoDataset) -> list[Fault]:
    if set(train.class_names) & set(val.class_names):
        return []
    return [
        Fault(
            "classes",
            f"{val.annotations_path} has none of the classes of {train.annotations_path}: "
            f"{listed(val.class_names)} against {listed(train.class_names)}; "
            "rename them by config.data.class_map, or give the right json",
        )
    ]


def _size_lines(dataset: CocoDataset) -> list[str]:
    sizes = dataset.image_sizes
    if not len(sizes):
        return []
    areas = sizes.prod(axis=1)
    ends = [sizes[areas.argmin()], sizes[areas.argmax()]]
    smallest, largest = (f"{width} x {height}" for height, width in ends)
    count = len(np.unique(sizes, axis=0))
    return [
        f"image sizes (width x height): {smallest} to {largest}, {count} different; "
        f"{int((sizes[:, 1] >= sizes[:, 0]).sum())} landscape or square, "
        f"{int((sizes[:, 1] < sizes[:, 0]).sum())} portrait"
    ]


def _lost_line(found: check_dataset.LostObjects) -> str:
    share = percent(found.num_lost + found.num_small, found.num_checked)
    sample = "" if found.num_checked == found.num_objects else f" of {found.num_checked} looked at"
    return (
        f"objects at train size {found.shortest}: median {found.median_side:.0f} x "
        f"{found.median_side:.0f} pixels, {share}{sample} smaller than {found.map_stride} x "
        f"{found.map_stride}, one cell of the activation maps"
    )


def sheet_records(readable: Sequence[ImageRecord], most: int) -> list[ImageRecord]:
    """Choose images to draw: the one with the most objects, then others spread over the data."""
    chosen = [record for record in readable if record.targets] or list(readable)
    if len(chosen) <= most:
        return list(chosen)
    fullest = max(chosen, key=lambda record: len(record.targets))
    rest = [record for record in chosen if record is not fullest]
    places = np.linspace(0, len(rest) - 1, most - 1).astype(int)
    return [fullest, *(rest[place] for place in places)]


class ImageFindings(NamedTuple):
    """What opening one image found."""

    # format and mode, such as "JPEG RGB", "animated" after it; empty if it cannot be read
    kind: str
    faults: list[Fault]  # of the image and its annotations
    measured: Measured  # its masks
    orientation: int = 1  # of the EXIF data, 1 where there is none
    is_unclear: bool = False  # whether it turns the image without a change of its size
    is_animated: bool = False  # whether the file has several pages

    @property
    def is_readable(self) -> bool:
        """Whether the image can be shown with its annotations."""
        return bool(self.kind) and not any(fault.is_fatal for fault in self.faults)


def check_image(record: ImageRecord, class_names: Sequence[str]) -> ImageFindings:
    """Decode an image whole, compare it with the json, and draw its masks.

    A missing file finds nothing: the rules of the json name it.
    """
    faults: list[Fault] = []

    def note(what: str, text: object, is_fatal: bool = True) -> None:
        faults.append(Fault(what, f"image {record.image_id}: {text}", is_fatal))

    kind, header = "", ImageHeader("", (0, 0), 1, False)
    try:
        header = read_header(record.open(), record.source)
        image = read_image(record.open(), record.source)
    except FileNotFoundError:
        pass
    except ValueError as error:
        note("image that cannot be read", error)
    else:
        kind = header.kind + ", animated" * header.is_animated
        if image.shape[:2] != (record.height, record.width):
            text = size_fault(record, image.shape[0], image.shape[1])
            note("image of another size than the json's", text)
        if header.has_damaged_metadata:
            text = f"{record.source}: its EXIF data or texts cannot be read; its pixels are used "
            text += "as they are stored, not turned"
            note("image with damaged metadata", text, is_fatal=False)
        levels = int(np.ptp(image)) + 1 if image.size else 0
        if levels < MIN_LEVELS:
            text = (
                f"{record.source} ({kind}) has only {levels} of 256 levels when read as 8 bits: of "
                "16 bits the upper eight are used. If its values use fewer, stretch them to the "
                "whole range and save the image again"
            )
            note("image of few levels", text, is_fatal=False)
    measured, found = measure(record, class_names)
    if not kind:
        return ImageFindings(kind, faults + found, measured)
    height, width = header.stored_size
    is_unclear = header.orientation in (2, 3, 4) or (header.orientation > 4 and height == width)
    return ImageFindings(
        kind, faults + found, measured, header.orientation, is_unclear, header.is_animated
    )
