"""Where a network looked for each instance that it found."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from sparseinst_jax.drawing.activations import draw_activations
from sparseinst_jax.runner.prediction import SHOWN_SCORE, Prediction


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
    return draw_activations(
        found.image,
        [found[int(i)].mask for i in chosen],
        [f"{found.class_names[i]} {found.scores[i]:.2f}" for i in chosen],
        activations.maps[chosen],
        activations.names,
        found.labels[chosen].tolist() if len(found.names) > 1 else None,
    )
