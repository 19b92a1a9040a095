"""What `eval.py` draws: some images of the data set, and with `--plots` what went wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sparseinst_jax.data.coco import CocoDataset, ImageRecord, decode_mask, read_record
from sparseinst_jax.drawing import charts, visualize
from sparseinst_jax.evaluation import errors as error_counts
from sparseinst_jax.evaluation import report
from sparseinst_jax.evaluation.coco_metrics import CocoMetrics
from sparseinst_jax.evaluation.errors import ImageErrors
from sparseinst_jax.inference.masks import LazyMasks
from sparseinst_jax.inference.prediction import Prediction
from sparseinst_jax.runtime.files import unique_names

# Told apart by all kinds of colour vision (Okabe and Ito's palette).
_FOUND, _CONFUSED = (0, 158, 115), (240, 228, 66)
_FALSE, _MISSED = (213, 94, 0), (0, 114, 178)


def draw_pictures(
    dataset: CocoDataset,
    results: Sequence[Mapping[str, Any]],
    output: Path,
    count: int,
) -> list[Path]:
    """Draw some images of a data set, spread evenly over it, with what was found in them.

    Args:
        dataset: with its image folder.
        results: detections of the whole data set in COCO results format.
        output: folder of the pictures, `<name of the image>.png`.
        count: how many.

    Returns:
        The paths; an image that cannot be read has none. One with annotations has them drawn
        beside the detections.
    """
    count = min(count, len(dataset.records))
    if count <= 0:
        return []
    chosen = [dataset.records[index * len(dataset.records) // count] for index in range(count)]
    wanted = {record.image_id for record in chosen}
    found: dict[int, list[Mapping[str, Any]]] = {image_id: [] for image_id in wanted}
    for entry in results:
        if entry["image_id"] in wanted:
            found[entry["image_id"]].append(entry)
    names = unique_names([record.file_name for record in chosen])
    paths = []
    for record, name in zip(chosen, names, strict=True):
        try:
            image = read_record(record)
        except (ValueError, OSError):
            continue  # the evaluation has listed it, see config.data.on_error
        picture = _prediction(image, found[record.image_id], dataset).plot()
        if dataset.has_annotations:
            truth = _draw_annotations(image, record, dataset)
            picture = visualize.beside([picture, truth], ["predicted", "annotated"])
        paths.append(output / f"{name}.png")
        charts.save_png(picture, paths[-1])
    print(f"{len(paths)} pictures: {output / '*.png'}")
    return paths


def _prediction(
    image: np.ndarray, entries: Sequence[Mapping[str, Any]], dataset: CocoDataset
) -> Prediction:
    label_of = {category_id: label for label, category_id in enumerate(dataset.category_ids)}
    return Prediction(
        image,
        [dict(entry["segmentation"]) for entry in entries],
        np.array([entry["score"] for entry in entries], np.float32),
        np.array([label_of[entry["category_id"]] for entry in entries], np.int32),
        dataset.class_names,
        dataset.category_ids,
    )


def _draw_annotations(image: np.ndarray, record: ImageRecord, dataset: CocoDataset) -> Image.Image:
    targets = record.targets
    masks = LazyMasks(
        [target.segmentation for target in targets],
        lambda segmentation: decode_mask(segmentation, record.height, record.width),
    )
    captions = [dataset.class_names[target.label] for target in targets]
    return visualize.draw_instances(image, masks, captions)


def write_plots(
    metrics: CocoMetrics,
    dataset: CocoDataset,
    results: Sequence[Mapping[str, Any]],
    folder: Path,
    score_threshold: float,
    count: int,
) -> None:
    """Write tables and charts of an evaluation, and draw the worst images.

    Args:
        metrics: of the results.
        dataset: with annotations; where it has no image folder, no image is drawn.
        results: detections of the whole data set in COCO results format.
        folder: where they go; files of an earlier evaluation are replaced.
        score_threshold: lowest score that counts in the confusion matrix and in the images.
        count: how many of the worst images are drawn.
    """
    errors = error_counts.find_errors(dataset, results, score_threshold)
    names, ids = dataset.class_names, dataset.category_ids
    counts = error_counts.confusion_matrix(errors, len(names))
    report.write_class_table(metrics, folder / "per_class.csv")
    report.draw_precision_recall(metrics, folder / "precision_recall.png")
    report.write_confusion_table(counts, names, folder / "confusion_matrix.csv")
    report.draw_confusion(counts, names, ids, score_threshold, folder / "confusion_matrix.png")
    report.write_image_table(errors, folder / "errors_per_image.csv")
    found, objects = int(np.trace(counts)), int(counts[:-1].sum())
    print(
        f"\nat a score of {score_threshold:g} and mask IoU 0.5: {found} of {objects} objects found,"
        f" {int(counts[:-1, :-1].sum()) - found} with the wrong class, {int(counts[:-1, -1].sum())}"
        f" missed; {int(counts[-1].sum())} false positives"
    )
    print(f"tables and charts: {folder / '*'}")
    _draw_worst(error_counts.worst_images(errors, count), dataset, folder / "worst")


def _draw_worst(worst: Sequence[ImageErrors], dataset: CocoDataset, folder: Path) -> None:
    for path in folder.glob("*.png"):  # of an earlier evaluation; its ranks would mix with these
        if re.match(r"\d{3}_", path.name):
            path.unlink()
    if not all(image.record.has_image for image in worst):
        print("no picture of the worst images: set --config.data.val.images to their folder")
        return
    unread = []
    names = unique_names([image.record.file_name for image in worst])
    for rank, (image, name) in enumerate(zip(worst, names, strict=True), start=1):
        try:
            picture = draw_errors(read_record(image.record), image, dataset.class_names)
        except (FileNotFoundError, ValueError) as error:
            unread.append(str(error))
            continue
        charts.save_png(picture, folder / f"{rank:03d}_{name}.png")
    if worst:
        print(f"{len(worst) - len(unread)} worst images: {folder / '*.png'}")
    for line in unread[:3]:
        print(f"WARNING: not drawn: {line}")


def draw_errors(image: np.ndarray, errors: ImageErrors, class_names: Sequence[str]) -> Image.Image:
    """Draw what was predicted beside what is annotated, each coloured by what became of it.

    With a single class the captions are scores alone: a name beside each object says nothing.

    Args:
        image: uint8 [h, w, 3].
        errors: of this image.
        class_names: of the data set.
    """
    targets, size = errors.record.targets, image.shape[:2]
    names = class_names if len(class_names) > 1 else [""]
    found, confused = dict(errors.found), dict(errors.confused)
    predicted, annotated = _Layer(size), _Layer(size)
    for place, detection in enumerate(errors.detections):
        text = f"{names[errors.labels[place]]} {detection['score']:.2f}"
        if place in confused:
            text += f", is {names[targets[confused[place]].label]}"
            predicted.add(detection["segmentation"], text, _CONFUSED)
        elif place in errors.false:
            predicted.add(detection["segmentation"], text, _FALSE)
        elif place in found:
            predicted.add(detection["segmentation"], text, _FOUND)
    for place, target in enumerate(targets):
        kind = _MISSED if place in errors.missed else _FOUND
        kind = _CONFUSED if place in confused.values() else kind
        annotated.add(target.segmentation, names[target.label], kind)
    pair = visualize.beside(
        [predicted.draw(image), annotated.draw(image)], ["predicted", "annotated"]
    )
    entries = [
        (_FOUND, f"found ({len(found)})"),
        (_CONFUSED, f"wrong class ({len(confused)})"),
        (_FALSE, f"false positive ({len(errors.false)})"),
        (_MISSED, f"missed ({len(errors.missed)})"),
    ]
    return charts.below(
        [pair, visualize.colour_key(entries, (pair.height, pair.width), errors.record.file_name)]
    )


class _Layer:
    """Masks, captions and colours that are drawn over an image; errors lie on top."""

    def __init__(self, size: tuple[int, int]):
        self._size = size
        self._entries: list[tuple[Any, str, visualize.Colour]] = []

    def add(self, segmentation: Any, caption: str, colour: visualize.Colour) -> None:
        self._entries.append((segmentation, caption, colour))

    def draw(self, image: np.ndarray) -> Image.Image:
        order = sorted(self._entries, key=lambda entry: entry[2] == _FOUND)
        masks = LazyMasks([entry[0] for entry in order], lambda one: decode_mask(one, *self._size))
        captions, colours = [entry[1] for entry in order], [entry[2] for entry in order]
        return visualize.draw_instances(image, masks, captions, colours)
