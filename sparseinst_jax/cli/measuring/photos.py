"""Photos of the size of COCO's with polygons on them, drawn where no data set is at hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from sparseinst_jax.data.shapes import draw_image

JPEG_QUALITY = 90
NUM_CORNERS = 24
NUM_CLASSES = 80


def draw_photos(
    folder: Path, number: int, size: tuple[int, int], num_objects: int, seed: int = 0
) -> Path:
    """Draw JPEG photos and a COCO json of polygons that have nothing to do with what they show.

    Args:
      folder: exists; gets `images/` and `annotations.json`.
      number: of photos.
      size: (height, width) in pixels.
      num_objects: polygons on each photo, between a twentieth and a half of its sides.
      seed: any integer.

    Returns:
      The json.
    """
    (folder / "images").mkdir()
    images, annotations = [], []
    height, width = size
    for index in range(number):
        rng = np.random.default_rng([seed, index])
        name = f"{index + 1:06d}.jpg"
        # Drawn at half size and enlarged: photos are smoother than drawings.
        drawn, _, _ = draw_image(seed, index, (max(min(size) // 2, 16), max(max(size) // 2, 16)))
        picture = Image.fromarray(drawn).resize((width, height), Image.Resampling.BILINEAR)
        picture.save(folder / "images" / name, quality=JPEG_QUALITY)
        images.append({"id": index + 1, "file_name": name, "height": height, "width": width})
        for _ in range(num_objects):
            polygon, area, box = _polygon(rng, size)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": int(rng.integers(1, NUM_CLASSES + 1)),
                    "iscrowd": 0,
                    "area": area,
                    "bbox": box,
                    "segmentation": [polygon],
                }
            )
    categories = [{"id": i + 1, "name": f"class {i + 1}"} for i in range(NUM_CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    return path


def _polygon(
    rng: np.random.Generator, size: tuple[int, int]
) -> tuple[list[float], float, list[float]]:
    """A rough ellipse inside the photo: x, y, x, y, ...; its area and its box x, y, w, h."""
    extent = np.array(size)[::-1] * (0.05 + 0.45 * rng.random(2)) / 2
    centre = extent + rng.random(2) * (np.array(size)[::-1] - 2 * extent)
    angle = 2 * np.pi * np.arange(NUM_CORNERS) / NUM_CORNERS
    radius = 0.7 + 0.3 * rng.random(NUM_CORNERS)
    corners = centre + extent * np.stack([np.cos(angle), np.sin(angle)], 1) * radius[:, None]
    x, y = corners.T
    area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    (left, top), (right, bottom) = corners.min(0), corners.max(0)
    box = [float(value) for value in (left, top, right - left, bottom - top)]
    return [round(float(value), 2) for value in corners.ravel()], float(area), box
