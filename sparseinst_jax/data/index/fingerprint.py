"""Tell by a short text whether a data set is the one that it was."""

import hashlib
from pathlib import Path

import numpy as np

from sparseinst_jax.data.index.records import CocoDataset, IndexedRecords


def fingerprint(dataset: CocoDataset) -> dict[str, str | int]:
    """What to compare: the hash of the annotations, and the number of images chosen of them.

    Of a json the hash is that of its bytes; of other data sets that of the ids and sizes of their
    images and the labels of their objects. Pixels are not looked at: that would take hours.

    Returns:
        `sha256` and `images`.
    """
    path = Path(dataset.annotations_path)
    if path.is_file():
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256")
    else:
        digest = hashlib.sha256()
        for column in _columns(dataset):
            digest.update(np.ascontiguousarray(column).tobytes())
    return {"sha256": digest.hexdigest(), "images": len(dataset.records)}


def _columns(dataset: CocoDataset) -> list[np.ndarray]:
    records = dataset.records
    if isinstance(records, IndexedRecords):
        ids, labels = records.image_ids, records.target_labels
    else:
        ids = np.array([record.image_id for record in records], np.int64)
        labels = np.array([a.label for record in records for a in record.targets], np.int64)
    return [ids, dataset.image_sizes, dataset.num_targets, labels]
