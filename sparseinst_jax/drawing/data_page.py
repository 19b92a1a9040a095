"""The page of what is known of a data set, and the sheet of images with their labels drawn."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from sparseinst_jax.data.check_report import DataReport, SplitReport, sheet_records
from sparseinst_jax.data.coco import CocoDataset, ImageRecord, read_record
from sparseinst_jax.data.faults import grouped
from sparseinst_jax.data.transforms import Transform, move_mask, transform_image
from sparseinst_jax.drawing import fonts, pictures
from sparseinst_jax.runtime.files import replace_file
from sparseinst_jax.runtime.messages import printable

PAGE, SHEET = "index.html", "labels.png"
NUM_PICTURES = 16
COLUMNS = 4
CELL = 480  # pixels, the longest side of a picture on the sheet
BAR = 26  # pixels, height of a picture's title
GAP = 6
JPEG_QUALITY = 85  # of the sheet inside the page
OPEN_FAULTS = 50  # a longer list of faults starts folded
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em;
  color: #222; background: #fff }
h1 { font-size: 1.5em } h2 { font-size: 1.2em; margin-top: 2em }
table { border-collapse: collapse; margin: .7em 0 } td, th { padding: .15em .8em .15em 0;
  text-align: left; vertical-align: top } td.n { text-align: right }
.bar { display: inline-block; height: .7em; background: #4a7fb5 } .bar.over { background: #c0392b }
.fault { color: #a11 } .warning { color: #955700 } .good { color: #17692b }
li, td { overflow-wrap: anywhere } img { max-width: 100%; height: auto }
summary { cursor: pointer; font-weight: 600 }
"""


def write_page(report: DataReport, folder: Path) -> None:
    """Write `index.html`, which needs no other file, and the sheet as `labels.png`."""
    train = report.splits[0]
    sheet = draw_sheet(train.dataset, sheet_records(train.readable, NUM_PICTURES))
    if sheet is not None:
        pictures.save_png(sheet, folder / SHEET)
    else:
        (folder / SHEET).unlink(missing_ok=True)  # of an earlier check
    replace_file(folder / PAGE, page_of(report, sheet).encode("utf-8", "replace"))


def draw_sheet(dataset: CocoDataset, records: Sequence[ImageRecord]) -> Image.Image | None:
    """Draw the objects of some images, in rows; None when there is no image to draw."""
    if not records:
        return None
    columns = min(COLUMNS, len(records))
    drawn = [_picture(dataset, record) for record in records]
    heights = [
        max(picture.height for picture in drawn[first : first + columns]) + BAR + GAP
        for first in range(0, len(drawn), columns)
    ]
    sheet = Image.new("RGB", (columns * (CELL + GAP) - GAP, sum(heights) - GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (record, picture) in enumerate(zip(records, drawn, strict=True)):
        left, top = (index % columns) * (CELL + GAP), sum(heights[: index // columns])
        title = f"{record.file_name}: {len(record.targets)} objects"
        font = fonts.font_for([title], 15)
        shown = fonts.shorten(fonts.drawable(title, font), font, CELL - 8)
        draw.text((left + 4, top + 3), shown, fill="black", font=font)
        sheet.paste(picture, (left, top + BAR))
    return sheet


def _picture(dataset: CocoDataset, record: ImageRecord) -> Image.Image:
    scale = CELL / max(record.height, record.width)
    size = (max(1, round(record.height * scale)), max(1, round(record.width * scale)))
    transform = Transform(False, None, None, size)
    original = (record.height, record.width)
    drawn = [
        (move_mask(target.segmentation, original, transform).astype(bool), target.label)
        for target in record.targets
    ]
    drawn.sort(key=lambda pair: int(pair[0].sum()))  # small objects on top of large ones
    masks, labels = [mask for mask, _ in drawn], [label for _, label in drawn]
    texts = [dataset.class_names[label] for label in labels]
    ids = [dataset.category_ids[label] for label in labels]
    names = fonts.labels(texts, ids, fonts.font_for(texts, 12))
    classes = labels
    if len(dataset.class_names) == 1:  # the name beside every object would say nothing
        names, classes = [name * (index == 0) for index, name in enumerate(names)], None
    image = transform_image(read_record(record), transform)
    picture = pictures.draw_instances(image, masks, names, labels=classes)
    picture.thumbnail((CELL, CELL))
    return picture


def page_of(report: DataReport, sheet: Image.Image | None) -> str:
    """Write the page; every text of the data is escaped."""
    if report.fatal:
        verdict = f'<p class="fault">Training would fail: {len(report.fatal)} faults.</p>'
    else:
        verdict = f'<p class="good">Training can start; {report.num_warnings} warnings.</p>'
    parts = [
        "<!DOCTYPE html><html lang=en><head><meta charset=utf-8><title>check-data</title>",
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{_text(report.splits[0].dataset.annotations_path)}</h1>{verdict}",
        _list(report.warnings, "warning"),
    ]
    for split in report.splits:
        parts.append(_split(split, report.num_masks))
    if report.overlap:
        rows = [[shared.first, shared.second] for shared in report.overlap]
        parts.append(f"<h2>Images in both</h2>{_table(['train', 'val'], rows)}")
    if sheet is not None:
        buffer = io.BytesIO()
        sheet.save(buffer, "JPEG", quality=JPEG_QUALITY)
        data = base64.b64encode(buffer.getvalue()).decode("ascii")
        parts.append(
            "<h2>Labels</h2><p>Do the outlines lie on the objects, and are the names right?</p>"
            f'<img alt="images with their labels" src="data:image/jpeg;base64,{data}">'
        )
    return "\n".join([*parts, "</body></html>\n"])


def _split(split: SplitReport, num_masks: int) -> str:
    dataset = split.dataset
    parts = [
        f"<h2>{_text(split.title)}: {_text(split.lines[0])}</h2>",
        _list([line for line in split.lines[1:] if not line.startswith("objects per class")], ""),
        _list(split.warnings, "warning"),
        _faults(split),
    ]
    if dataset.has_annotations and len(dataset.records):
        parts += [
            f"<h3>Objects per image (the model has {num_masks} masks)</h3>",
            _histogram(dataset.num_targets, num_masks),
            "<h3>Classes</h3>",
            _classes(dataset),
        ]
    return "\n".join(parts)


def _faults(split: SplitReport) -> str:
    parts = []
    for kind, found in grouped(split.faults).items():
        name = "fault" if found[0].is_fatal else "warning"
        is_open = " open" * (len(found) <= OPEN_FAULTS)
        parts.append(
            f'<details{is_open}><summary class="{name}">{_text(kind)}: {len(found)}</summary>'
            f"{_list([fault.message for fault in found], '')}</details>"
        )
    return "\n".join(parts)


def _classes(dataset: CocoDataset) -> str:
    objects = dataset.targets_per_class
    images = [0] * len(dataset.class_names)
    for record in dataset.records:
        for label in {target.label for target in record.targets}:
            images[label] += 1
    most = max(objects.max(initial=0), 1)
    rows = [
        f"<tr><td class=n>{category_id}</td><td>{_text(name)}</td><td class=n>{objects[label]}</td>"
        f"<td class=n>{images[label]}</td><td>{_bar(objects[label] / most)}</td></tr>"
        for label, (name, category_id) in enumerate(
            zip(dataset.class_names, dataset.category_ids, strict=True)
        )
    ]
    head = "<tr><th>id</th><th>class</th><th>objects</th><th>images</th><th></th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def _histogram(counts: np.ndarray, num_masks: int) -> str:
    """Rows of 0, 1, 2-3, 4-7, ... objects; those above the number of masks in red."""
    edges = [0, 1]
    while edges[-1] <= counts.max(initial=0):
        edges.append(2 * edges[-1])
    numbers = np.histogram(counts, [*edges, np.inf])[0].tolist()
    most = max(numbers)
    rows = []
    for low, high, number in zip(edges, edges[1:], numbers, strict=False):
        name = str(low) if high - low == 1 else f"{low} to {high - 1}"
        bar = _bar(number / most, high - 1 > num_masks)
        rows.append(f"<tr><td class=n>{name}</td><td class=n>{number}</td><td>{bar}</td></tr>")
    return f"<table><tr><th>objects</th><th>images</th><th></th></tr>{''.join(rows)}</table>"


def _bar(share: float, is_over: bool = False) -> str:
    return f'<span class="bar{" over" * is_over}" style="width:{12 * share:.2f}em"></span>'


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{_text(head)}</th>" for head in heads)]
    lines += ["".join(f"<td>{_text(cell)}</td>" for cell in row) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _list(lines: Sequence[str], name: str) -> str:
    items = "".join(f"<li>{_text(line)}</li>" for line in lines)
    return f'<ul class="{name}">{items}</ul>' if items else ""


def _text(text: str) -> str:
    return html.escape(printable(text), quote=True)
