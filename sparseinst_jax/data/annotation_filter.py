"""Which objects and images of a json are trained on: what each implementation leaves out.

detectron2 looks at masks after they were moved. PaddleDetection and mmdetection look at the json's
boxes before, so an object can be left out whose mask is fine. Crowd regions are no objects: they
pass.

Source: ppdet/data/source/coco.py (``parse_dataset``); mmdet/datasets/coco.py
(``parse_data_info``, ``filter_data``) and ``LoadAnnotations`` with ``poly2mask=False``, as its
SparseInst sets it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as rle

from sparseinst_jax.data.records import Annotation, BoxXYXY, ImageRecord, Segmentation

SHORTEST_BOX_SIDE = 1e-5  # pixels; PaddleDetection


class AnnotationFilter(NamedTuple):
    """What one implementation learns from.

    Attributes:
        keeps: tells from the json's entry, the object with its box, and the image whether an object
            is kept.
        smallest_side: images with a shorter side are left out, pixels.
    """

    keeps: Callable[[Mapping[str, Any], Annotation, ImageRecord], bool]
    smallest_side: int


def read_box(entry: Mapping[str, Any], segmentation: Segmentation) -> BoxXYXY:
    """Read an object's box, (x0, y0, x1, y1) in pixels; around its mask where the json has none."""
    box = entry.get("bbox")
    if isinstance(box, list | tuple) and len(box) == 4 and all(map(_is_number, box)):
        x, y, width, height = map(float, box)
        return x, y, x + width, y + height
    if isinstance(segmentation, list):
        points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in segmentation])
        (x0, y0), (x1, y1) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
        return x0, y0, x1, y1
    runs: Any = segmentation
    if isinstance(runs["counts"], list):
        runs = rle.frPyObjects(runs, *runs["size"])
    x, y, width, height = rle.toBbox(runs).tolist()
    return x, y, x + width, y + height


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))


def _keeps_all(entry: Mapping[str, Any], annotation: Annotation, record: ImageRecord) -> bool:
    return True


def _paddledetection_keeps(
    entry: Mapping[str, Any], annotation: Annotation, record: ImageRecord
) -> bool:
    x0, y0, x1, y1 = annotation.box_xyxy or (0.0, 0.0, 0.0, 0.0)
    has_area = annotation.area > 0 or "area" not in entry
    return has_area and min(x1 - x0, y1 - y0) > SHORTEST_BOX_SIDE


def _mmdetection_keeps(
    entry: Mapping[str, Any], annotation: Annotation, record: ImageRecord
) -> bool:
    x0, y0, x1, y1 = annotation.box_xyxy or (0.0, 0.0, 0.0, 0.0)
    inside_width = min(x1, record.width) - max(x0, 0)
    inside_height = min(y1, record.height) - max(y0, 0)
    return (
        not entry.get("ignore", False)
        and isinstance(annotation.segmentation, list)  # run lengths are passed over
        and inside_width > 0
        and inside_height > 0
        and (annotation.area > 0 or "area" not in entry)
        and x1 - x0 >= 1
        and y1 - y0 >= 1
    )


FILTERS = {
    "detectron2": AnnotationFilter(_keeps_all, 0),
    "paddledetection": AnnotationFilter(_paddledetection_keeps, 0),
    "mmdetection": AnnotationFilter(_mmdetection_keeps, 32),
}


def find_filter(name: str) -> AnnotationFilter:
    """Find the filter of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in FILTERS:
        raise ValueError(
            f"config.data.annotation_filter must be one of {', '.join(FILTERS)}, got {name!r}"
        )
    return FILTERS[name]
