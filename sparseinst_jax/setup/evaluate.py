"""Score a model on a data set: what a notebook calls."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

import jax

from sparseinst_jax.data.coco import CocoDataset, load_coco
from sparseinst_jax.evaluation.coco_metrics import CocoMetrics
from sparseinst_jax.evaluation.evaluator import evaluate_dataset
from sparseinst_jax.runner.file_predictor import DEFAULT_RUNTIME
from sparseinst_jax.runner.onnx_file import SUFFIX
from sparseinst_jax.runner.predictor import BasePredictor
from sparseinst_jax.setup.datasets import draw_missing_data, load_val
from sparseinst_jax.setup.loading import load_exported, load_run


def evaluate(
    model: BasePredictor | str | os.PathLike,
    annotations: CocoDataset | str | os.PathLike | None = None,
    images: str | os.PathLike | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
    num_workers: int = 2,
) -> CocoMetrics | None:
    """Score a model: COCO mask AP, overall and per class. Shows its progress.

    Args:
      model: a predictor, or what `load` takes: a run or a checkpoint, which all local devices then
        work for, or an exported file.
      annotations: COCO json, or what `load_coco` made of one with its images; by default the
        validation data of the run.
      images: folder that its file names are relative to.
      overrides: of the run's configuration, see `load`.
      num_workers: threads that read and resize images.

    Returns:
      The metrics: `metrics["AP"]` in 0...1, `metrics.table()`, `metrics.as_dict()`. On several
      hosts all of them call this, and all but the first get None.

    Raises:
      FileNotFoundError: the run, the json or images are missing.
      ValueError: they cannot be read or do not fit, or there is nothing to score against.
    """
    if isinstance(model, BasePredictor):
        predictor, config = model, None
    elif os.fspath(model).lower().endswith(SUFFIX):
        predictor, config = load_exported(model, overrides, DEFAULT_RUNTIME)
    else:
        predictor, config, _ = load_run(model, overrides=overrides)
        predictor.use_devices(jax.local_devices())
    if isinstance(annotations, CocoDataset):
        dataset = annotations
    elif annotations is not None and images is not None:
        if config is None:
            dataset = load_coco(annotations, images)
        else:  # with the classes that the run chose
            config.data.val.update(annotations=str(annotations), images=str(images), tfds="")
            dataset = load_val(config)
    elif config is None or annotations is not None or images is not None:
        raise ValueError(
            "expected annotations and images: a COCO json and the folder of its images; only a run"
            " has validation data of its own"
        )
    else:
        draw_missing_data(config)
        dataset = load_val(config)
    if not dataset.num_targets.any():
        raise ValueError(f"{dataset.annotations_path} has no object to score against")
    return evaluate_dataset(predictor, dataset, num_workers=num_workers, progress=sys.stderr)[1]
