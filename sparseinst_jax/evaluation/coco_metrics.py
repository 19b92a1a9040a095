"""Score instance masks with COCO's average precision and recall.

pycocotools' `COCOeval` (iouType "segm", at most 100 detections an image and class) is the
reference, and its numbers are reproduced to the last bit in a fraction of the time
(`average_precision.py`). Two of its traps are left out: where results have boxes, `loadRes` takes
small, medium and large from the areas of those; and a match with an annotation of the id 0 counts
as no match.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparseinst_jax.data.classes import Classes, map_categories, map_category_ids
from sparseinst_jax.evaluation.average_precision import UNDEFINED, Columns, Curves, curves
from sparseinst_jax.evaluation.coco_entries import IdPlaces, read_annotations, read_detections
from sparseinst_jax.runtime.files import read_json
from sparseinst_jax.runtime.messages import in_percent, listed

MEANINGS = {
    "AP": "average precision, mean over IoU 0.50 to 0.95",
    "AP50": "average precision at IoU 0.50",
    "AP75": "average precision at IoU 0.75",
    "APs": "average precision, objects below 32 x 32 pixels",
    "APm": "average precision, objects from 32 x 32 to 96 x 96",
    "APl": "average precision, objects above 96 x 96",
    "AR1": "average recall, 1 detection an image",
    "AR10": "average recall, 10 detections an image",
    "AR100": "average recall, 100 detections an image",
    "ARs": "average recall, small objects",
    "ARm": "average recall, medium objects",
    "ARl": "average recall, large objects",
}
METRIC_NAMES = tuple(MEANINGS)
SIZES = (
    "small, medium, large: the area of an annotation, the pixels of a detection's mask (boxes and "
    "areas in a results file do not count)"
)
# Of each class, beside `category_id` and `instances`, its objects without crowd regions.
CLASS_METRIC_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")
# Places of these thresholds among pycocotools' ten, 0.50 to 0.95.
IOU_50, IOU_75 = 0, 5


@dataclass(frozen=True)
class CocoMetrics:
    """The 12 COCO numbers and each class's own.

    Attributes:
        values: name (`METRIC_NAMES`) -> 0...1, or -1 where the annotations hold no such object.
        per_class: class name -> category_id, instances and `CLASS_METRIC_NAMES`, in the order of
            the category ids.
        precision: [10 IoU thresholds, 101 recalls, K], -1 where the annotations hold no object of
            the class; objects of all sizes, 100 detections an image.
    """

    values: dict[str, float]
    per_class: dict[str, dict[str, float]]
    precision: np.ndarray = field(compare=False, repr=False)

    def __getitem__(self, name: str) -> float:
        """Return one of the 12 numbers."""
        return self.values[name]

    def as_dict(self) -> dict[str, Any]:
        """Return what `metrics.json` holds: the 12 numbers and `per_class`."""
        return {**self.values, "per_class": self.per_class}

    def table(self) -> str:
        """Write the 12 numbers and the per-class table as text, in percent."""
        lines = [f"{'mask metric':<12}{'value':>7}"]
        lines += [
            f"{name:<12}{in_percent(self.values[name]):>7}  {MEANINGS[name]}"
            for name in METRIC_NAMES
        ]
        width = max([len("class"), *map(len, self.per_class)]) + 2
        heads = "".join(f"{name:>7}" for name in CLASS_METRIC_NAMES)
        lines += ["", f"{'class':<{width}}{'objects':>8}{heads}"]
        for name, entry in self.per_class.items():
            cells = "".join(f"{in_percent(entry[column]):>7}" for column in CLASS_METRIC_NAMES)
            lines.append(f"{name:<{width}}{entry['instances']:>8}{cells}")
        lines += ["", SIZES]
        return "\n".join(lines)


def load_json(source: str | Path | Mapping[str, Any] | Sequence[Any]) -> Any:
    """Read a json file; anything that is not a path is returned as it is.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not valid json.
    """
    if not isinstance(source, (str, Path)):
        return source
    return read_json(source, "json file", "check the path, or write the file again")


class Truth(NamedTuple):
    """Annotations that can be scored against.

    Attributes:
        places: where their images and classes stand.
        columns: the annotations.
        class_names: category id -> name.
        classes: chosen and merged classes, if any.
    """

    places: IdPlaces
    columns: Columns
    class_names: dict[int, str]
    classes: Classes | None


def evaluate(
    annotations: str | Path | Mapping[str, Any],
    predictions: str | Path | Sequence[Mapping[str, Any]],
    classes: Classes | None = None,
) -> CocoMetrics:
    """Score detections against a COCO instance annotation file.

    Args:
        annotations: a COCO json that `load_coco` accepts, or its content.
        predictions: a COCO results file, or its content: image_id, category_id, score and
            segmentation (RLE, compressed or not, or polygons) of each detection. May be empty.
        classes: chosen and merged classes; annotations and detections are mapped alike, so that
            results with the json's own ids and results with those of the classes both fit.

    Returns:
        The metrics. Nothing is printed and the arguments are left as they are.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the annotations cannot be scored against, or detections do not fit them (all
            faults are listed at once).
    """
    truth = read_truth(annotations, classes)
    name = str(predictions) if isinstance(predictions, (str, Path)) else None
    return score(truth, load_json(predictions), name)


def read_truth(
    annotations: str | Path | Mapping[str, Any], classes: Classes | None = None
) -> Truth:
    """Read what is scored against, every mask checked; see `evaluate`."""
    content = load_json(annotations)
    name = str(annotations) if isinstance(annotations, (str, Path)) else None
    if classes is not None and isinstance(content, Mapping):
        content = map_categories(content, classes)
    entries = content.get("annotations") if isinstance(content, Mapping) else None
    if not any(not entry.get("iscrowd") for entry in entries or ()):
        where = f" in {name}" if name else ""
        raise ValueError(
            f"expected COCO annotations with objects to score against{where}, got "
            f"{'crowd regions only' if entries else 'none'}; a list of images without objects can "
            "be predicted but not scored"
        )
    places = IdPlaces(content)
    names = {category["id"]: str(category["name"]) for category in content["categories"]}
    return Truth(places, read_annotations(content, places, name), names, classes)


def score(truth: Truth, results: Any, name: str | None = None) -> CocoMetrics:
    """Score detections against annotations that were read before; see `evaluate`.

    Args:
        truth: from `read_truth`.
        results: content of a COCO results file.
        name: of that file, if it is one: whether it covers the images is then looked at.
    """
    if isinstance(results, Mapping) or not isinstance(results, Sequence):
        raise ValueError(
            "expected a COCO results file, a list of detections, got "
            f"{type(results).__name__}: is it an annotation file?"
        )
    # Where an entry is no object, all of them are refused below.
    if truth.classes is not None and all(isinstance(entry, Mapping) for entry in results):
        results = map_category_ids(results, truth.classes)
    columns, names = truth.columns, truth.class_names
    detections = read_detections(results, truth.places, name)
    is_object = columns.values == 0
    if name is not None:
        _warn_of_coverage(columns.images[is_object], detections.images, truth.places, name)
    return _read(
        curves(columns, detections, len(names)),
        [(category_id, names[category_id]) for category_id in truth.places.classes],
        np.bincount(columns.classes[is_object], minlength=len(names)).tolist(),
    )


def _warn_of_coverage(wanted: np.ndarray, found: np.ndarray, places: IdPlaces, name: str) -> None:
    """Say how many images with objects a results file has nothing of: a part of it, perhaps."""
    with_objects = np.unique(wanted)
    missing = np.setdiff1d(with_objects, found)
    if len(missing):
        ids = list(places.images)
        logging.warning(
            "%s has detections in %d of the %d images with objects; all objects of the other %d "
            "(image ids %s) count as missed",
            *(name, len(with_objects) - len(missing), len(with_objects), len(missing)),
            listed(str(ids[place]) for place in missing.tolist()),
        )


def _read(
    found: Curves, categories: Sequence[tuple[int, str]], instances: Sequence[int]
) -> CocoMetrics:
    """Take the numbers out of curves; the classes are in the order of their ids."""
    precision, recall = found  # [IoU thresholds, recalls, K, sizes], [IoU thresholds, K, sizes, 3]
    means = [
        *_at_thresholds_and_sizes(precision),
        *(recall[:, :, 0, most] for most in range(recall.shape[-1])),
        *(recall[:, :, size, -1] for size in range(1, recall.shape[2])),
    ]
    per_class = {}
    for column, (category_id, name) in enumerate(categories):
        own = [*_at_thresholds_and_sizes(precision[:, :, column]), recall[:, column, 0, -1]]
        per_class[name] = {
            "category_id": int(category_id),
            "instances": instances[column],
            **dict(zip(CLASS_METRIC_NAMES, map(_mean_defined, own), strict=True)),
        }
    values = dict(zip(METRIC_NAMES, map(_mean_defined, means), strict=True))
    return CocoMetrics(values, per_class, precision[..., 0])


def _at_thresholds_and_sizes(precision: np.ndarray) -> list[np.ndarray]:
    """What AP, AP50, AP75, APs, APm and APl are means of."""
    every = precision[..., 0]
    sizes = range(1, precision.shape[-1])
    return [every, every[IOU_50], every[IOU_75], *(precision[..., size] for size in sizes)]


def _mean_defined(numbers: np.ndarray) -> float:
    defined = numbers[numbers > UNDEFINED]
    return float(np.mean(defined)) if defined.size else UNDEFINED
