"""Cityscapes and ADE20K, the folders as they are downloaded: masks by the rules of FastInst's data.

* Cityscapes, fine: ``leftImg8bit/train/aachen/A_leftImg8bit.png`` and a list of labelled polygons,
  ``gtFine/train/aachen/A_gtFine_polygons.json``, far things first. Each polygon loses what the
  later ones cover, of any label; then what it encloses is filled, as in outlines without holes.
  ``cargroup`` is a crowd region of the class car; 8 of the labels are classes.
* ADE20K, instances: ``images/training/A.jpg`` and ``annotations_instance/training/A.png``, whose
  red channel is one of 100 categories and whose green one numbers the objects, 0 is none.

Masks become run lengths. FastInst's original cuts Cityscapes' polygons by a geometry library, which
is not needed here: it shifts and widens them by half a pixel to come near to what Pillow draws, by
which Cityscapes' own masks are made, and here Pillow draws. (On random polygons of some 40 pixels
the IoU with the original's masks is 0.98 in the median, and areas are 1 % smaller.)

Source: specification of FastInst's data; detectron2's ``data/datasets/cityscapes.py`` and
Mask2Former's ``datasets/prepare_ade20k_ins_seg.py`` (rules), cityscapesScripts'
``helpers/labels.py`` and Mask2Former's ``ade20k_instance_imgCatIds.json`` (names).
Differs from these: of ADE20K the categories stay 1 to 100, where the original numbers them by the
150 classes of scene parsing and says 150; ids of images are numbers, not names.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from sparseinst_jax.data.file_search import FileSearch
from sparseinst_jax.data.images import read_values
from sparseinst_jax.data.importers.objects import (
    Imported,
    ImportFaults,
    LabelFault,
    LabelledImage,
    check_size,
    checked_number,
    list_images,
    make_object,
    make_polygon,
    open_image,
    read_json,
    require_folder,
    with_progress,
)
from sparseinst_jax.runtime.messages import brief, counted, listed

CITYSCAPES_CLASSES = tuple("person rider car truck bus train motorcycle bicycle".split())
# Those that are no classes, but lie over objects.
_OTHER_LABELS = (
    "unlabeled, ego vehicle, rectification border, out of roi, static, dynamic, ground, road, "
    "sidewalk, parking, rail track, building, wall, fence, guard rail, bridge, tunnel, pole, "
    "polegroup, traffic light, traffic sign, vegetation, terrain, sky, caravan, trailer"
).split(", ")
_PASSED_OVER = "license plate"  # neither a class nor over others: the car's pixels stay the car's
_ADE20K = """
bed, windowpane, cabinet, person, door, table, curtain, chair, car, painting, sofa, shelf, mirror,
armchair, seat, fence, desk, wardrobe, lamp, bathtub, railing, cushion, box, column, signboard,
chest of drawers, counter, sink, fireplace, refrigerator, stairs, case, pool table, pillow, screen
door, bookcase, coffee table, toilet, flower, book, bench, countertop, stove, palm, kitchen
island, computer, swivel chair, boat, arcade machine, bus, towel, light, truck, chandelier,
awning, streetlight, booth, television receiver, airplane, apparel, pole, bannister, ottoman,
bottle, van, ship, fountain, washer, plaything, stool, barrel, basket, bag, minibike, oven, ball,
food, step, trade name, microwave, pot, animal, bicycle, dishwasher, screen, sculpture, hood,
sconce, vase, traffic light, tray, ashcan, fan, plate, monitor, bulletin board, radiator, glass,
clock, flag
"""
ADE20K_CLASSES = tuple(" ".join(_ADE20K.split()).split(", "))


class _Layout(NamedTuple):
    """Where a data set has its images and labels, and who reads the labels of an image.

    ``read`` adds the objects of a label file to its image, notes faults, and returns how many
    objects no pixel is left of.
    """

    images: str
    labels: str
    image_ending: str
    label_ending: str
    class_names: tuple[str, ...]
    read: Callable[[Path, LabelledImage, ImportFaults], int]


def read_published(name: str, source: Path, images_dir: Path | None = None) -> Imported:
    """Read one of `LAYOUTS` from the folder that holds those of its images and of its labels.

    Raises:
        FileNotFoundError: a folder is missing.
        ValueError: there are no images.
    """
    layout = LAYOUTS[name]
    labels_dir = source / layout.labels
    images_dir = source / layout.images if images_dir is None else images_dir
    require_folder(source, f"the folder that holds {layout.images} and {layout.labels}")
    require_folder(labels_dir, "the folder of the labels")
    require_folder(images_dir, "the image folder")
    search = FileSearch()
    paths = list_images(images_dir, search)
    if not paths:
        raise search.nothing(f"no image in or below {images_dir}; name its folder with --images")
    result = Imported([], layout.class_names, images_dir, ImportFaults())
    covered, read, unlabelled = 0, set[Path](), dict[str, int]()
    for path in with_progress(paths):
        place = path.relative_to(images_dir)
        part = place.parts[0] if len(place.parts) > 1 else ""
        if part == "test" or not (labels_dir / part).is_dir():
            unlabelled[part] = unlabelled.get(part, 0) + 1
            continue
        label = place.with_name(place.name.removesuffix(layout.image_ending) + layout.label_ending)
        label = labels_dir / label
        read.add(label)
        with result.faults.at(str(path)):
            if not label.is_file():
                raise LabelFault(f"its labels {label} do not exist; unpack them again")
            image = open_image(path, images_dir)
            with result.faults.at(str(label)):
                covered += layout.read(label, image, result.faults)
                result.images.append(image)
    result.notes += [
        f"WARNING: {counted(count, 'image')} of {part} without published labels in {labels_dir}: "
        "left out"
        for part, count in unlabelled.items()
    ]
    alone = [
        path
        for path in search.find(labels_dir, {Path(layout.label_ending).suffix})
        if path.name.endswith(layout.label_ending) and path not in read
        if path.relative_to(labels_dir).parts[0] != "test"
    ]
    if alone:
        shown = listed(alone, 3)
        result.notes.append(f"WARNING: {len(alone)} label files have no image: left out: {shown}")
    if covered:
        result.notes.append(f"{counted(covered, 'object')} wholly covered by others: left out")
    result.notes += [f"class names from the list of {name}", *search.left_out()]
    return result


def _read_polygons(path: Path, image: LabelledImage, faults: ImportFaults) -> int:
    """The objects of a Cityscapes json, the last polygon first."""
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("objects"), list):
        raise LabelFault("expected an object with the list 'objects', as gtFine's jsons have it")
    size = image.height, image.width
    check_size(size, (content.get("imgHeight"), content.get("imgWidth")), "the label file")
    taken, covered = np.zeros(size, bool), 0
    for number, entry in reversed(list(enumerate(content["objects"]))):
        with faults.at(f"{path}, objects[{number}]"):
            label = entry.get("label") if isinstance(entry, dict) else None
            name = label if label in _OTHER_LABELS else str(label).removesuffix("group")
            if name not in (*CITYSCAPES_CLASSES, *_OTHER_LABELS, _PASSED_OVER):
                raise LabelFault(f"{brief(label)} is none of Cityscapes' labels")
            if name == _PASSED_OVER or entry.get("deleted"):
                continue
            box, drawn = _draw(entry.get("polygon"), size)
            visible = drawn & ~taken[box]
            taken[box] |= drawn
            if name not in CITYSCAPES_CLASSES:
                continue
            if not visible.any():
                covered += 1
                continue
            mask = np.zeros(size, bool, order="F")  # as run lengths are encoded
            mask[box] = ndimage.binary_fill_holes(visible)
            kind = image.objects if name == label else image.crowd
            kind.append(make_object(name, mask, size))
    return covered


def _draw(corners: Any, size: tuple[int, int]) -> tuple[tuple[slice, slice], np.ndarray]:
    """The rows and columns of a polygon's box in the image, and its pixels there, bool."""
    if not isinstance(corners, list) or not all(
        isinstance(corner, list) and len(corner) == 2 for corner in corners
    ):
        raise LabelFault(f"'polygon' must be a list of corners [x, y], got {brief(corners)}")
    points = np.array([[checked_number(v, "a corner") for v in corner] for corner in corners])
    points = points.reshape(-1, 2)
    make_polygon(points[:, 0].tolist(), points[:, 1].tolist(), size)  # refuses what is none
    first = np.clip(np.floor(points.min(axis=0)), 0, size[::-1]).astype(int)
    last = np.clip(np.ceil(points.max(axis=0)) + 1, first, size[::-1]).astype(int)
    box = slice(first[1], last[1]), slice(first[0], last[0])
    if (first == last).any():
        return box, np.zeros((last - first)[::-1], bool)
    canvas = Image.new("1", tuple((last - first).tolist()))
    ImageDraw.Draw(canvas).polygon([tuple(corner) for corner in (points - first).tolist()], fill=1)
    return box, np.array(canvas)


def _read_map(path: Path, image: LabelledImage, faults: ImportFaults) -> int:
    """The objects of an ADE20K map, by their numbers."""
    try:
        values = read_values(path, str(path))
    except ValueError as error:
        raise LabelFault(error) from error
    if values.ndim != 3 or values.shape[2] != 3:
        raise LabelFault(
            "expected three channels, the category in red and the object's number in green; maps "
            "of one channel are those of scene parsing: take the folder annotations_instance"
        )
    size = image.height, image.width
    check_size(size, values.shape[:2], "the map")
    for number in np.unique(values[..., 1]).tolist():
        mask = values[..., 1] == number
        with faults.at(f"{path}, object {number}"):
            if number == 0:
                continue
            categories = np.unique(values[mask, 0]).tolist()
            if len(categories) > 1 or not 1 <= categories[0] <= len(ADE20K_CLASSES):
                raise LabelFault(
                    f"its category must be one of 1 to {len(ADE20K_CLASSES)}, got "
                    f"{listed(categories)}; unpack the map again"
                )
            image.objects.append(make_object(ADE20K_CLASSES[categories[0] - 1], mask, size))
    return 0


LAYOUTS = {
    "cityscapes": _Layout(
        "leftImg8bit",
        "gtFine",
        "_leftImg8bit.png",
        "_gtFine_polygons.json",
        CITYSCAPES_CLASSES,
        _read_polygons,
    ),
    "ade20k": _Layout("images", "annotations_instance", ".jpg", ".png", ADE20K_CLASSES, _read_map),
}
