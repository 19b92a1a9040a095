"""How images get to network size in a test, and what of the padded image masks are cut from.

The original's way is the right one. PaddleDetection's published numbers were measured with another
resize and two slips; they are followed here to reproduce those numbers, for nothing else.

Source: the original's test transforms; PaddlePaddle/PaddleDetection, pull request 7357:
``Resize`` of ppdet/data/transform/operators.py, ``SparseInstDecoder.inference_single`` and
``get_seg_res`` (ppdet/metrics/json_results.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sparseinst_jax.data.images import opencv_resize
from sparseinst_jax.data.transforms import Size, resize_image, resized_size


class EvalProtocol(NamedTuple):
    """One implementation's way to test.

    Attributes:
        resize: image uint8 [h, w, 3] and (shortest, longest) in pixels -> the resized image, and
            the (height, width) that masks are cut to before they are brought to the original size.
        drops_last: whether the last kept query of each image is lost.
    """

    resize: Callable[[np.ndarray, Size], tuple[np.ndarray, Size]]
    drops_last: bool


def _resize_original(image: np.ndarray, eval_size: Size) -> tuple[np.ndarray, Size]:
    size = resized_size((image.shape[0], image.shape[1]), *eval_size)
    return resize_image(image, size), size


def _resize_paddledetection(image: np.ndarray, eval_size: Size) -> tuple[np.ndarray, Size]:
    """Resize by bicubic with a factor; the cut is not rounded as the image is, but down."""
    height, width = image.shape[:2]
    factor = min(eval_size[0] / min(height, width), eval_size[1] / max(height, width))
    # Stored as float32 there: 853 must not become 852 by a rounding error.
    mask_size = (
        max(int(np.float32(height * factor)), 1),
        max(int(np.float32(width * factor)), 1),
    )
    return opencv_resize.resize_bicubic_by_factor(image, factor), mask_size


PROTOCOLS = {
    "original": EvalProtocol(_resize_original, drops_last=False),
    "paddledetection": EvalProtocol(_resize_paddledetection, drops_last=True),
}


def find_protocol(name: str) -> EvalProtocol:
    """Find the protocol of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in PROTOCOLS:
        raise ValueError(
            f"config.eval.protocol must be one of {', '.join(PROTOCOLS)}, got {name!r}"
        )
    return PROTOCOLS[name]
