"""Objects as LabelMe writes them, to be corrected there; `importers.labelme` reads them.

Source: the files that LabelMe 5 writes, github.com/wkentaro/labelme.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image

from sparseinst_jax.data.outlines import EXACT, outlines

VERSION = "5.5.0"  # of LabelMe, whose files these are


def labelme_content(
    image_path: str | os.PathLike,
    size: tuple[int, int],
    objects: Iterable[tuple[str, np.ndarray, str]],
    tolerance: float = EXACT,
) -> dict[str, Any]:
    """The content of a LabelMe json.

    An object is a polygon; one of several parts is as many, in a group; one with a hole is a mask,
    which LabelMe shows, moves and deletes, but whose border it cannot change.

    Args:
        image_path: of the image, relative to the json's folder.
        size: (height, width) of the image.
        objects: of each the class, the mask bool [h, w], and a note.
        tolerance: pixels, see `outlines`; the default gives the same masks back.
    """
    shapes: list[dict[str, Any]] = []
    for number, (name, mask, note) in enumerate(objects):
        polygons = outlines(mask, tolerance)
        common = {"label": name, "description": note, "flags": {}}
        if polygons is None:
            shapes.append({**common, **_mask_shape(mask), "group_id": None})
            continue
        group = number if len(polygons) > 1 else None
        shapes += [
            {
                **common,
                "shape_type": "polygon",
                "points": polygon.round(2).tolist(),
                "group_id": group,
                "mask": None,
            }
            for polygon in polygons
        ]
    return {
        "version": VERSION,
        "flags": {},
        "shapes": shapes,
        "imagePath": os.fspath(image_path),
        "imageData": None,
        "imageHeight": size[0],
        "imageWidth": size[1],
    }


def _mask_shape(mask: np.ndarray) -> dict[str, Any]:
    """A mask as a PNG of its box, whose last row and column belong to it."""
    rows, columns = np.nonzero(mask)
    top, bottom, left, right = rows.min(), rows.max(), columns.min(), columns.max()
    buffer = io.BytesIO()
    Image.fromarray(mask[top : bottom + 1, left : right + 1].astype(np.uint8)).save(buffer, "PNG")
    return {
        "shape_type": "mask",
        "points": [[float(left), float(top)], [float(right), float(bottom)]],
        "mask": base64.b64encode(buffer.getvalue()).decode("ascii"),
    }
