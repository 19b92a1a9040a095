"""Draw activation maps over a photo: a row for each object, its mask first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from sparseinst_jax.drawing import pictures

READABLE_SIDE = 240  # pixels: cells stand side by side
MOST_SIDE = 320
_DARK = 0.55  # of the photo below a map
# Of the highest value: violet, red, orange, yellow.
_STOPS = np.array([0.0, 0.35, 0.7, 1.0])
_COLOURS = np.array([[40, 0, 90], [190, 40, 80], [250, 140, 20], [255, 245, 120]], float)


def draw_activations(
    image: np.ndarray,
    masks: Sequence[np.ndarray],
    captions: Sequence[str],
    maps: np.ndarray,
    names: Sequence[str],
    labels: Sequence[int] | None = None,
) -> Image.Image:
    """Draw objects and their maps in a table.

    Args:
        image: uint8 [h, w, 3].
        masks: D of bool [h, w].
        captions: D strings, written on the masks.
        maps: float [D, G, h', w'] over the whole image.
        names: of the G maps.
        labels: D class numbers, for the colours of the masks; without, each has its own.

    Returns:
        A picture; without objects the image under a title that says so.
    """
    shrink = -(-max(image.shape[:2]) // MOST_SIDE)
    image = np.asarray(Image.fromarray(image).reduce(shrink))
    if not len(maps):
        return pictures.beside([Image.fromarray(image)], ["no object"])
    rows = []
    for index, (mask, caption) in enumerate(zip(masks, captions, strict=True)):
        small = mask[::shrink, ::shrink][: image.shape[0], : image.shape[1]]
        label = index if labels is None else labels[index]
        cell = pictures.draw_instances(
            image, [small], [""], [pictures.instance_colour(label)], READABLE_SIDE
        )
        top = float(maps[index].max())  # one scale for an object: what is weak looks weak
        cells = [cell, *(draw_map(image, each, top) for each in maps[index])]
        highest = [f"{each.max():.2g}" for each in maps[index]]
        titles = [f"{name}, up to {top}" for name, top in zip(names, highest, strict=True)]
        rows.append(pictures.beside(cells, [caption, *titles]))
    return pictures.below(rows)


def draw_map(image: np.ndarray, values: np.ndarray, top: float) -> Image.Image:
    """Draw a map float [h', w'] over an image uint8 [h, w, 3], `top` in the brightest colour."""
    factor = pictures.enlargement(image.shape[:2], READABLE_SIDE)
    size = image.shape[1] * factor, image.shape[0] * factor
    grey = np.asarray(Image.fromarray(image).convert("L").resize(size), float)[..., None]
    share = Image.fromarray((values / max(top, 1e-9)).astype(np.float32))
    share = np.clip(np.asarray(share.resize(size, Image.Resampling.BILINEAR)), 0, 1)
    colour = np.stack([np.interp(share, _STOPS, channel) for channel in _COLOURS.T], axis=-1)
    opacity = np.clip(share * 1.2, 0, 0.9)[..., None]
    drawn = (1 - opacity) * _DARK * grey + opacity * colour
    return Image.fromarray(np.rint(drawn).astype(np.uint8))
