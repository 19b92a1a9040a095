"""What an evaluation leaves in a folder: tables (CSV), charts and pictures (PNG)."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sparseinst_jax.data.coco import CocoDataset, decode_mask, read_record
from sparseinst_jax.drawing import charts, pictures
from sparseinst_jax.evaluation.average_precision import UNDEFINED
from sparseinst_jax.evaluation.coco_metrics import CLASS_METRIC_NAMES, IOU_50, IOU_75, CocoMetrics
from sparseinst_jax.evaluation.errors import (
    ImageErrors,
    confusion_matrix,
    find_errors,
    worst_images,
)
from sparseinst_jax.runner.prediction import Prediction
from sparseinst_jax.runtime.files import replace_file, unique_names
from sparseinst_jax.runtime.messages import in_percent

BACKGROUND = "background"
_FORMULA = ("=", "+", "-", "@")
# A chart of more classes than these would be too large to look at; the tables hold them all.
MAX_CURVES, MAX_ROWS = 119, 100
MAX_LARGE = 6  # panels of curves
# Told apart by all kinds of colour vision (Okabe and Ito's palette).
_FOUND, _CONFUSED = (0, 158, 115), (240, 228, 66)
_FALSE, _MISSED = (213, 94, 0), (0, 114, 178)


def write_report(
    metrics: CocoMetrics,
    dataset: CocoDataset,
    results: Sequence[Mapping[str, Any]],
    folder: Path,
    score_threshold: float,
    count: int,
) -> list[str]:
    """Write tables and charts of an evaluation, and draw the worst images.

    Args:
        metrics: of the results.
        dataset: with annotations; where it has no image folder, no image is drawn.
        results: detections of the whole data set in COCO results format.
        folder: where they go; files of an earlier evaluation are replaced.
        score_threshold: lowest score that counts in the confusion matrix and in the images.
        count: how many of the worst images are drawn.

    Returns:
        Lines on what was found and written.
    """
    errors = find_errors(dataset, results, score_threshold)
    names, ids = dataset.class_names, dataset.category_ids
    counts = confusion_matrix(errors, len(names))
    write_class_table(metrics, folder / "per_class.csv")
    draw_precision_recall(metrics, folder / "precision_recall.png")
    write_confusion_table(counts, names, folder / "confusion_matrix.csv")
    draw_confusion(counts, names, ids, score_threshold, folder / "confusion_matrix.png")
    write_image_table(errors, folder / "errors_per_image.csv")
    found, objects = int(np.trace(counts)), int(counts[:-1].sum())
    return [
        f"at a score of {score_threshold:g} and mask IoU 0.5: {found} of {objects} objects found, "
        f"{int(counts[:-1, :-1].sum()) - found} with the wrong class, {int(counts[:-1, -1].sum())} "
        f"missed; {int(counts[-1].sum())} false positives",
        f"tables and charts: {folder / '*'}",
        *_draw_worst(worst_images(errors, count), dataset, folder / "worst"),
    ]


def write_class_table(metrics: CocoMetrics, path: Path) -> None:
    """Write `per_class.csv`: fractions 0...1, empty where the class has no such object."""
    heads = ["class", "category_id", "instances", *CLASS_METRIC_NAMES]
    rows = [
        [name, entry["category_id"], entry["instances"]]
        + [_cell(entry[column]) for column in CLASS_METRIC_NAMES]
        for name, entry in metrics.per_class.items()
    ]
    _write_csv(path, [heads, *rows])


def write_image_table(errors: Sequence[ImageErrors], path: Path) -> None:
    """Write `errors_per_image.csv`: one row for each image, most errors first."""
    heads = ["file_name", "image_id", "objects", "found", "wrong_class", "false_positives"]
    rows = [
        [
            image.record.file_name,
            image.record.image_id,
            len(image.record.targets),
            len(image.found),
            len(image.confused),
            len(image.false),
            len(image.missed),
            image.num_errors,
        ]
        for image in sorted(errors, key=lambda image: -image.num_errors)
    ]
    _write_csv(path, [[*heads, "missed", "errors"], *rows])


def write_confusion_table(counts: np.ndarray, class_names: Sequence[str], path: Path) -> None:
    """Write `confusion_matrix.csv`: a row for each annotated class, a column for each predicted."""
    names = [*class_names, BACKGROUND]
    rows = [[name, *row] for name, row in zip(names, counts.tolist(), strict=True)]
    _write_csv(path, [["annotated \\ predicted", *names], *rows])


def draw_confusion(
    counts: np.ndarray,
    class_names: Sequence[str],
    category_ids: Sequence[int],
    score_threshold: float,
    path: Path,
) -> None:
    """Draw `confusion_matrix.png`.

    Of more than `MAX_ROWS` classes those with the most errors have a row and a column of their own,
    the others share one, so that no count is lost.
    """
    counts, chosen, num_others = _merged(counts)
    names = [class_names[label] for label in chosen]
    names += [f"{num_others} other classes"] * bool(num_others) + [BACKGROUND]
    ids = [category_ids[label] for label in chosen] + [0] * (len(names) - len(chosen))
    notes = (
        f"Score at least {score_threshold:g}, mask IoU at least 0.5; darker: a larger share of the "
        "row.\nLast column: missed objects. Last row: false positives.\n"
        f"{int(np.trace(counts))} of {int(counts[:-1].sum())} objects found with the right class."
    )
    charts.save(charts.matrix(counts, names, ids, notes), path)


def draw_precision_recall(metrics: CocoMetrics, path: Path) -> None:
    """Draw `precision_recall.png`: a panel for each class, their mean first.

    Three lines in each: at IoU 0.50, at 0.75, and the mean over the ten thresholds 0.50 to 0.95;
    the area below a line is the AP that stands in the title. Of more than `MAX_CURVES` classes
    those with the most objects are shown.
    """
    names = list(metrics.per_class)
    instances = [metrics.per_class[name]["instances"] for name in names]
    order = [label for label in range(len(names)) if instances[label]]
    shown = set(sorted(order, key=lambda label: -instances[label])[:MAX_CURVES])
    groups = [("all classes", order)] if len(order) != 1 else []
    groups += [(names[label], [label]) for label in order if label in shown]
    panels = []
    for name, labels in groups:
        curves = mean_precision(metrics.precision[:, :, labels])
        title = f"{name}, AP {in_percent(float(curves['AP'].mean()))}"
        lines = ("IoU 0.50", "IoU 0.75", "mean over IoU 0.50 to 0.95")
        panels.append((title, dict(zip(lines, curves.values(), strict=True))))
    note = "AP, in percent: the area below the mean"
    if len(shown) < len(order):
        note += f"; {len(shown)} of {len(order)} classes, those with the most objects"
    is_small = len(panels) > MAX_LARGE
    charts.save(charts.precision_recall(panels, note, is_small), path)


def mean_precision(precision: np.ndarray) -> dict[str, np.ndarray]:
    """Average precision-recall curves over classes.

    Args:
        precision: [10 IoU thresholds, 101 recalls, K], of classes with objects.

    Returns:
        "AP50", "AP75" and "AP" (mean over the thresholds) -> precision at the recalls 0.00, 0.01,
        ..., 1.00; the mean of a curve is the number of its name.
    """
    defined = np.where(precision > UNDEFINED, precision, 0.0)
    mean = defined.mean(axis=2) if defined.shape[2] else np.zeros(defined.shape[:2])
    return {"AP50": mean[IOU_50], "AP75": mean[IOU_75], "AP": mean.mean(axis=0)}


def _merged(counts: np.ndarray) -> tuple[np.ndarray, list[int], int]:
    """Keep `MAX_ROWS` classes and add up the others; returns the classes kept, and how many not."""
    num_classes = len(counts) - 1
    if num_classes <= MAX_ROWS:
        return counts, list(range(num_classes)), 0
    wrong = counts.sum(0)[:-1] + counts.sum(1)[:-1] - 2 * np.diag(counts)[:-1]
    chosen = sorted(np.argsort(-wrong, kind="stable")[: MAX_ROWS - 1].tolist())
    group = np.full(num_classes + 1, len(chosen))
    group[chosen] = np.arange(len(chosen))
    group[-1] = len(chosen) + 1
    merged = np.zeros((len(chosen) + 2, len(chosen) + 2), np.int64)
    np.add.at(merged, (group[:, None], group[None, :]), counts)
    return merged, chosen, num_classes - len(chosen)


def _cell(value: float) -> str:
    return "" if value == UNDEFINED else f"{value:.6f}"


def _inert(cell: Any) -> Any:
    """Put an apostrophe before a text that a spreadsheet would compute, as in a name `=1+1`."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell


def _write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([_inert(cell) for cell in row] for row in rows)
    replace_file(path, text.getvalue().encode())


def draw_pictures(
    dataset: CocoDataset, results: Sequence[Mapping[str, Any]], output: Path, count: int
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
            targets = record.targets
            labels = [target.label for target in targets]
            captions = [dataset.class_names[label] for label in labels]
            if len(dataset.class_names) == 1:  # as `plot`: a colour of its own for each
                labels, captions = None, [""] * len(targets)
            truth = _draw(
                image, [target.segmentation for target in targets], captions, labels=labels
            )
            picture = pictures.beside([picture, truth], ["predicted", "annotated"])
        paths.append(output / f"{name}.png")
        pictures.save_png(picture, paths[-1])
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


def _draw(
    image: np.ndarray,
    masks: Sequence[Any],
    captions: Sequence[str],
    colours: Sequence[pictures.Colour] | None = None,
    labels: Sequence[int] | None = None,
) -> Image.Image:
    """Draw segmentations over an image, of which one at a time is decoded."""
    decoded = (decode_mask(one, *image.shape[:2]) for one in masks)
    return pictures.draw_instances(image, decoded, captions, colours, labels=labels)


def _draw_worst(worst: Sequence[ImageErrors], dataset: CocoDataset, folder: Path) -> list[str]:
    for path in folder.glob("*.png"):  # of an earlier evaluation; its ranks would mix with these
        if re.match(r"\d{3}_", path.name):
            path.unlink()
    if not all(image.record.has_image for image in worst):
        return ["no picture of the worst images: set --config.data.val.images to their folder"]
    unread = []
    names = unique_names([image.record.file_name for image in worst])
    for rank, (image, name) in enumerate(zip(worst, names, strict=True), start=1):
        try:
            picture = draw_errors(read_record(image.record), image, dataset.class_names)
        except (FileNotFoundError, ValueError) as error:
            unread.append(str(error))
            continue
        pictures.save_png(picture, folder / f"{rank:03d}_{name}.png")
    lines = [f"{len(worst) - len(unread)} worst images: {folder / '*.png'}"] * bool(worst)
    return lines + [f"WARNING: not drawn: {line}" for line in unread[:3]]


def draw_errors(image: np.ndarray, errors: ImageErrors, class_names: Sequence[str]) -> Image.Image:
    """Draw what was predicted beside what is annotated, each coloured by what became of it.

    With a single class the captions are scores alone: a name beside each object says nothing.

    Args:
        image: uint8 [h, w, 3].
        errors: of this image.
        class_names: of the data set.
    """
    targets, names = errors.record.targets, class_names if len(class_names) > 1 else [""]
    found, confused = dict(errors.found), dict(errors.confused)
    kinds = {**dict.fromkeys(found, _FOUND), **dict.fromkeys(confused, _CONFUSED)}
    predicted = []
    kinds |= dict.fromkeys(errors.false, _FALSE)
    for place in sorted(kinds, key=lambda place: -errors.detections[place]["score"]):
        detection, kind = errors.detections[place], kinds[place]
        text = f"{names[errors.labels[place]]} {detection['score']:.2f}"
        if place in confused:
            text += f", is {names[targets[confused[place]].label]}"
        predicted.append((detection["segmentation"], text, kind))
    kinds = {**dict.fromkeys(errors.missed, _MISSED), **dict.fromkeys(confused.values(), _CONFUSED)}
    annotated = [
        (target.segmentation, names[target.label], kinds.get(place, _FOUND))
        for place, target in enumerate(targets)
    ]
    drawn = []
    for entries in (predicted, annotated):  # errors on top, the surest first
        entries.sort(key=lambda entry: entry[2] == _FOUND)
        drawn.append(_draw(image, *(zip(*entries, strict=True) if entries else ((), (), ()))))
    pair = pictures.beside(drawn, ["predicted", "annotated"])
    key = [
        (_FOUND, f"found ({len(found)})"),
        (_CONFUSED, f"wrong class ({len(confused)})"),
        (_FALSE, f"false positive ({len(errors.false)})"),
        (_MISSED, f"missed ({len(errors.missed)})"),
    ]
    size = pair.height, pair.width
    return pictures.below([pair, pictures.colour_key(key, size, errors.record.file_name)])
