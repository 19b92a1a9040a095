"""Run a predictor over a COCO data set and score what it finds.

The images are cut into batches of one padded size, as many as the local devices take together. On
several hosts each takes every so-manieth batch, and the first gets what all have found: every image
is predicted exactly once, on whatever number of devices and hosts.
"""

from __future__ import annotations

import collections
import itertools
import json
import logging
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TextIO, TypeVar

import jax
import numpy as np
from tqdm import tqdm

from sparseinst_jax import hosts
from sparseinst_jax.data.coco import CocoDataset, ImageRecord, read_record
from sparseinst_jax.data.skipping import ERRORS, Skip, skip_of
from sparseinst_jax.data.transforms import padded_size, resized_size
from sparseinst_jax.evaluation.coco_metrics import CocoMetrics, coco_results, evaluate
from sparseinst_jax.files import replace_file
from sparseinst_jax.masks import encode_transposed

SECONDS_BETWEEN_LINES = 10.0
Item = TypeVar("Item")
Value = TypeVar("Value")


class ImagePredictor(Protocol):
    """What is asked of a predictor here; `sparseinst_jax.predictor.Predictor` is one."""

    class_names: tuple[str, ...]
    eval_size: tuple[int, int]

    @property
    def num_together(self) -> int:
        """Images that go through the network together, over all local devices."""
        ...

    def prepare(self, image: np.ndarray) -> Any:
        """Resize an image on the host."""
        ...

    def start(self, items: Sequence[Any]) -> Any:
        """Hand prepared images to the device."""
        ...

    def finish(self, pending: Any) -> Sequence[Any]:
        """Fetch what is kept of them."""
        ...


def evaluate_dataset(
    predictor: ImagePredictor,
    dataset: CocoDataset,
    *,
    num_workers: int = 2,
    progress: TextIO | None = None,
    skips: list[Skip] | None = None,
) -> tuple[list[dict[str, Any]], CocoMetrics | None]:
    """Predict every image of a data set and score the result.

    On several hosts all of them call this together; the first one gets the result, the others
    `([], None)`.

    Args:
        predictor: a `Predictor`.
        dataset: from `load_coco`, with its image folder.
        num_workers: threads that read and resize images.
        progress: where progress is written; None writes nothing.
        skips: takes the images that cannot be used, which count as images without detections; of
            several hosts each gets its own. None raises for the first of them.

    Returns:
        The detections in COCO results format, in the order of the images, and the metrics; None
        instead of these where the data set has no object to score against (crowd regions are
        none).

    Raises:
        FileNotFoundError: image files are missing.
        ValueError: an image cannot be read or is not of the size that the json says, or no class
            of the predictor is in the data set.
    """
    results = predict_dataset(
        predictor, dataset, num_workers=num_workers, progress=progress, skips=skips
    )
    if jax.process_index() or not dataset.num_targets.any():
        return results, None
    return results, evaluate(dataset.truth, results, dataset.classes)


def predict_dataset(
    predictor: ImagePredictor,
    dataset: CocoDataset,
    *,
    num_workers: int = 2,
    progress: TextIO | None = None,
    skips: list[Skip] | None = None,
) -> list[dict[str, Any]]:
    """Predict every image of a data set: COCO results, in the order of the images.

    See `evaluate_dataset` for the arguments, the errors and several hosts.
    """

    def predict() -> dict[int, list[dict[str, Any]]]:
        category_ids = match_categories(predictor.class_names, dataset)
        if skips is None:
            _check_files(dataset)
        batches = _batches(dataset.records, predictor.eval_size, predictor.num_together)
        mine = batches[jax.process_index() :: jax.process_count()]
        return _predict_batches(predictor, mine, category_ids, num_workers, progress, skips)

    found = predict() if jax.process_count() == 1 else _gather(predict)
    if jax.process_index():
        return []
    return [entry for record in dataset.records for entry in found[record.image_id]]


def _predict_batches(
    predictor: ImagePredictor,
    batches: Sequence[Sequence[ImageRecord]],
    category_ids: Sequence[int | None],
    num_workers: int,
    progress: TextIO | None,
    skips: list[Skip] | None,
) -> dict[int, list[dict[str, Any]]]:
    """Predict batches of equal padded size: COCO results by image id."""
    found: dict[int, list[dict[str, Any]]] = {}
    order = [record for batch in batches for record in batch]
    what = "evaluated" if jax.process_count() == 1 else "first host evaluated"

    def prepare(record: ImageRecord) -> Any:
        try:
            image = read_record(record)
        except ERRORS as error:
            if skips is None:
                raise
            return skip_of(record, error)
        return predictor.prepare(image)

    def start(batch: Sequence[ImageRecord], items: Sequence[Any]) -> tuple[list[ImageRecord], Any]:
        usable = [pair for pair in zip(batch, items, strict=True) if not isinstance(pair[1], Skip)]
        unusable = [item for item in items if isinstance(item, Skip)]
        if skips is not None:
            skips.extend(unusable)
        found.update({skip.image_id: [] for skip in unusable})
        line.advance(len(unusable))
        prepared = [item for _, item in usable]
        return [record for record, _ in usable], predictor.start(prepared) if prepared else None

    def collect(batch: Sequence[ImageRecord], pending: Any) -> None:
        kept_of_batch = predictor.finish(pending) if batch else []
        for record, kept in zip(batch, kept_of_batch, strict=True):
            rles = [rle for chunk in kept.masks for rle in encode_transposed(chunk)]
            found[record.image_id] = coco_results(
                record.image_id, rles, kept.scores, kept.labels, category_ids
            )
        line.advance(len(batch))
        hosts.report(f"evaluating, image {line.done} of {len(order)}")

    ahead = 2 * (num_workers + predictor.num_together)
    with Progress(len(order), progress, what) as line:
        with ThreadPoolExecutor(max(1, num_workers)) as pool:
            prepared = map_ahead(pool, prepare, order, ahead=ahead)
            waiting: tuple[Sequence[ImageRecord], Any] | None = None
            for batch in batches:
                pending = start(batch, list(itertools.islice(prepared, len(batch))))
                # The device computes this batch while the host packs the masks of the one before.
                if waiting is not None:
                    collect(*waiting)
                waiting = pending
            if waiting is not None:
                collect(*waiting)
    return found


def _gather(
    predict: Callable[[], dict[int, list[dict[str, Any]]]],
) -> dict[int, list[dict[str, Any]]]:
    """Bring what all hosts have found to the first; what goes wrong on one is raised on all.

    Raised on one alone it would leave the others waiting.
    """
    fault, found = "", {}
    try:
        found = predict()
    except (ValueError, OSError) as error:
        fault = f"host {jax.process_index()}: {error}"
    faults = [text.decode() for text in hosts.gather(fault.encode()) if text]
    if faults:
        raise ValueError("\n".join(faults))
    parts = hosts.gather(zlib.compress(json.dumps(list(found.items())).encode(), 1))
    if jax.process_index():
        return {}
    pairs = [pair for part in parts for pair in json.loads(zlib.decompress(part))]
    found = dict(pairs)
    assert len(found) == len(pairs), "an image was predicted twice"
    return found


def match_categories(class_names: Sequence[str], dataset: CocoDataset) -> list[int | None]:
    """Find the data set's category id of each class by its name; None where it has none.

    Raises:
        ValueError: no class is in the data set.
    """
    ids = dict(zip(dataset.class_names, dataset.category_ids, strict=True))
    matched = [ids.get(name) for name in class_names]
    missing = [name for name, match in zip(class_names, matched, strict=True) if match is None]
    if len(missing) == len(class_names):
        raise ValueError(
            f"{dataset.annotations_path} has none of the model's classes: expected some of "
            f"{_listed(class_names)}, got {_listed(dataset.class_names)}; is it the right json?"
        )
    if missing:
        logging.warning(
            "%s does not have the classes %s: their detections are left out",
            dataset.annotations_path,
            _listed(missing),
        )
    unknown = sorted(set(dataset.class_names) - set(class_names))
    if unknown:
        logging.warning("the model cannot find the classes %s: AP 0", _listed(unknown))
    return matched


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:10]))
    return shown + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _check_files(dataset: CocoDataset) -> None:
    """Ask for every image before the first is predicted."""
    missing = [
        record.path
        for record in dataset.records
        if record.path is not None and not os.path.isfile(record.path)
    ]
    if missing:
        shown = "\n  ".join(missing[:10])
        raise FileNotFoundError(
            f"{len(missing)} of {len(dataset.records)} images of {dataset.annotations_path} are "
            f"missing; set config.data.val.images to their folder:\n  {shown}"
        )


def _batches(
    records: Sequence[ImageRecord], eval_size: tuple[int, int], batch_size: int
) -> list[list[ImageRecord]]:
    """Group images of equal padded size, so that few batches have to be filled up."""
    groups: dict[tuple[int, int], list[ImageRecord]] = collections.defaultdict(list)
    for record in records:
        size = padded_size(resized_size((record.height, record.width), *eval_size))
        groups[size].append(record)
    return [
        group[first : first + batch_size]
        for _, group in sorted(groups.items())
        for first in range(0, len(group), batch_size)
    ]


def map_ahead(
    pool: ThreadPoolExecutor,
    function: Callable[[Item], Value],
    items: Iterable[Item],
    ahead: int,
) -> Iterator[Value]:
    """Map in threads, in order, with at most `ahead` results waiting."""
    waiting = collections.deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class Progress:
    """Say how far a run over images is: a bar in a terminal, otherwise a line now and then.

    Args:
        total: number of images.
        stream: where to write, or None for silence.
        what: the word before the count.
    """

    def __init__(self, total: int, stream: TextIO | None = sys.stderr, what: str = "evaluated"):
        self.total, self.stream, self.what = total, stream, what
        self.done = 0
        self._bar: tqdm | None = None

    def __enter__(self) -> Progress:
        self._start = self._last = time.monotonic()
        if self.stream is not None and self.stream.isatty():
            self._bar = tqdm(
                total=self.total, file=self.stream, unit="image", desc=self.what, leave=True
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, count: int) -> None:
        """Note `count` more images."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self.stream is not None:
            now = time.monotonic()
            if now - self._last >= SECONDS_BETWEEN_LINES or self.done == self.total:
                self._last = now
                print(self.line(now - self._start), file=self.stream, flush=True)

    def line(self, seconds: float) -> str:
        """Write the state after `seconds`: count, speed and time left."""
        speed = self.done / max(seconds, 1e-9)
        left = round((self.total - self.done) / max(speed, 1e-9))
        return (
            f"{self.what} {self.done}/{self.total} images, {speed:.2f} images/s, "
            f"ETA {left // 3600:d}:{left // 60 % 60:02d}:{left % 60:02d}"
        )


def write_json(path: str | os.PathLike, value: Any, indent: int | None = None) -> None:
    """Write a json file whole or not at all."""
    replace_file(path, (json.dumps(value, indent=indent) + "\n").encode())
