"""The demo data set: drawn shapes on textured backgrounds, as COCO json and PNG files.

Three classes that differ in form and surface: striped discs, dotted squares, plain triangles.
Size, place, rotation and colours are random, later shapes cover earlier ones and the annotations
are the visible masks, about one image in twenty is empty. Backgrounds hold waves, blotches and
grain, so stripes alone do not mean an object.
"""

import json
import math
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as rle

CLASS_NAMES = ("striped disc", "dotted square", "plain triangle")
# Raise it when a pixel or a mask of the drawing changes: data drawn before is then refused.
DRAWING_VERSION = 1
EMPTY_SHARE = 0.05
PORTRAIT_SHARE = 0.25
MAX_SHAPES = 8
# A shape of which less is visible is not drawn at all: it could not be recognised.
MIN_VISIBLE_PIXELS = 40
MIN_VISIBLE_SHARE = 0.15


@dataclass(slots=True)
class _Shape:
    """One shape."""

    label: int  # index of its class in `CLASS_NAMES`
    center: tuple[float, float]  # (y, x) in pixels
    radius: float  # of the disc; the square and the triangle follow from it; pixels
    angle: float  # by which it is turned, radians
    color: np.ndarray  # of the surface, RGB levels 0 ... 255, float64 [3]
    second_color: np.ndarray  # of the stripes or dots, the same
    period: float  # from one stripe or dot to the next, pixels


def draw_if_missing(
    train_annotations: str | os.PathLike,
    val_annotations: str | os.PathLike,
    *,
    had_data: bool = False,
) -> None:
    """Draw the data set that a configuration names, with the default arguments, where it is due.

    That is where both files are ``train.json`` and ``val.json`` of one folder and this folder is
    missing or empty. Any other path is the user's own, or mistyped: nothing is done, and reading
    it says what is missing.

    Args:
        train_annotations: the training json of the configuration.
        val_annotations: its validation json.
        had_data: a run has used the data before: then an empty folder is where a disk is missing.

    Raises:
        ValueError: the folder holds drawn shapes, but as another version drew them; or it is empty
            and had data.
    """
    train, val = Path(train_annotations), Path(val_annotations)
    folder = train.parent
    if val.parent != folder or (train.name, val.name) != ("train.json", "val.json"):
        return
    is_empty = folder.is_dir() and not any(folder.iterdir())
    if had_data and is_empty:
        raise ValueError(
            f"{folder} is empty, where the run had its data: is a disk not mounted? Mount it; or "
            "remove the folder, and the same command draws the shapes again"
        )
    if is_empty or not folder.exists():
        print(f"drawing the shapes data set in {folder}", flush=True)
        draw_shapes_dataset(folder)
        return
    _stored_settings(folder)  # refuses what another version drew


def draw_shapes_dataset(
    directory: str | os.PathLike,
    num_train: int = 2000,
    num_val: int = 200,
    seed: int = 0,
    image_size: tuple[int, int] = (128, 160),
) -> Path:
    """Draw the data set unless it is there already; always the same for the same arguments.

    Writes ``images/train/*.png``, ``images/val/*.png``, ``train.json`` and ``val.json``, into a
    temporary folder that is renamed at the end: a killed run leaves no half data set.

    Args:
        directory: where the data set goes; parents are made.
        num_train: training images, drawn from ``seed``.
        num_val: validation images, drawn from ``seed + 1``.
        seed: any integer >= 0.
        image_size: (shorter, longer) side in pixels; a quarter of the images is upright.

    Returns:
        the directory.

    Raises:
        ValueError: the directory holds something else, or a data set of other arguments or drawn
            by another version.
    """
    directory = Path(directory)
    settings = {
        "generator": "shapes",
        "version": DRAWING_VERSION,
        "num_train": num_train,
        "num_val": num_val,
        "seed": seed,
        "image_size": list(image_size),
    }
    if _is_drawn(directory, settings):
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.partial-", dir=directory.parent))
    try:
        partial.chmod(0o755)
        _draw_split(partial, "train", num_train, seed, image_size, settings)
        _draw_split(partial, "val", num_val, seed + 1, image_size, settings)
        try:
            os.replace(partial, directory)
        except OSError:
            # Another process may have drawn it meanwhile.
            if not _is_drawn(directory, settings):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


def _is_drawn(directory: Path, settings: dict[str, Any]) -> bool:
    if not directory.exists() or not any(directory.iterdir()):
        return False
    found = _stored_settings(directory)
    if found != settings:
        content = "other files" if found is None else f"shapes drawn with {found}"
        raise ValueError(
            f"{directory} holds {content}; "
            f"expected nothing or shapes drawn with {settings}; name another folder or remove it"
        )
    return True


def _stored_settings(directory: Path) -> dict[str, Any] | None:
    """The settings that a folder was drawn with; None if this module did not draw it.

    Raises a ValueError if another version did.
    """
    try:
        content = json.loads((directory / "val.json").read_bytes())
        settings = content["info"]["settings"]
        if settings["generator"] != "shapes":
            return None
    except (OSError, ValueError, LookupError, TypeError):
        return None  # no such file, no json, or one of another origin
    version = settings.get("version")
    if version != DRAWING_VERSION:
        drawn_by = "an earlier version" if version is None else f"version {version}"
        raise ValueError(
            f"{directory} holds shapes as {drawn_by} of the drawing made them, expected version "
            f"{DRAWING_VERSION}: remove the folder, and the same command draws it again"
        )
    return settings


def _draw_split(
    root: Path,
    split: str,
    number: int,
    seed: int,
    image_size: tuple[int, int],
    settings: dict[str, Any],
) -> None:
    folder = root / "images" / split
    folder.mkdir(parents=True)
    images, annotations = [], []
    for index in range(number):
        image, labels, masks = draw_image(seed, index, image_size)
        file_name = f"{index + 1:06d}.png"
        Image.fromarray(image).save(folder / file_name, compress_level=1)
        height, width = image.shape[:2]
        images.append({"id": index + 1, "file_name": file_name, "height": height, "width": width})
        for label, mask in zip(labels, masks, strict=True):
            encoded = rle.encode(np.asfortranarray(mask))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": int(label) + 1,
                    "iscrowd": 0,
                    "area": int(mask.sum()),
                    "bbox": rle.toBbox(encoded).tolist(),
                    "segmentation": {
                        "size": [height, width],
                        "counts": encoded["counts"].decode(),
                    },
                }
            )
    content = {
        "info": {"description": "drawn shapes", "settings": settings},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CLASS_NAMES)],
    }
    (root / f"{split}.json").write_text(json.dumps(content))


def draw_image(
    seed: int, index: int, image_size: tuple[int, int] = (128, 160)
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw one image.

    Args:
        seed: seed of the split.
        index: number of the image; each has a generator of its own.
        image_size: (shorter, longer) side in pixels.

    Returns:
        image uint8 [h, w, 3], labels int64 [m], visible masks uint8 [m, h, w] (disjoint).
    """
    # Only Generator.random is used: its stream has stayed the same over NumPy's releases.
    rng = np.random.default_rng([seed, index])
    short, long = image_size
    size = (long, short) if rng.random() < PORTRAIT_SHARE else (short, long)
    is_empty = rng.random() < EMPTY_SHARE
    number = 0 if is_empty else 1 + int(rng.random() * MAX_SHAPES)
    image = _background(rng, size)
    shapes = [_draw_shape(rng, size, image) for _ in range(number)]
    shapes, masks = _visible(shapes, size)
    rows, columns = np.mgrid[: size[0], : size[1]].astype(np.float64)
    for shape, mask in zip(shapes, masks, strict=True):
        where = mask.nonzero()
        image[where] = _surface(shape, rows[where], columns[where])
    # Uneven light and grain over everything, so that no surface is one flat colour.
    tilt = (rng.random(2) - 0.5) * 60
    light = tilt[0] * (rows / size[0] - 0.5) + tilt[1] * (columns / size[1] - 0.5)
    grain = (rng.random((*size, 3)) - 0.5) * (8 + 28 * rng.random())
    image = image + light[..., None] + grain
    image = np.clip(np.floor(image + 0.5), 0, 255).astype(np.uint8)
    labels = np.array([shape.label for shape in shapes], np.int64)
    return image, labels, masks


def _background(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Waves and blotches of random colours, float64 [h, w, 3]."""
    rows, columns = np.mgrid[: size[0], : size[1]].astype(np.float64)
    image = np.zeros((*size, 3)) + 60 + 135 * rng.random(3)
    for _ in range(1 + int(rng.random() * 3)):
        angle, phase = math.pi * rng.random(), 2 * math.pi * rng.random()
        period = 5 * (12.0 ** rng.random())  # 5 ... 60 px: as fine as a stripe and much coarser
        along = rows * math.sin(angle) + columns * math.cos(angle)
        wave = np.sin(along * (2 * math.pi / period) + phase)
        image += wave[..., None] * ((rng.random(3) - 0.5) * 50)
    for _ in range(int(rng.random() * 7)):
        center, extent = rng.random(2) * size, (0.05 + 0.25 * rng.random(2)) * min(size)
        distance = ((rows - center[0]) / extent[0]) ** 2 + ((columns - center[1]) / extent[1]) ** 2
        image += (1 / (1 + distance**2))[..., None] * ((rng.random(3) - 0.5) * 110)
    return image


def _draw_shape(rng: np.random.Generator, size: tuple[int, int], background: np.ndarray) -> _Shape:
    label = int(rng.random() * len(CLASS_NAMES))
    center = rng.random(2) * size
    radius = min(size) * 0.1 * (3.0 ** rng.random())  # 13 ... 38 px of 128
    angle = 2 * math.pi * rng.random()
    behind = background[int(center[0]), int(center[1])]
    color = _color_unlike(rng, behind, 60)
    second_color = _shade(rng, color)
    # Several stripes or dots fit into the smallest shape, and none is thinner than two pixels.
    period = max(4.5, radius * (0.35 + 0.25 * rng.random()))
    return _Shape(label, (center[0], center[1]), radius, angle, color, second_color, period)


def _color_unlike(rng: np.random.Generator, other: np.ndarray, distance: float) -> np.ndarray:
    """A colour at least ``distance`` from another (of 20 drawn, else the last)."""
    candidates = 20 + 215 * rng.random((20, 3))
    for candidate in candidates:
        if np.sqrt(((candidate - other) ** 2).sum()) >= distance:
            break
    return candidate


def _shade(rng: np.random.Generator, color: np.ndarray) -> np.ndarray:
    """A darker shade of a bright colour, a lighter one of a dark colour."""
    share = 0.25 + 0.2 * rng.random()
    return color * share if color.mean() > 110 else 255 - (255 - color) * share


def _in_shape(shape: _Shape, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, ...]:
    """Coordinates turned into the shape's frame, in pixels."""
    y, x = rows - shape.center[0], columns - shape.center[1]
    cos, sin = math.cos(shape.angle), math.sin(shape.angle)
    return x * cos + y * sin, y * cos - x * sin


def _outline(shape: _Shape, size: tuple[int, int]) -> np.ndarray:
    """Mask of the whole shape, bool [h, w]."""
    mask = np.zeros(size, bool)
    reach = shape.radius * 1.3
    top, left = (max(int(c - reach), 0) for c in shape.center)
    bottom, right = (int(c + reach) + 2 for c in shape.center)
    window = mask[top:bottom, left:right]
    rows, columns = np.mgrid[top : top + window.shape[0], left : left + window.shape[1]]
    u, v = _in_shape(shape, rows, columns)
    if shape.label == 0:
        window[:] = u * u + v * v < shape.radius**2
    elif shape.label == 1:
        window[:] = np.maximum(abs(u), abs(v)) < shape.radius * 0.88
    else:
        # Equilateral: each side 0.62 radii from the centre, corners twice as far.
        inside = np.ones(window.shape, bool)
        for k in range(3):
            turn = 2 * math.pi * k / 3
            inside &= u * math.cos(turn) + v * math.sin(turn) < shape.radius * 0.62
        window[:] = inside
    return mask


def _visible(shapes: list[_Shape], size: tuple[int, int]) -> tuple[list[_Shape], np.ndarray]:
    """Visible masks, later shapes in front; shapes hidden almost wholly are taken out."""
    outlines = [_outline(shape, size) for shape in shapes]
    shapes = list(shapes)
    while True:
        covered = np.zeros(size, bool)
        masks = []
        for outline in reversed(outlines):
            masks.append(outline & ~covered)
            covered |= outline
        masks.reverse()
        # The shape with the smallest visible share goes first: the others then show more.
        shares = [
            0.0 if mask.sum() < MIN_VISIBLE_PIXELS else mask.sum() / outline.sum()
            for mask, outline in zip(masks, outlines, strict=True)
        ]
        if not shapes or min(shares) >= MIN_VISIBLE_SHARE:
            stacked = np.array(masks, np.uint8).reshape(len(shapes), *size)
            return shapes, stacked
        worst = int(np.argmin(shares))
        del shapes[worst], outlines[worst]


def _surface(shape: _Shape, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Colours of pixels of a shape, float64 [pixels, 3]."""
    u, v = _in_shape(shape, rows, columns)
    if shape.label == 0:
        second = np.mod(u, shape.period) < shape.period * 0.5
    elif shape.label == 1:
        du = np.mod(u, shape.period) - shape.period / 2
        dv = np.mod(v, shape.period) - shape.period / 2
        second = du * du + dv * dv < (shape.period * 0.34) ** 2
    else:
        second = np.zeros(u.shape, bool)
    return np.where(second[:, None], shape.second_color, shape.color)
