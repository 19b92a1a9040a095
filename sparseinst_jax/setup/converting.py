"""From a weights file of any implementation to ours, with all that is stored with them."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparseinst_jax.data.classes import COCO_CATEGORY_IDS, COCO_CLASS_NAMES
from sparseinst_jax.data.coco import load_coco
from sparseinst_jax.models.families import FAMILIES
from sparseinst_jax.models.trees import Tree, functional
from sparseinst_jax.runtime import process
from sparseinst_jax.runtime.files import read_json
from sparseinst_jax.runtime.messages import listed
from sparseinst_jax.setup.builders import build_model
from sparseinst_jax.setup.config import load_config
from sparseinst_jax.weights.convert import Shapes, original_shapes
from sparseinst_jax.weights.network_files import (
    ConvertedWeights,
    classes_that_fit,
    closest_network,
    convert_file,
)
from sparseinst_jax.weights.reading.trainer_content import FileClasses


class Converted(NamedTuple):
    """What is converted.

    Attributes:
      params, statistics: nested dicts of NumPy arrays.
      meta: stored with them: config, classes, where they come from.
      lines: for the user.
    """

    params: Tree
    statistics: Tree
    meta: dict[str, Any]
    lines: list[str]


def convert_weights(
    source: Path,
    config: Any,
    classes: str | None = None,
    prefer_ema: bool = False,
    configs: Path | None = None,
) -> Converted:
    """Convert the file of a whole network.

    Args:
      source: the file.
      config: of its network.
      classes: a json with the names of its classes; by default those that the file names, else for
        80 classes COCO's.
      prefer_ema: take the moving average of the weights where the file holds both.
      configs: a folder of configurations, from which a better one is proposed where this does not
        fit.

    Raises:
      FileNotFoundError: a file does not exist.
      ValueError: the file cannot be read, or does not fit the network or the classes.
    """

    def make_trees(num_classes: int) -> tuple[Tree, Tree]:
        return _empty_trees(config.model, num_classes)

    def suggest(arrays: Mapping[str, Any], num_classes: int) -> str:
        assert configs is not None
        return closest_network(arrays, _networks(configs, num_classes), configs)

    names = FAMILIES[config.model.family].weights
    weights = convert_file(source, names, make_trees, prefer_ema, suggest if configs else None)
    class_names, category_ids, origin = _classes(classes, weights, source)
    meta = {
        "config": config.to_dict(),
        "class_names": list(class_names),
        "category_ids": list(category_ids),
        "code_version": process.version(),
        "converted_from": {**weights.facts, **_made_now()},
    }
    lines = [*weights.lines, f"  classes of {origin}: {listed(class_names, 8)}"]
    return Converted(weights.params, weights.statistics, meta, lines)


def checkpoint_weights(source: Path, overrides: Mapping[str, Any]) -> Converted:
    """Take the weights of a run's last checkpoint, or of one, with overrides of its configuration.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: it cannot be read, or the overrides are not valid.
    """
    from sparseinst_jax.checkpoints.store import Checkpoints  # Orbax: slow to import

    with Checkpoints(source, read_only=True) as checkpoints:
        params, statistics, meta = checkpoints.restore_model()
    meta["config"] = load_config(meta["config"], overrides).to_dict()
    facts = {"file": str(source), "kind": f"checkpoint of step {meta['step']}", **_made_now()}
    lines = [f"weights of {source}, step {meta['step']}"]
    return Converted(params, statistics, {**meta, "converted_from": facts}, lines)


def names_and_ids(classes: FileClasses) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names of classes that a file gives, with its ids, those of COCO or else 1, 2, ..."""
    names = tuple(classes.names)
    if classes.category_ids is not None:
        return names, tuple(classes.category_ids)
    is_coco = names == COCO_CLASS_NAMES
    return names, COCO_CATEGORY_IDS if is_coco else tuple(range(1, len(names) + 1))


def _empty_trees(model_config: Any, num_classes: int) -> tuple[Tree, Tree]:
    """Parameters and statistics of a network as shapes: zeros that take no memory."""
    _, params, statistics = functional(build_model(model_config, num_classes, seed=None))
    return params, statistics


def _networks(folder: Path, num_classes: int) -> Iterator[tuple[list[str], Shapes]]:
    """The networks that the configurations of a folder describe; other files are skipped."""
    networks: dict[str, tuple[list[str], Shapes]] = {}  # several files can describe one
    for path in sorted(folder.glob("*.py")):
        try:
            model = load_config(path).model
            key = str(sorted(model.to_dict().items()))
            if key not in networks:
                trees = _empty_trees(model, num_classes)
                networks[key] = [], original_shapes(*trees, FAMILIES[model.family].weights)
        except (ValueError, FileNotFoundError, AttributeError):
            continue
        networks[key][0].append(path.name)
    yield from networks.values()


def _classes(
    path: str | None, weights: ConvertedWeights, source: Path
) -> tuple[Sequence[str], Sequence[int], str]:
    """Names and ids of the classes, and where they are from: a json, the file itself, or COCO."""
    num_classes = weights.num_classes
    if path is None:
        if named := classes_that_fit(weights.classes, num_classes, source):
            return *names_and_ids(named), f"the file, {named.place}"
        if num_classes == len(COCO_CLASS_NAMES):
            return COCO_CLASS_NAMES, COCO_CATEGORY_IDS, "COCO, as the file names none"
        raise ValueError(
            f"{source} finds {num_classes} classes and does not say which: give their names by "
            "--classes FILE.json, a list of names or the annotations that it was trained with."
        )
    if not Path(path).is_file():
        raise FileNotFoundError(f"--classes {path} is no file; give a json")
    with Path(path).open("rb") as file:
        is_list = file.read(64).lstrip().startswith(b"[")
    if is_list:
        names = read_json(path, "--classes", "give a list of names")
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"--classes {path} must be a list of names, or annotations of COCO.")
        ids = list(range(1, len(names) + 1))
    else:
        dataset = load_coco(path, None)
        names, ids = list(dataset.class_names), list(dataset.category_ids)
    if len(names) != num_classes:
        raise ValueError(f"{source} has {num_classes} classes, {path} has {len(names)}.")
    named = weights.classes
    is_other = named is not None and named.names != list(names)
    instead = f", not the {listed(named.names, 8)} of the file" if named and is_other else ""
    return names, ids, f"{path}{instead}"


def _made_now() -> dict[str, str]:
    """Date and version of a conversion."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"date": now, "converted_by": f"sparseinst_jax {process.version()}"}
