"""Run a predictor over a COCO data set and score what it finds.

The images are cut into batches of one padded size, as many as the local devices take together. On
several hosts the batches are dealt out in turn, and the first host gathers all results: every
image is predicted exactly once, whatever the number of devices and hosts.
"""

from __future__ import annotations

import collections
import functools
import itertools
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np

from sparseinst_jax.data.coco import CocoDataset, ImageRecord, read_record
from sparseinst_jax.data.failures import ERRORS, Skip, skip_of
from sparseinst_jax.data.file_search import FileNames
from sparseinst_jax.data.rules import EvalProtocol
from sparseinst_jax.data.transforms import padded_size, resized_size
from sparseinst_jax.evaluation.coco_metrics import CocoMetrics, Truth, read_truth, score
from sparseinst_jax.runner.prediction import coco_results
from sparseinst_jax.runner.predictor import BasePredictor, Pending
from sparseinst_jax.runtime import hosts
from sparseinst_jax.runtime.messages import listed
from sparseinst_jax.runtime.progress import ImageProgress, map_ahead


def evaluate_dataset(
    predictor: BasePredictor,
    dataset: CocoDataset,
    *,
    num_workers: int = 2,
    progress: TextIO | None = None,
    skips: list[Skip] | None = None,
    truth: Truth | None = None,
) -> tuple[list[dict[str, Any]], CocoMetrics | None]:
    """Predict every image of a data set and score the result.

    On several hosts all of them call this together; the first one gets the result, the others
    `([], None)`.

    Args:
        predictor: of any kind.
        dataset: from `load_coco`, with its image folder.
        num_workers: threads that read and resize images.
        progress: where progress is written; None writes nothing.
        skips: takes the images that cannot be used, which count as images without detections; of
            several hosts each gets its own. None raises for the first of them.
        truth: of the data set, where `truth_of` has read it before.

    Returns:
        The detections in COCO results format, in the order of the images, and the metrics; None
        instead of these where the data set has no object to score against (crowd regions are
        none).

    Raises:
        FileNotFoundError: image files are missing.
        ValueError: an image cannot be read or is not of the size that the json says, or no class
            of the predictor is in the data set.
    """
    truth = truth or truth_of(dataset)  # its faults are reported before the first prediction
    results = predict_dataset(
        predictor, dataset, num_workers=num_workers, progress=progress, skips=skips
    )
    return results, None if truth is None or jax.process_index() else score(truth, results)


def truth_of(dataset: CocoDataset) -> Truth | None:
    """Read what a data set is scored against; None where it has no object.

    Raises:
        ValueError: it cannot be scored against.
    """
    return read_truth(dataset.truth, dataset.classes) if dataset.num_targets.any() else None


def predict_dataset(
    predictor: BasePredictor,
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
        places = _tested(dataset, predictor.protocol)
        sizes = dataset.image_sizes[places]
        batches = [
            places[batch].tolist()
            for batch in _batches(sizes, predictor.eval_size, predictor.num_together)
        ]
        mine = batches[jax.process_index() :: jax.process_count()]
        return _predict_batches(
            predictor, dataset.records, mine, category_ids, num_workers, progress, skips
        )

    found = predict() if jax.process_count() == 1 else _gather(predict)
    if jax.process_index():
        return []
    image_ids = dataset.image_ids[_tested(dataset, predictor.protocol)].tolist()
    return [entry for image_id in image_ids for entry in found[image_id]]


def _predict_batches(
    predictor: BasePredictor,
    records: Sequence[ImageRecord],
    batches: Sequence[Sequence[int]],
    category_ids: Sequence[int | None],
    num_workers: int,
    progress: TextIO | None,
    skips: list[Skip] | None,
) -> dict[int, list[dict[str, Any]]]:
    """Predict batches of equal padded size: COCO results by image id.

    Four things happen at once: threads read and resize images, this one hands them to the device,
    which has a batch waiting while it computes another, and one more thread fetches what is found
    and packs the masks of the batch before. One is enough: pycocotools packs one mask at a time.
    """
    found, total = {}, sum(map(len, batches))
    what = "evaluated" if jax.process_count() == 1 else "first host evaluated"

    def prepare(place: int) -> tuple[int, Any]:
        record = records[place]
        try:
            image = read_record(record)
        except ERRORS as error:
            if skips is None:
                raise
            return record.image_id, skip_of(record, error)
        return record.image_id, predictor.prepare(image)

    def start() -> Iterator[tuple[Sequence[int], list[Pending]]]:
        for batch in batches:
            items = list(itertools.islice(prepared, len(batch)))
            unusable = [item for _, item in items if isinstance(item, Skip)]
            if skips is not None:
                skips.extend(unusable)
            found.update({skip.image_id: [] for skip in unusable})
            line.advance(len(unusable))
            usable = [pair for pair in items if not isinstance(pair[1], Skip)]
            if usable:
                image_ids, ready = zip(*usable, strict=True)
                yield image_ids, predictor.start(list(ready))

    def pack(batch: tuple[Sequence[int], list[Pending]]) -> dict[int, list[dict[str, Any]]]:
        packed = {}
        for image_id, kept in zip(batch[0], predictor.finish(batch[1]), strict=True):
            rles, scores = kept.encode()
            packed[image_id] = coco_results(image_id, rles, scores, kept.labels, category_ids)
        return packed

    ahead = 2 * (num_workers + predictor.num_together)
    with (
        ImageProgress(total, progress, what) as line,
        ThreadPoolExecutor(max(1, num_workers)) as readers,
        ThreadPoolExecutor(1) as packer,
    ):
        prepared = map_ahead(readers, prepare, itertools.chain.from_iterable(batches), ahead)
        for packed in map_ahead(packer, pack, start(), ahead=2):
            found |= packed
            line.advance(len(packed))
            hosts.report(f"evaluating, image {line.done} of {total}")
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


def _tested(dataset: CocoDataset, protocol: EvalProtocol) -> np.ndarray:
    """Places of the images that are predicted, int64."""
    records = dataset.records
    if protocol.keeps is None or not dataset.has_annotations:
        return np.arange(len(records))
    places = np.flatnonzero(records.num_passing(protocol.keeps))
    if not len(places):
        raise ValueError(
            f"eval.protocol leaves out all {len(records)} images of {dataset.annotations_path}: it "
            "predicts those with an object that has a box and is no crowd region. Give the json's "
            "objects boxes, or set --config.eval.protocol=original."
        )
    return places


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
    return listed(map(repr, names))


def _check_files(dataset: CocoDataset) -> None:
    """Check that every image exists before the first is predicted."""
    files = [(name, path) for name, path in dataset.files if path is not None]
    missing = [(name, path) for name, path in files if not os.path.isfile(path)]
    if missing:
        name, path = missing[0]
        hint = FileNames(Path(path.removesuffix(name))).hint(name)
        # In a wrong folder all are missing: one says it.
        shown = [path for _, path in missing[: 1 if len(missing) == len(files) else None]]
        raise FileNotFoundError(
            f"{len(missing)} of {len(files)} images of {dataset.annotations_path} are "
            f"missing; set config.data.val.images to their folder:\n  "
            + listed([shown[0] + hint, *shown[1:]], between="\n  ")
        )


def _batches(
    image_sizes: np.ndarray, eval_size: tuple[int, int], batch_size: int
) -> list[list[int]]:
    """Group images of equal padded size, so that few batches have to be filled up.

    Args:
        image_sizes: (height, width) int64 [images, 2].
        eval_size: (shortest, longest) side after resizing.
        batch_size: most images of a batch.

    Returns:
        Places of the images of each batch.
    """
    groups: dict[tuple[int, int], list[int]] = collections.defaultdict(list)
    padded = functools.cache(lambda *size: padded_size(resized_size(size, *eval_size)))
    for place, size in enumerate(image_sizes.tolist()):
        groups[padded(*size)].append(place)
    return [
        group[first : first + batch_size]
        for _, group in sorted(groups.items())
        for first in range(0, len(group), batch_size)
    ]
