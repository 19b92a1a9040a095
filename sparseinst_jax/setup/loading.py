"""From a run or a weights file on disk to a predictor."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sparseinst_jax.checkpoints.folders import locate
from sparseinst_jax.data.classes import COCO_CATEGORY_IDS, COCO_CLASS_NAMES, choose_classes
from sparseinst_jax.inference.predictor import Predictor, checked_settings
from sparseinst_jax.models.families import FAMILIES
from sparseinst_jax.models.trees import Tree, functional
from sparseinst_jax.runner.file_predictor import FilePredictor
from sparseinst_jax.runner.metadata import Metadata
from sparseinst_jax.runner.onnx_file import read_metadata
from sparseinst_jax.runtime.messages import printable
from sparseinst_jax.runtime.process import refuse_forked
from sparseinst_jax.setup.builders import build_model
from sparseinst_jax.setup.config import load_config
from sparseinst_jax.setup.converting import names_and_ids
from sparseinst_jax.setup.datasets import load_val, name_of
from sparseinst_jax.setup.published import config_of, local_weights
from sparseinst_jax.weights.convert import original_to_ours, rename_to_original
from sparseinst_jax.weights.network_files import classes_that_fit, count_classes
from sparseinst_jax.weights.reading import read_weights_file

NO_CHOICE = {"classes": (), "class_map": (), "exclude_classes": ()}  # of `config.data`


def build_predictor(
    config: Any,
    apply: Callable[..., Any],
    params: Tree,
    statistics: Tree,
    class_names: Sequence[str],
    category_ids: Sequence[int | None],
) -> Predictor:
    """Make a predictor from a network's pure function with the settings of a configuration."""
    options = dict(config.eval)
    batch_size, protocol = options.pop("batch_size"), options.pop("protocol")
    zoom = options.pop("zoom", 1.0)  # a family from outside may know nothing of it
    return Predictor(
        apply,
        params,
        statistics,
        class_names,
        category_ids,
        config.data.eval_size,
        family=FAMILIES[config.model.family],
        options=options,
        batch_size=batch_size,
        protocol=protocol,
        config=config.to_dict(),
        zoom=zoom,
    )


def load_checkpoint(
    path: str | os.PathLike,
    step: int | str | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    config: str | os.PathLike | None = None,
    model: Any = None,
) -> Predictor:
    """Load a predictor from all that `setup.load` takes but an exported file."""
    if named := config_of(path):
        refuse_forked()
        chosen = load_config(os.fspath(config or named), overrides)
        return load_weights_file(chosen, os.fspath(path))[0]
    path = Path(path).expanduser()
    if path.is_file():
        if config is None:
            raise ValueError(
                f"{path} is a weights file, which does not describe its network: name the "
                f'configuration, load("{path.name}", config="giam_r50") (`sparseinst zoo` lists '
                "them), or give a run folder"
            )
        refuse_forked()
        return load_weights_file(load_config(os.fspath(config), overrides), path)[0]
    if config is not None and path.is_dir():
        raise ValueError(
            f"{path} is no weights file, and a run has its own configuration: leave out config, or "
            "override its keys"
        )
    return load_run(path, step, overrides, model)[0]


def load_weights_file(config: Any, weights: str | Path) -> tuple[Predictor, str]:
    """Load a predictor from a weights file of any kind and implementation.

    Where the file does not name its classes, they are those of `config.data.val` or, where these
    annotations are missing, of COCO.

    Args:
        config: the whole configuration; it must describe the network of the file.
        weights: the file, or the name of a published one.

    Returns:
        The predictor, and where the names of its classes are from.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file does not fit the network or the classes; says how.
    """
    weight_names = FAMILIES[config.model.family].weights
    weights = local_weights(weights)
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
    return build_predictor(config, apply, *loaded, *chosen), origin


def load_run(
    path: str | os.PathLike,
    step: int | str | None = None,
    overrides: Mapping[str, Any] | None = None,
    model: Any = None,
) -> tuple[Predictor, Any, int]:
    """Load a predictor as `load` does; also returns its configuration and the step."""
    from sparseinst_jax.checkpoints.store import Checkpoints  # Orbax: slow to import

    refuse_forked()
    with Checkpoints(Path(path).expanduser(), read_only=True) as checkpoints:
        params, statistics, meta = checkpoints.restore_model(step)
    config: Any = load_config(meta["config"], overrides)
    class_names, category_ids = meta["class_names"], meta["category_ids"]
    if model is None and (name := meta.get("given_model")):
        raise ValueError(
            f"the run in {path} trained a module of the class {printable(str(name), 100)} that was "
            "given to fit, and only your program can make one: load(path, model=...) with such a "
            "module, or what fit returned"
        )
    with _named_faults(path):
        if model is None:
            model = build_model(config.model, len(class_names), seed=None)
        apply, *fresh = functional(model)
    _refuse_other_network(fresh, (params, statistics), path)
    with _named_faults(path):
        trained = meta["config"]["data"]
        chosen = choose_known_classes(class_names, category_ids, config.data, trained)
        predictor = build_predictor(config, apply, params, statistics, *chosen)
    return predictor, config, int(meta["step"])


def stored_meta(path: str | os.PathLike) -> dict[str, Any]:
    """What is stored beside the weights of a run's last checkpoint: configuration, classes."""
    from sparseinst_jax.checkpoints.store import Checkpoints  # Orbax: slow to import

    with Checkpoints(Path(path), read_only=True) as checkpoints:
        return checkpoints.read_meta()


def run_folder(checkpoint: str | os.PathLike) -> Path:
    """The folder of the run that a checkpoint belongs to."""
    folder, _ = locate(Path(checkpoint))
    return folder.parent if folder.name == "checkpoints" else folder


# What an exported file cannot change: it is in the graph.
_FREE = ("data.", "train.", "eval.batch_size", "eval.zoom")


def exported_config(metadata: Metadata, overrides: Mapping[str, Any] | None = None) -> Any:
    """The configuration that an exported file holds.

    Raises:
        ValueError: overrides ask for what is in the graph, or are not valid.
    """
    fixed = [key for key in overrides or {} if not key.startswith(_FREE)]
    if fixed:
        raise ValueError(
            f"an exported file has its network and thresholds in its graph: leave out"
            f" {', '.join(f'--config.{key}' for key in fixed)}, or export it again with them"
        )
    return load_config(metadata.config or "base", overrides)


def load_exported(
    path: str | os.PathLike, overrides: Mapping[str, Any] | None, runtime: str
) -> tuple[FilePredictor, Any]:
    """Load a predictor from a file of `sparseinst export`; also returns its configuration."""
    metadata = read_metadata(path)
    with _named_faults(path):
        config = exported_config(metadata, overrides)
        classes = metadata.class_names, metadata.category_ids
        if metadata.config:
            trained = metadata.config["data"]
            classes = choose_known_classes(*classes, config.data, trained)  # type: ignore[arg-type]
        given = (metadata.shortest_side, metadata.longest_side)
        if "data.eval_size" in (overrides or {}):
            given = config.data.eval_size
        batch_size, zoom = config.eval.batch_size, config.eval.get("zoom", 1.0)
        size = checked_settings(given, batch_size, {}, zoom)
        predictor = FilePredictor(
            path, runtime, eval_size=size, classes=classes, batch_size=batch_size, zoom=zoom
        )
    return predictor, config


def choose_known_classes(
    names: Sequence[str], ids: Sequence[int], data: Any, trained: Mapping[str, Any]
) -> tuple[list[str], list[int | None]]:
    """Merge, rename and choose the classes of a model that was trained with another choice.

    Args:
        names: of the model's K classes.
        ids: their category ids.
        data: `config.data`, which chooses.
        trained: the same of the training; a choice that it made, too, is in the names already.

    Returns:
        K names and ids; an id is None for a class that is left out.
    """
    given = [(data[key], trained.get(key, ())) for key in NO_CHOICE]
    chosen = [() if tuple(new) == tuple(old) else new for new, old in given]
    if not any(chosen):
        return list(names), list(ids)
    known = dict(zip(ids, names, strict=True))
    found = choose_classes(known, *chosen, all_known=False, path="the model")
    name_of = dict(zip(found.category_ids, found.names, strict=True))
    kept = [found.kept_id[i] for i in ids]
    new_names = [n if i is None else name_of[i] for i, n in zip(kept, names, strict=True)]
    return new_names, kept


@contextmanager
def _named_faults(path: str | os.PathLike) -> Iterator[None]:
    """Turn what values of any type lead to into a message about the stored configuration."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
        reason = printable(f"{type(error).__name__}: {error}".partition("\n")[0], 300)
        raise ValueError(
            f"the configuration stored with the checkpoint in {path} is not one of this package "
            f"({reason}): give another checkpoint"
        ) from error


def _refuse_other_network(
    fresh: Sequence[Tree], restored: Sequence[Tree], path: str | os.PathLike
) -> None:
    """Compare names and shapes of (params, statistics): here a fault is still easy to explain."""
    wanted, stored = (
        {
            jax.tree_util.keystr(keys, simple=True, separator="/"): np.shape(leaf)
            for keys, leaf in jax.tree_util.tree_leaves_with_path(
                {"params": params, "statistics": statistics}
            )
        }
        for params, statistics in (fresh, restored)
    )
    wrong = [
        f"{name}: stored {stored.get(name, 'nothing')}, network {wanted.get(name, 'nothing')}"
        for name in sorted(wanted.keys() | stored.keys())
        if wanted.get(name) != stored.get(name)
    ]
    if wrong:
        raise ValueError(
            f"the configuration asks for another network than the checkpoint in {path} holds:\n  "
            + "\n  ".join(wrong)
            + "\nOf a checkpoint only data.*, eval.* and model.dtype can be overridden: leave the"
            " other overrides out, or give another checkpoint."
        )
