"""The instances found in one image, and what can be done with them."""

from __future__ import annotations

import dataclasses
import functools
import io
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, overload

import numpy as np
from PIL import Image

from sparseinst_jax.data.labelme_file import labelme_content
from sparseinst_jax.data.outlines import EXACT
from sparseinst_jax.drawing import pictures
from sparseinst_jax.drawing.crops import decode_crop
from sparseinst_jax.runner import run_lengths

SHOWN_SCORE = 0.4


def score_fault(value: float) -> str:
    """Say what is wrong with a score's threshold; "" if nothing is."""
    if 0 <= value <= 1:  # NaN is refused too
        return ""
    cure = f": {value:g} percent is {value / 100:g}" if 1 < value <= 100 else ""
    return f"a score threshold must be 0 to 1, got {value:g}{cure}"


class Instance(NamedTuple):
    """One object of an image.

    Attributes:
        class_name: its class.
        score: 0...1.
        box_xyxy: float32 [4], x0 y0 x1 y1 in pixels, ends exclusive.
        rle: compressed RLE at the original size.
    """

    class_name: str
    score: float
    box_xyxy: np.ndarray
    rle: dict[str, Any]

    @property
    def mask(self) -> np.ndarray:
        """The mask at the original size: bool [h, w]."""
        height, width = self.rle["size"]
        return run_lengths.decode_masks([self.rle], (height, width))[0]


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """The instances of one image, in the order of the queries.

    Every one has a pixel: queries with empty masks, whose score is 0, are left out. `for` gives one
    `Instance` after the other, an index one of them; a slice, an array of indices or of truth
    values a `Prediction` of those.

    Attributes:
        image: uint8 [h, w, 3], the original image; a copy of an array that was given.
        rles: D compressed RLEs at the original size (COCO's format, `counts` as text).
        scores: float32 [D] in 0...1.
        labels: int32 [D] in 0...K-1.
        names: names of all K classes.
        category_ids: the data set's id of each of the K classes.
        query_index: int32 [D], which of the N predictions each one is; None where it is not known.
    """

    image: np.ndarray
    rles: list[dict[str, Any]]
    scores: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]
    category_ids: tuple[int | None, ...]
    query_index: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rles)

    def __iter__(self) -> Iterator[Instance]:
        return (self[index] for index in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Instance: ...

    @overload
    def __getitem__(self, index: slice | Sequence | np.ndarray) -> Prediction: ...

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int | np.integer):
            rle, label, score = self.rles[index], self.labels[index], float(self.scores[index])
            return Instance(self.names[label], score, run_lengths.boxes_of([rle])[0], rle)
        kept = np.arange(len(self))[index]
        return dataclasses.replace(
            self,
            rles=[self.rles[index] for index in kept],
            scores=self.scores[kept],
            labels=self.labels[kept],
            query_index=None if self.query_index is None else self.query_index[kept],
        )

    def __repr__(self) -> str:
        height, width = self.image.shape[:2]
        shown = self.above(SHOWN_SCORE)
        best = sorted(zip(-shown.scores, shown.class_names, strict=True))[:5]
        listed = ", ".join(f"{name} {-score:.2f}" for score, name in best)
        return (
            f"Prediction({height}x{width} image, {len(self)} instances, {len(shown)} above "
            f"{SHOWN_SCORE}{': ' + listed if listed else ''})"
        )

    @functools.cached_property
    def masks(self) -> np.ndarray:
        """The masks at the original size: bool [D, h, w]."""
        return run_lengths.decode_masks(self.rles, self.image.shape[:2])

    @property
    def class_names(self) -> list[str]:
        """The class name of each instance."""
        return [self.names[label] for label in self.labels]

    @property
    def boxes_xyxy(self) -> np.ndarray:
        """The box around each mask: float32 [D, 4], x0 y0 x1 y1 in pixels, ends exclusive."""
        return run_lengths.boxes_of(self.rles)

    def above(self, score_threshold: float) -> Prediction:
        """Return the instances whose score is at least `score_threshold`."""
        if fault := score_fault(score_threshold):
            raise ValueError(fault)
        return self[self.scores >= score_threshold]

    def plot(self, score_threshold: float = SHOWN_SCORE) -> Image.Image:
        """Draw the instances that score at least `score_threshold`, the surest on top.

        Each has the colour of its class; with a single class one of its own, and its score alone.
        """
        shown = self.above(score_threshold)
        order = np.argsort(-shown.scores, kind="stable")
        names = shown.class_names
        labels = [int(shown.labels[index]) for index in order] if len(self.names) > 1 else None
        captions = [f"{names[index]} {shown.scores[index]:.2f}" for index in order]
        captions = captions if labels else [caption.rpartition(" ")[2] for caption in captions]
        drawn = (decode_crop(shown.rles[index]) for index in order)
        return pictures.draw_instances(self.image, drawn, captions, labels=labels)

    def save(self, path: str | os.PathLike, score_threshold: float = SHOWN_SCORE) -> None:
        """Write the picture of `plot`; the suffix of the path names the format."""
        self.plot(score_threshold).save(path)

    def to_coco(self, image_id: int | np.integer) -> list[dict[str, Any]]:
        """Return the instances as entries of a COCO results file: plain values, ready for json."""
        image_id = operator.index(image_id)
        return coco_results(image_id, self.rles, self.scores, self.labels, self.category_ids)

    def to_table(self) -> dict[str, list[Any]]:
        """Return columns of plain values, one entry an instance: `pandas.DataFrame` takes them.

        `class_name`, `score`, the box `x0`, `y0`, `x1`, `y1` (pixels, ends exclusive), `pixels`.
        """
        boxes = self.boxes_xyxy.T.tolist()
        return {
            "class_name": self.class_names,
            "score": self.scores.tolist(),
            **dict(zip(("x0", "y0", "x1", "y1"), boxes, strict=True)),
            "pixels": run_lengths.areas_of(self.rles).tolist(),
        }

    def to_labelme(
        self, image_path: str | os.PathLike, score_threshold: float = 0.0, tolerance: float = EXACT
    ) -> dict[str, Any]:
        """Return the content of a LabelMe json: labels to be corrected by hand.

        `sparseinst import-data labelme` reads them back, with the default tolerance pixel by pixel.

        Args:
            image_path: of the image, relative to the folder of the json.
            score_threshold: lowest score of what is written; the score is each label's description.
            tolerance: pixels that outlines may be off; 1 needs about a quarter of the corners.
        """
        shown = self.above(score_threshold)
        size = (self.image.shape[0], self.image.shape[1])
        objects = ((one.class_name, one.mask, f"score {one.score:.2f}") for one in shown)
        return labelme_content(image_path, size, objects, tolerance)

    def to_supervision(self) -> Any:
        """Return `supervision.Detections`, with the class names as `data["class_name"]`.

        Raises:
            ValueError: supervision is not installed.
        """
        try:
            from supervision import Detections
        except ImportError as error:
            raise ValueError('this needs supervision: pip install "supervision>=0.31"') from error
        return Detections(
            xyxy=self.boxes_xyxy,
            mask=self.masks,
            confidence=self.scores,
            class_id=self.labels.astype(int),
            data={"class_name": np.array(self.class_names, dtype=str)},
        )

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.plot().save(buffer, format="PNG")
        return buffer.getvalue()


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
