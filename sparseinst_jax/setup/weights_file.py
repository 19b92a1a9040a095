"""From a weights file of any kind and implementation to a predictor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparseinst_jax.data.classes import COCO_CATEGORY_IDS, COCO_CLASS_NAMES
from sparseinst_jax.inference.predictor import Predictor
from sparseinst_jax.models.families import FAMILIES
from sparseinst_jax.models.trees import functional
from sparseinst_jax.setup.builders import build_model
from sparseinst_jax.setup.datasets import load_val, name_of
from sparseinst_jax.setup.loading import NO_CHOICE, build_predictor, choose_known_classes
from sparseinst_jax.weights.convert import original_to_ours, rename_to_original
from sparseinst_jax.weights.network_files import classes_that_fit, count_classes
from sparseinst_jax.weights.reading import read_weights_file
from sparseinst_jax.weights.reading.trainer_content import FileClasses


def load_weights_file(config: Any, weights: str | Path) -> Predictor:
    """Load a predictor from a weights file of any kind and implementation.

    Where the file does not name its classes, they are those of `config.data.val` or, where these
    annotations are missing, of COCO.

    Args:
        config: the whole configuration; it must describe the network of the file.
        weights: the file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file does not fit the network or the classes; says how.
    """
    weight_names = FAMILIES[config.model.family].weights
    file = read_weights_file(weights)
    state = rename_to_original(file.arrays, weight_names).arrays
    annotations = name_of(config.data.val)
    found = count_classes(state, weight_names)
    names, ids = COCO_CLASS_NAMES, COCO_CATEGORY_IDS
    origin = f"COCO (there is no {annotations})"
    trained = NO_CHOICE
    if named := classes_that_fit(file.classes, found, weights):
        (names, ids), origin = names_and_ids(named), str(weights)
    elif config.data.val.tfds or Path(annotations).is_file():
        dataset, origin = load_val(config, with_images=False), annotations
        if found in (None, len(dataset.class_names)):
            trained = config.data
        else:
            everything = config.copy_and_resolve_references()
            everything.data.update(NO_CHOICE)
            dataset = load_val(everything, with_images=False)
        names, ids = dataset.class_names, dataset.category_ids
    if found not in (None, len(names)):
        raise ValueError(
            f"{weights} is of a model with {found} classes, {origin} has {len(names)}: give "
            "the json (--config.data.val.annotations) of the classes that the weights were trained "
            "with; to start training from them with other classes use sparseinst train --init-from."
        )
    apply, params, statistics = functional(build_model(config.model, len(names), seed=None))
    loaded = original_to_ours(state, params, statistics, weight_names, source=str(weights))
    chosen = choose_known_classes(names, ids, config.data, trained)
    return build_predictor(config, apply, *loaded, *chosen)


def names_and_ids(classes: FileClasses) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names of classes that a file gives, with its ids, those of COCO or else 1, 2, ..."""
    names = tuple(classes.names)
    if classes.category_ids is not None:
        return names, tuple(classes.category_ids)
    is_coco = names == COCO_CLASS_NAMES
    return names, COCO_CATEGORY_IDS if is_coco else tuple(range(1, len(names) + 1))
