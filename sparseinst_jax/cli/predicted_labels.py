"""What `predict --to` writes beside the pictures: labels to be corrected, and a table."""

from __future__ import annotations

import csv
import io
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparseinst_jax.data.outlines import outlines
from sparseinst_jax.runner.prediction import Prediction
from sparseinst_jax.runtime.files import replace_file, write_json
from sparseinst_jax.runtime.messages import counted

FORMS = {
    "labelme": "a json of LabelMe for each image, in labelme/",
    "coco": "annotations.json, a COCO data set",
    "table": "predictions.csv, a line for each object",
}


class PredictedLabels:
    """Collect predictions above a score, image by image in any order, and write them.

    Args:
        forms: keys of `FORMS`.
        paths: of the images; the first has image id 1.
        output: folder.
        score_threshold: lowest score of a label.
    """

    def __init__(
        self, forms: Sequence[str], paths: Sequence[Path], output: Path, score_threshold: float
    ):
        self._forms, self._paths, self._output = set(forms), paths, output
        self._score_threshold, self._lock = score_threshold, threading.Lock()
        self._by_image: dict[int, tuple[dict[str, Any], list[dict[str, Any]]]] = {}
        self._rows: dict[int, list[list[Any]]] = {}
        self._categories: list[dict[str, Any]] = []
        folders = [str(path.absolute().parent) for path in paths]
        self.images_dir = Path(os.path.commonpath(folders)) if folders else Path()

    def add(self, number: int, prediction: Prediction) -> None:
        """Take the prediction of image `number`, and write its LabelMe json."""
        path, shown = self._paths[number], prediction.above(self._score_threshold)
        if "labelme" in self._forms:
            folder = self._output / "labelme"
            place = os.path.relpath(path, folder)
            target = folder / f"{path.stem}.json"
            if any(other.stem == path.stem for other in self._paths[:number]):
                target = folder / f"{path.stem}_{number}.json"
            write_json(target, shown.to_labelme(Path(place).as_posix()), indent=2)
        height, width = shown.image.shape[:2]
        name = path.absolute().relative_to(self.images_dir).as_posix()
        image = {"id": number + 1, "file_name": name, "height": height, "width": width}
        annotations = _annotations(shown, number + 1) if "coco" in self._forms else []
        table = shown.to_table()
        with self._lock:
            self._by_image[number] = image, annotations
            self._rows[number] = [[name, *row] for row in zip(*table.values(), strict=True)]
            self._categories = [
                {"id": category_id, "name": name}
                for category_id, name in dict(
                    zip(shown.category_ids, shown.names, strict=True)
                ).items()
                if category_id is not None
            ]
            self._columns = ["file_name", *table]

    def write(self) -> list[str]:
        """Write what belongs to all images together; returns lines for the user."""
        done = [self._by_image[number] for number in sorted(self._by_image)]
        lines = []
        if "labelme" in self._forms:
            lines.append(f"{counted(len(done), 'json')} of LabelMe: {self._output / 'labelme'}")
        if "coco" in self._forms:
            annotations = [each for _, found in done for each in found]
            for number, each in enumerate(annotations, 1):
                each["id"] = number
            target = self._output / "annotations.json"
            content = {"images": [image for image, _ in done], "annotations": annotations}
            write_json(target, {**content, "categories": self._categories})
            lines.append(f"COCO annotations of the images in {self.images_dir}: {target}")
        if "table" in self._forms:
            target, text = self._output / "predictions.csv", io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(self._columns if done else [])
            writer.writerows(row for number in sorted(self._rows) for row in self._rows[number])
            replace_file(target, text.getvalue().encode())
            lines.append(f"table: {target}")
        return lines


def _annotations(prediction: Prediction, image_id: int) -> list[dict[str, Any]]:
    """Objects as annotations of COCO: polygons where these say the same, else run lengths."""
    found, ids = [], prediction.category_ids
    labels = zip(prediction, prediction.labels, strict=True)
    kept = [each for each, label in labels if ids[label] is not None]
    for one, entry in zip(kept, prediction.to_coco(image_id), strict=True):
        polygons = outlines(one.mask)
        left, top, right, bottom = one.box_xyxy.tolist()
        entry |= {
            "bbox": [left, top, right - left, bottom - top],
            "area": int(one.mask.sum()),
            "iscrowd": 0,
        }
        if polygons is not None:
            entry["segmentation"] = [polygon.ravel().round(2).tolist() for polygon in polygons]
        found.append(entry)
    return found
