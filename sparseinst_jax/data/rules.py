"""What the rules of a data set and the protocol of a test are, and those of the original.

The rules decide what is learned of a json and how it is resized in training. Those of other
implementations are in `ecosystems`, by the names that a configuration gives.

Source: detectron2's data loading and transforms as the original configures them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sparseinst_jax.data._index.columns import Columns
from sparseinst_jax.data.transforms import (
    AUGMENTATIONS,
    Size,
    Transform,
    draw_transform,
    resize_image,
    resized_size,
)


class AnnotationFilter(NamedTuple):
    """Which objects and images of a json are learned from."""

    # columns of an index -> which annotations are kept, bool [annotations]; None for all. Crowd
    # regions are no objects: they pass anyway.
    keeps: Callable[[Columns], np.ndarray] | None = None
    smallest_side: int = 0  # images with a shorter side are left out, pixels
    # images stay that have annotations, but none that is kept or only crowd regions; they are
    # learned from as images without objects
    keeps_annotated: bool = False


class ResizeRule(NamedTuple):
    """How images are resized, flipped and cropped in training."""

    # (height, width), shortest and longest side -> (height, width)
    resized_size: Callable[[Size, int, int], Size]
    # draws the transform of an image; arguments as `transforms.draw_transform`
    draw: Callable[..., Transform]
    augmentations: tuple[str, ...]  # those of `transforms.AUGMENTATIONS` that there are
    needs_boxes: bool  # whether the boxes of objects decide what a crop keeps


class EvalProtocol(NamedTuple):
    """How images get to network size in a test, and what of the padded image masks are cut from."""

    # image uint8 [h, w, 3] and (shortest, longest) in pixels -> the resized image, and the (height,
    # width) that masks are cut to before they are brought to the original size
    resize: Callable[[np.ndarray, Size], tuple[np.ndarray, Size]]
    drops_last: bool  # whether the last kept query of each image is lost
    # as in `AnnotationFilter`: an image without such an object is not predicted; None predicts all.
    # The numbers are still of all objects of the json.
    keeps: Callable[[Columns], np.ndarray] | None = None


def _resize(image: np.ndarray, eval_size: Size) -> tuple[np.ndarray, Size]:
    size = resized_size((image.shape[0], image.shape[1]), *eval_size)
    return resize_image(image, size), size


ORIGINAL_FILTER = AnnotationFilter()
ORIGINAL_RESIZE = ResizeRule(resized_size, draw_transform, AUGMENTATIONS, needs_boxes=False)
ORIGINAL_PROTOCOL = EvalProtocol(_resize, drops_last=False)
