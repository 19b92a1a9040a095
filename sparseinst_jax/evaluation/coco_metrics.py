"""Score instance masks with COCO's average precision and recall.

pycocotools is the reference and does the counting (`COCOeval`, iouType "segm", at most 100
detections an image). What is done here is to hand it the data in the form that it takes for
granted, and to keep it quiet:

* a detection's own `bbox` and `area` are dropped: pycocotools would otherwise sort detections into
  small, medium and large by the area of the box;
* an annotation without `area` or `iscrowd` gets one;
* annotations are numbered anew where one has the id 0, because pycocotools takes a match with the
  id 0 for no match.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sparseinst_jax.data.classes import Classes, map_categories, map_category_ids
from sparseinst_jax.data.coco import encode_segmentation
from sparseinst_jax.files import read_json
from sparseinst_jax.texts import brief, printable

METRIC_NAMES = (
    "AP",
    "AP50",
    "AP75",
    "APs",
    "APm",
    "APl",
    "AR1",
    "AR10",
    "AR100",
    "ARs",
    "ARm",
    "ARl",
)
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
# Of each class, beside `category_id` and `instances`, its objects without crowd regions.
CLASS_METRIC_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")
# pycocotools' value for "no object of this kind in the annotations".
UNDEFINED = -1.0
# Places of these thresholds among pycocotools' ten, 0.50 to 0.95.
IOU_50, IOU_75 = 0, 5
MAX_SHOWN_FAULTS = 10
MAX_SCORE = 1e30  # of a detection, either side of 0; probabilities are meant, logits are taken
# Numbers of a polygon with three corners. pycocotools takes four numbers for a box and fails on an
# empty list, so polygons with fewer corners are left out, as they are when the data is read.
MIN_POLYGON = 6


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
            f"{name:<12}{_percent(self.values[name]):>7}  {MEANINGS[name]}" for name in METRIC_NAMES
        ]
        width = max([len("class"), *map(len, self.per_class)]) + 2
        heads = "".join(f"{name:>7}" for name in CLASS_METRIC_NAMES)
        lines += ["", f"{'class':<{width}}{'objects':>8}{heads}"]
        for name, entry in self.per_class.items():
            cells = "".join(f"{_percent(entry[column]):>7}" for column in CLASS_METRIC_NAMES)
            lines.append(f"{name:<{width}}{entry['instances']:>8}{cells}")
        return "\n".join(lines)


def _percent(value: float) -> str:
    return "-" if value < 0 else f"{100 * value:.2f}"


def coco_results(
    image_id: int,
    rles: Sequence[Mapping[str, Any]],
    scores: np.ndarray,
    labels: np.ndarray,
    category_ids: Sequence[int | None],
) -> list[dict[str, Any]]:
    """Write detections of one image as entries of a COCO results file.

    A label whose category id is None is left out.
    """
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[label],
            "segmentation": dict(rle),
            "score": float(score),
        }
        for rle, score, label in zip(rles, scores, labels, strict=True)
        if category_ids[label] is not None
    ]


def load_json(source: str | Path | Mapping[str, Any] | Sequence[Any]) -> Any:
    """Read a json file; anything that is not a path is returned as it is.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not valid json.
    """
    if not isinstance(source, (str, Path)):
        return source
    return read_json(source, "json file", "check the path, or write the file anew")


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
    content = load_json(annotations)
    if classes is not None and isinstance(content, Mapping):
        content = map_categories(content, classes)
    entries = content.get("annotations") if isinstance(content, Mapping) else None
    if not any(not entry.get("iscrowd") for entry in entries or ()):
        name = f" in {annotations}" if isinstance(annotations, (str, Path)) else ""
        raise ValueError(
            f"expected COCO annotations with objects to score against{name}, got "
            f"{'crowd regions only' if entries else 'none'}; a list of images without objects can "
            "be predicted but not scored"
        )
    results = load_json(predictions)
    if isinstance(results, Mapping) or not isinstance(results, Sequence):
        raise ValueError(
            "expected a COCO results file, a list of detections, got "
            f"{type(results).__name__}: is it an annotation file?"
        )
    # Where an entry is no object, all of them are refused below.
    if classes is not None and all(isinstance(entry, Mapping) for entry in results):
        results = map_category_ids(results, classes)
    images = {image["id"]: image for image in content["images"]}
    truth = _index(content, _prepare_annotations(content, images))
    detections = _index(content, _prepare_detections(results, images, content["categories"]))
    evaluation = COCOeval(truth, detections, iouType="segm")
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return _read(evaluation, content["categories"])


def _read(evaluation: COCOeval, categories: Sequence[Mapping[str, Any]]) -> CocoMetrics:
    """Take the numbers out of an accumulated evaluation."""
    values = {
        name: float(value) for name, value in zip(METRIC_NAMES, evaluation.stats, strict=True)
    }
    names = {category["id"]: str(category["name"]) for category in categories}
    # [IoU thresholds, recalls, classes, sizes, most detections]; sizes: all, small, medium, large
    precision = evaluation.eval["precision"][..., -1]
    recall = evaluation.eval["recall"][:, :, 0, -1]
    instances = Counter(
        entry["category_id"]
        for entry in evaluation.cocoGt.dataset["annotations"]
        if not entry["iscrowd"]
    )
    per_class = {}
    for column, category_id in enumerate(evaluation.params.catIds):
        every = precision[:, :, column, 0]
        per_class[names[category_id]] = {
            "category_id": int(category_id),
            "instances": instances[category_id],
            "AP": _mean_defined(every),
            "AP50": _mean_defined(every[IOU_50]),
            "AP75": _mean_defined(every[IOU_75]),
            **{
                name: _mean_defined(precision[:, :, column, size])
                for size, name in enumerate(("APs", "APm", "APl"), start=1)
            },
            "AR100": _mean_defined(recall[:, column]),
        }
    return CocoMetrics(values, per_class, precision[:, :, :, 0])


def _mean_defined(precision: np.ndarray) -> float:
    defined = precision[precision > UNDEFINED]
    return float(np.mean(defined)) if defined.size else UNDEFINED


def _index(content: Mapping[str, Any], annotations: list[dict[str, Any]]) -> COCO:
    """Build pycocotools' index over our own list of annotations, without a print."""
    coco: Any = COCO()
    coco.dataset = {
        "info": content.get("info", {}),
        "images": list(content["images"]),
        "categories": list(content["categories"]),
        "annotations": annotations,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _prepare_annotations(
    content: Mapping[str, Any], images: Mapping[int, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Copy the annotations and supply what pycocotools takes for granted."""
    renumber = any(entry["id"] == 0 for entry in content["annotations"])
    prepared = []
    for number, entry in enumerate(content["annotations"], start=1):
        annotation = dict(entry)
        if isinstance(annotation["segmentation"], list):
            corners = [part for part in annotation["segmentation"] if len(part) >= MIN_POLYGON]
            if not corners:
                continue
            annotation["segmentation"] = corners
        if renumber:
            annotation["id"] = number
        annotation["iscrowd"] = int(annotation.get("iscrowd") or 0)
        if annotation.get("area") is None:
            image = images[annotation["image_id"]]
            size = image["height"], image["width"]
            rle: Any = encode_segmentation(annotation["segmentation"], *size)
            annotation["area"] = float(coco_mask.area(rle))
        prepared.append(annotation)
    return prepared


def _unreadable(entry: Any) -> str | None:
    """Say why an entry of a results file is no detection, or None."""
    if not isinstance(entry, Mapping):
        return f"is a {type(entry).__name__}, not an object"
    missing = {"image_id", "category_id", "score", "segmentation"} - entry.keys()
    if missing:
        return f"lacks {', '.join(sorted(missing))}"
    for key in ("image_id", "category_id"):
        if isinstance(entry[key], bool) or not isinstance(entry[key], int | np.integer):
            return f"has the {key} {brief(entry[key])}, not an integer"
    score = entry["score"]
    # No score is larger; this also holds back integers that no float can hold.
    if (
        isinstance(score, bool)
        or not isinstance(score, int | float | np.floating)
        or not abs(score) <= MAX_SCORE
    ):
        return f"has the score {brief(score)}, not a number"
    if not isinstance(entry["segmentation"], Mapping | list):
        return "has a mask that is neither run lengths nor polygons"
    return None


def _reason(error: Exception) -> str:
    return printable(str(error), 300)


def _prepare_detections(
    results: Sequence[Mapping[str, Any]],
    images: Mapping[int, Mapping[str, Any]],
    categories: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Copy the detections with areas measured on their masks; collect every fault."""
    faults: list[str] = []
    prepared = []
    for number, entry in enumerate(results):
        fault = _unreadable(entry)
        if fault:
            faults.append(f"detection {number} {fault}")
            continue
        image = images.get(entry["image_id"])
        if image is None:
            image_id = brief(entry["image_id"])
            faults.append(f"detection {number} is of image {image_id}, not in the json")
            continue
        size = (image["height"], image["width"])
        mask: Any = entry["segmentation"]
        got = size if isinstance(mask, list) else mask.get("size")
        got = tuple(got) if isinstance(got, list) else got
        if got != size:
            faults.append(
                f"detection {number} has a mask of (height, width) {brief(got)}, image "
                f"{entry['image_id']} has {size}"
            )
            continue
        try:
            rle: Any = encode_segmentation(mask, *size)
            area = float(coco_mask.area(rle))
        except Exception as error:  # pycocotools raises whatever it trips over
            faults.append(f"detection {number} has a mask that cannot be read: {_reason(error)}")
            continue
        prepared.append(
            {
                "id": len(prepared) + 1,
                "image_id": entry["image_id"],
                "category_id": entry["category_id"],
                "score": entry["score"],
                "segmentation": rle,
                "area": area,
                "iscrowd": 0,
            }
        )
    if faults:
        shown = "\n  ".join(faults[:MAX_SHOWN_FAULTS])
        raise ValueError(
            f"{len(faults)} of {len(results)} detections do not fit the annotations; are they of "
            f"this data set?\n  {shown}"
        )
    known = {category["id"] for category in categories}
    foreign = {entry["category_id"] for entry in prepared} - known
    if foreign:
        logging.warning(
            "detections of the category ids %s are left out: the annotations do not name them",
            sorted(foreign),
        )
    return prepared
