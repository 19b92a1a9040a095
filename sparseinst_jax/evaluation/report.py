"""Write what an evaluation found as tables (CSV) and charts (PNG) into a folder."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparseinst_jax.drawing import charts, fonts
from sparseinst_jax.evaluation.average_precision import UNDEFINED
from sparseinst_jax.evaluation.coco_metrics import CLASS_METRIC_NAMES, IOU_50, IOU_75, CocoMetrics
from sparseinst_jax.evaluation.errors import ImageErrors
from sparseinst_jax.runtime.files import replace_file

BACKGROUND = "background"
_FORMULA = ("=", "+", "-", "@")
# A chart of more classes than these would be too large to look at; the tables hold them all.
MAX_CURVES, MAX_ROWS = 119, 100
_RECALLS = np.linspace(0.0, 1.0, 101)
_SMALL = charts.Frame(
    size=(210, 190),
    margin=(36, 24, 12, 28),
    text=11,
    x_range=(0.0, 1.0),
    y_range=(0.0, 1.0),
    num_ticks=4,
)
_LARGE = _SMALL._replace(size=(440, 360), margin=(44, 30, 16, 34), text=13, num_ticks=5)
MAX_LARGE = 6  # curves


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
    font = fonts.own_font(12)
    names = fonts.labels(
        [class_names[label] for label in chosen], [category_ids[label] for label in chosen], font
    )
    names += [f"{num_others} other classes"] * bool(num_others) + [BACKGROUND]
    picture = charts.matrix(counts, names, names)
    lines = [
        f"Rows: annotated; columns: predicted with a score of at least {score_threshold:g}, at "
        "mask IoU 0.5; darker: a larger share of the row",
        f"Last column: missed objects. Last row: false positives. {int(np.trace(counts))} of "
        f"{int(counts[:-1].sum())} objects found with the right class",
    ]
    width = max(picture.width, 760)
    charts.save_png(
        charts.below([*(charts.text_line(line, width) for line in lines), picture]), path
    )


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
    is_small = len(groups) > MAX_LARGE
    frame, columns = (_SMALL, 8) if is_small else (_LARGE, 2)
    panels = [
        _curve_panel(title, mean_precision(metrics.precision[:, :, labels]), frame)
        for title, labels in groups
    ]
    width = columns * frame.size[0]
    note = "Precision over recall; the number is the area, the average precision in percent"
    if len(shown) < len(order):
        note += f"; {len(shown)} of {len(order)} classes, those with the most objects"
    rows = [
        charts.text_line(note, width),
        charts.legend_row(["IoU 0.50", "IoU 0.75", "mean over IoU 0.50 to 0.95"], width),
        charts.grid(panels, columns),
    ]
    charts.save_png(charts.below(rows), path)


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


def _curve_panel(title: str, curves: dict[str, np.ndarray], frame: charts.Frame) -> Any:
    series = {
        name: list(zip(_RECALLS.tolist(), curve.tolist(), strict=True))
        for name, curve in curves.items()
    }
    title = f"{100 * float(curves['AP'].mean()):.1f} {title}"
    return charts.line_panel(title, series, frame, legend=False)


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
