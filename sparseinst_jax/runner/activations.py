"""Where a network looked for each instance that it found, and the picture of it."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from sparseinst_jax.drawing import pictures
from sparseinst_jax.runner.prediction import SHOWN_SCORE, Prediction

READABLE_SIDE = 240  # pixels: cells stand side by side
MOST_SIDE = 320
_DARK = 0.55  # of the photo below a map
# Of the highest value: violet, red, orange, yellow.
_STOPS = np.array([0.0, 0.35, 0.7, 1.0])
_COLOURS = np.array([[40, 0, 90], [190, 40, 80], [250, 140, 20], [255, 245, 120]], float)


@dataclasses.dataclass(frozen=True, eq=False)
class Activations:
    """The instances of one image with their activation maps.

    Attributes:
        prediction: the D instances.
        names: of the G maps of each instance, such as "group 1".
        maps: float32 [D, G, h, w] in 0...1, over the image without padding, at the network's stride
            (8).
    """

    prediction: Prediction
    names: tuple[str, ...]
    maps: np.ndarray

    @classmethod
    def of(
        cls,
        prediction: Prediction,
        maps: Mapping[str, Any],
        padded_size: tuple[int, ...],
        valid_size: tuple[int, int],
    ) -> Activations:
        """Choose the maps of the instances found, and cut their padding off.

        Args:
            prediction: with `query_index`.
            maps: name to [1, N, h, w] over the padded image.
            padded_size: (height, width) in pixels.
            valid_size: (height, width) of the image in it.
        """
        every = np.stack([np.asarray(each, np.float32)[0] for each in maps.values()], axis=1)
        height, width = (
            max(round(cells * valid / padded), 1)
            for cells, valid, padded in zip(every.shape[2:], valid_size, padded_size, strict=False)
        )
        assert prediction.query_index is not None, "a predictor says it"
        return cls(prediction, tuple(maps), every[prediction.query_index, :, :height, :width])

    def __len__(self) -> int:
        return len(self.prediction)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        plot_activations(self).save(buffer, format="PNG")
        return buffer.getvalue()


def plot_activations(
    activations: Activations, score_threshold: float = SHOWN_SCORE, most: int = 6
) -> Image.Image:
    """Draw which map fires for which object: a row for each, its mask first, then map by map.

    A map is drawn over the photo in grey, from transparent (0) to yellow (the highest value of the
    object's maps; its own highest value is written above each).

    Args:
        activations: of `Predictor.activations`.
        score_threshold: instances that score less are left out.
        most: rows; the surest instances are drawn.
    """
    found = activations.prediction
    order = np.argsort(-found.scores, kind="stable")
    chosen = order[found.scores[order] >= score_threshold][:most]
    shrink = -(-max(found.image.shape[:2]) // MOST_SIDE)
    image = np.asarray(Image.fromarray(found.image).reduce(shrink))
    if not len(chosen):
        return pictures.beside([Image.fromarray(image)], ["no object"])
    rows = []
    for row, index in enumerate(chosen.tolist()):
        small = found[index].mask[::shrink, ::shrink][: image.shape[0], : image.shape[1]]
        colour = pictures.instance_colour(int(found.labels[index]) if len(found.names) > 1 else row)
        cell = pictures.draw_instances(image, [small], [""], [colour], READABLE_SIDE)
        maps = activations.maps[index]
        top = float(maps.max())  # one scale for an object: what is weak looks weak
        cells = [cell, *(_draw_map(image, each, top) for each in maps)]
        titles = [f"{found.class_names[index]} {found.scores[index]:.2f}"]
        highest = zip(activations.names, maps, strict=True)
        titles += [f"{name}, up to {each.max():.2g}" for name, each in highest]
        rows.append(pictures.beside(cells, titles))
    return pictures.below(rows)


def _draw_map(image: np.ndarray, values: np.ndarray, top: float) -> Image.Image:
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
