"""Labels that are probably not what was meant: they contradict each other, or what is usual.

Training and evaluation do what the json says, so none of this fails; it is learned or scored.
"""

import os
import re
import shlex
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from pycocotools import mask as rle

from sparseinst_jax.data.faults import Fault
from sparseinst_jax.data.records import Annotation, CocoDataset, ImageRecord, IndexedRecords
from sparseinst_jax.data.segmentations import encode_segmentation
from sparseinst_jax.runtime.messages import listed, percent

SAME_IOU = 0.95  # of two masks of one image, from which on they are one object
MAX_COMPARED = 500  # objects of an image; of more than that only equal masks are found
FITTING_IOU = 0.7  # of two boxes
TOLERANCE = 3.0  # pixels that the sides of boxes may be off
AREA_FACTOR = 2.0  # between areas that fit
SMALL_AREA = 16  # px²; half a pixel to and fro changes these much
MIN_SIDE = 5  # pixels; smaller masks are rectangles by chance
MIN_OBJECTS = 4  # that are enough to speak of all
MOST = 0.9  # share of objects that stands for all
OUTSIDE = 0.05  # share of the image's shorter side that an outline may leave it by
CROWD_SHARE = 0.1  # of all annotations; COCO has 0.01
EMPTY_SHARE = 0.3  # of the images
# Words for the left side, and for the right one; short ones stand alone or end a word (EyeL).
_ALONE = r"(?<![^\W_]){}(?![^\W_])"
_SIDES = (
    *(("left", "right"), ("links", "rechts"), ("gauche", "droite")),
    *(("izquierd", "derech"), ("sinistr", "destr"), ("左", "右")),
    *((_ALONE.format(left), right) for left, right in (("l", "r"), ("lhs", "rhs"), ("lt", "rt"))),
    (r"(?-i:(?<=[a-z])L)(?![^\W_])", "R"),
)


class Measured(NamedTuple):
    """The masks of an image, by their pixels, in the order of its annotations."""

    boxes: np.ndarray  # float64 [n, 4], x, y, width and height in pixels; 0 where there is no pixel
    areas: np.ndarray  # int64 [n], px²
    outside: np.ndarray  # float64 [n], how far polygons reach out of the image, pixels


def measure(record: ImageRecord, class_names: Sequence[str]) -> tuple[Measured, list[Fault]]:
    """Draw the masks of an image; also returns the faults of those that cannot be, or twice are."""
    empty = encode_segmentation({"size": [1, 1], "counts": [1]}, 1, 1)
    encoded, faults, outside = [], [], []
    for annotation in record.annotations:
        try:
            encoded.append(encode_segmentation(annotation.segmentation, *_size(record)))
        except ValueError as error:
            faults.append(Fault("segmentation", f"{_name(annotation, record)}: {error}"))
            encoded.append(empty)
        outside.append(_outside(annotation, record))
    if not encoded:
        return Measured(np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0)), faults
    # One by one: with NumPy 2 pycocotools fails on lists of more than 255.
    areas = np.array([rle.area(mask) for mask in encoded], np.int64)
    boxes = np.array([rle.toBbox(mask) for mask in encoded])
    measured = Measured(boxes, areas, np.array(outside))
    named = {fault.message.partition(":")[0] for fault in faults}
    for annotation, area in zip(record.annotations, areas.tolist(), strict=True):
        if not area and (name := _name(annotation, record)) not in named:
            text = f"{name}: its mask has no pixel in the image; it is left out"
            faults.append(Fault("mask without a pixel", text, is_fatal=False))
    return measured, faults + _copies(record, class_names, encoded, measured)


def _size(record: ImageRecord) -> tuple[int, int]:
    return record.height, record.width


def _name(annotation: Annotation, record: ImageRecord) -> str:
    return f"annotation {annotation.id} ({record.file_name})"


def _outside(annotation: Annotation, record: ImageRecord) -> float:
    if not isinstance(annotation.segmentation, list):
        return 0.0
    ends = [
        (max(part[axis::2]) - side, -min(part[axis::2]))
        for part in annotation.segmentation
        for axis, side in ((0, record.width), (1, record.height))
    ]
    return max(0.0, *(max(end) for end in ends))


def _copies(
    record: ImageRecord, class_names: Sequence[str], encoded: Sequence, measured: Measured
) -> list[Fault]:
    """The objects of an image whose mask an earlier one has as well."""
    chosen = np.flatnonzero(measured.areas > 0)
    if len(chosen) <= MAX_COMPARED:
        first, second = chosen[np.stack(np.triu_indices(len(chosen), 1))]
        is_near = _ious(measured.boxes[first], measured.boxes[second]) >= SAME_IOU**2
        first, second = first[is_near], second[is_near]
    else:
        earliest = {encoded[place]["counts"]: place for place in chosen[::-1].tolist()}
        first = np.array([earliest[encoded[place]["counts"]] for place in chosen.tolist()])
        first, second = first[first < chosen], chosen[first < chosen]
    faults, known = [], set[int]()
    for a, b in zip(first.tolist(), second.tolist(), strict=True):
        if b in known or rle.iou([encoded[b]], [encoded[a]], [0])[0, 0] < SAME_IOU:
            continue
        known.add(b)
        other, this = record.annotations[a], record.annotations[b]
        names = [class_names[found.label] for found in (this, other)]
        classes = f"class {names[0]}" + (f" here, {names[1]} there" * (names[0] != names[1]))
        text = f"{_name(this, record)}: has the mask of annotation {other.id} ({classes})"
        faults.append(Fault("object twice", f"{text}; delete one", is_fatal=False))
    return faults


def find_contradictions(dataset: CocoDataset, images: Sequence[Measured]) -> list[str]:
    """Compare the boxes and areas of a json with its masks: a line for each kind of contradiction.

    The masks are those of `measure`, of each image.
    """
    counts = np.array([len(image.areas) for image in images], np.int64)
    if not counts.sum():
        return []
    measured = Measured(*(np.concatenate(column) for column in zip(*images, strict=True)))
    sizes = np.repeat(dataset.image_sizes, counts, axis=0)

    def example(place: int) -> str:
        owner = int(np.searchsorted(np.cumsum(counts), place, side="right"))
        record = dataset.records[owner]
        return _name(record.annotations[place - int(counts[:owner].sum())], record)

    return [
        *_boxes(dataset.records.column("boxes"), measured, sizes, example),
        *_areas(dataset.records.column("areas"), measured, sizes, example),
        *_outlines(dataset.records, measured, sizes, example),
    ]


_Example = Callable[[int], str]


def _boxes(
    stated: np.ndarray, measured: Measured, sizes: np.ndarray, example: _Example
) -> list[str]:
    known = np.flatnonzero((measured.areas > 0) & ~np.isnan(stated[:, 0]))
    boxes, masks, sides = stated[known], measured.boxes[known], sizes[known, ::-1]
    misfit = _do_not_fit(_clipped(boxes, sides), masks)
    if not misfit.any():
        return []
    place = int(misfit.argmax())
    found, masks, sides = boxes[misfit], masks[misfit], sides[misfit]
    scale = float(np.median(np.sqrt(masks[:, 2:].prod(1) / found[:, 2:].prod(1).clip(1e-9))))
    start, end = found[:, :2], found[:, 2:]
    both = np.concatenate([sides, sides], axis=1)
    centred = np.concatenate([start - end / 2, end], axis=1)
    readings = {
        "polygons that have x and y exchanged": found[:, [1, 0, 3, 2]],
        "boxes written as x0, y0, x1, y1 (COCO's are x, y, width, height)": np.concatenate(
            [start, end - start], axis=1
        ),
        "boxes written with their centre (COCO's begin with the left upper corner)": centred,
        "boxes as shares of the image's sides": found * both,
        "boxes as shares of the image's sides, with their centre": centred * both,
        f"polygons drawn at {scale:.2g} of the size": found * scale,
    }
    fits = [
        name
        for name, box in readings.items()
        if (_ious(_clipped(box, sides), masks) > FITTING_IOU).mean() > MOST
    ]
    why = f"; they fit {fits[0]}" if fits else ""
    return [
        f"{len(found)} of {len(known)} boxes do not fit their masks{why}. Such as "
        f"{example(int(known[place]))}: bbox {_rounded(boxes[place])}, the mask lies in "
        f"{_rounded(measured.boxes[known[place]])}. Training learns the masks: look at the sheet"
    ]


def _areas(
    stated: np.ndarray, measured: Measured, sizes: np.ndarray, example: _Example
) -> list[str]:
    known = np.flatnonzero((measured.areas > 0) & ~np.isnan(stated))
    areas, pixels = stated[known], measured.areas[known].astype(np.float64)
    ratios = areas / pixels
    misfit = (np.abs(areas - pixels) > SMALL_AREA) & ~(
        (ratios > 1 / AREA_FACTOR) & (ratios < AREA_FACTOR)
    )
    boxes = measured.boxes[known, 2:].prod(axis=1)
    differs = boxes > 1.1 * pixels  # the others have the same area as their box
    is_box = np.abs(areas - boxes) <= 0.1 * (boxes - pixels)
    if differs.sum() >= MIN_OBJECTS and is_box[differs].mean() > MOST:
        place, what = int(differs.argmax()), f"{len(known)} areas are those of boxes"
    elif misfit.any():
        place, what = int(misfit.argmax()), f"{misfit.sum()} of {len(known)} areas do not fit"
        shares = np.abs(ratios * sizes[known].prod(axis=1) - 1)
        what += " (shares of the image, in place of pixels)" * bool(
            (shares[misfit] < 1 - 1 / AREA_FACTOR).mean() > MOST
        )
    else:
        return []
    return [
        f"{what}: {example(int(known[place]))} has the area {areas[place]:.6g}, its mask "
        f"{pixels[place]:.0f} pixels. COCO's APs, APm and APl sort objects by it, and filters "
        "drop those of area 0: correct it, or take the key out"
    ]


def _outlines(
    records: IndexedRecords, measured: Measured, sizes: np.ndarray, example: _Example
) -> list[str]:
    lines = []
    limit = np.maximum(OUTSIDE * sizes.min(axis=1), 2 * TOLERANCE)
    if (is_out := measured.outside > limit).any():
        place = int(measured.outside.argmax())
        lines.append(
            f"{is_out.sum()} of {len(is_out)} objects reach out of their image, {example(place)} "
            f"by {measured.outside[place]:.0f} pixels: were they drawn on an image of another "
            "size, or are x and y exchanged?"
        )
    is_object = (records.column("is_crowd") == 0) & (measured.boxes[:, 2:] >= MIN_SIDE).all(axis=1)
    number = int(is_object.sum())
    if number < MIN_OBJECTS:
        return lines
    fills = measured.areas == measured.boxes[:, 2:].prod(axis=1)
    has_four = records.num_corners == 4
    for is_so, what in ((fills, "upright rectangles"), (has_four, "outlines of four corners")):
        if is_so[is_object].mean() >= MOST:
            lines.append(
                f"{is_so[is_object].sum()} of {number} objects are {what}: are they boxes? A "
                "model that learns from them finds boxes"
            )
            break
    return lines


def _do_not_fit(boxes: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Which pairs of boxes differ by more than the roundings of thin ones."""
    grown = [box + np.array([-1, -1, 2, 2]) * TOLERANCE for box in (boxes, masks)]
    return _ious(*grown) < FITTING_IOU


def _clipped(boxes: np.ndarray, sides: np.ndarray) -> np.ndarray:
    """Boxes cut at the border of their images, of which `sides` are (width, height)."""
    low = np.clip(boxes[:, :2], 0, sides)
    return np.concatenate([low, np.clip(boxes[:, :2] + boxes[:, 2:], 0, sides) - low], axis=1)


def _ious(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """IoU of boxes (x, y, width, height), pair by pair."""
    low = np.maximum(first[:, :2], second[:, :2])
    high = np.minimum(first[:, :2] + first[:, 2:], second[:, :2] + second[:, 2:])
    inner = np.clip(high - low, 0, None).prod(axis=1)
    union = first[:, 2:].prod(axis=1) + second[:, 2:].prod(axis=1) - inner
    return inner / np.maximum(union, 1e-9)


def _rounded(box: np.ndarray) -> list[float]:
    return [float(f"{number:.4g}") for number in box.tolist()]


def warn_of_crowd(dataset: CocoDataset) -> list[str]:
    """A line on objects that are marked as crowd regions, where these are not the exception."""
    crowd, objects = dataset.crowd_per_class, dataset.targets_per_class
    share = CROWD_SHARE * (crowd.sum() + objects.sum())
    is_unusual = (crowd > objects) | (crowd.sum() > max(share, 1))
    shown = [
        f"{count} of {count + objects[label]} of {dataset.class_names[label]}"
        for label, count in enumerate(crowd.tolist())
        if count and is_unusual[label]
    ]
    if not shown:
        return []
    return [
        f'{crowd.sum()} of {crowd.sum() + objects.sum()} annotations have "iscrowd": 1 '
        f"({listed(shown)}), which means a group that nobody has separated: they are neither "
        "learned nor looked for in evaluation. Some tools write it for every mask that was "
        'painted: set "iscrowd": 0 for single objects'
    ]


def warn_of_empty(dataset: CocoDataset) -> list[str]:
    """Lines on images without objects that may only lack their labels."""
    is_empty = dataset.num_targets == 0
    number = int(is_empty.sum())
    if not 0 < number < len(is_empty):
        return []
    lines = []
    if number > EMPTY_SHARE * len(is_empty):
        lines.append(
            f"{number} of {len(is_empty)} images ({percent(number, len(is_empty))}) have no "
            "object: if their labels are missing, objects are learned as background; "
            "--config.data.keep_empty=False leaves these images out"
        )
    folders: dict[str, list[bool]] = {}
    for (name, _), is_one in zip(dataset.files, is_empty.tolist(), strict=True):
        folders.setdefault(os.path.dirname(name), []).append(is_one)
    without = [f"{name or '.'} ({len(found)})" for name, found in folders.items() if all(found)]
    if without:
        lines.append(
            f"no image of the folders {listed(without)} has an object: are their labels missing?"
        )
    return lines


def warn_of_sides(class_names: Sequence[str], flip_label_pairs: Sequence[str]) -> list[str]:
    """A line on classes of the left and the right side that a mirrored image does not swap."""
    by_name = {name.casefold(): name for name in class_names}
    done = {part.strip() for pair in flip_label_pairs for part in str(pair).split("=")}
    pairs: dict[str, str] = {}
    for name in class_names:
        for left, right in _SIDES:
            other = by_name.get(re.sub(left, right, name, flags=re.IGNORECASE).casefold(), name)
            if other != name and not {name, other} & (done | {*pairs, *pairs.values()}):
                pairs[name] = other
    if not pairs:
        return []
    found = [f"{left}={right}" for left, right in pairs.items()]
    value = [*map(str, flip_label_pairs), *found]
    text = str(tuple(value)) if any("," in pair for pair in value) else ",".join(value)
    option = shlex.quote(f"--config.data.flip_label_pairs={text}")
    return [
        f"{len(pairs)} pairs of classes seem to be of a left and a right side ({listed(found)}), "
        "and training mirrors half of the images: the wrong side would be learned in these. Swap "
        f"them there: {option}"
    ]
