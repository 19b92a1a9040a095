"""The data sets that a configuration names, for every command that reads one."""

from __future__ import annotations

from typing import Any

from sparseinst_jax.data import check_dataset, shapes
from sparseinst_jax.data.coco import CocoDataset, DatasetSelection, index_coco, without_empty
from sparseinst_jax.data.ecosystems import find_resize_rule
from sparseinst_jax.data.faults import DatasetFaults
from sparseinst_jax.models.families import FAMILIES
from sparseinst_jax.runtime import hosts
from sparseinst_jax.setup.builders import num_masks


def draw_missing_data(config: Any, had_data: bool | None = None) -> None:
    """Draw the demo's data set where it is asked for and missing, on the first host.

    Args:
        config: with `data.generator`.
        had_data: whether a run has used the data before; None: where the configuration is a run's.

    Raises:
        ValueError: see `shapes.draw_if_missing`.
    """
    if config.data.generator == "shapes":
        data = config.data
        hosts.first_alone(
            lambda: shapes.draw_if_missing(
                data.train.annotations,
                data.val.annotations,
                had_data=bool(data.root) if had_data is None else had_data,
            )
        )


def load_train(config: Any) -> CocoDataset:
    """Load `config.data.train` with the chosen classes; checks that its files exist.

    Raises:
        FileNotFoundError, ValueError: as `load_coco`.
    """
    data = config.data
    selection = _selection(
        data,
        annotation_filter=data.annotation_filter,
        keeps_boxes=data.augmentation == "flip_resize_crop"
        and find_resize_rule(data.resize_rule).needs_boxes,
    )
    dataset, faults = _index(data, data.train, selection, check_files=True)
    faults.raise_if_fatal()
    return dataset if data.keep_empty else without_empty(dataset, data.annotation_filter)


def load_val(config: Any, *, with_images: bool = True, check_files: bool = False) -> CocoDataset:
    """Load `config.data.val` with the classes chosen as in training.

    A class that this json does not have is passed over, as long as it has one of them.

    Raises:
        FileNotFoundError, ValueError: as `load_coco`.
    """
    data = config.data
    selection = _selection(data, all_classes_known=False)
    dataset, faults = _index(data, data.val, selection, with_images, check_files)
    faults.raise_if_fatal()
    return dataset


def index_both(config: Any) -> dict[str, tuple[CocoDataset, DatasetFaults]]:
    """Index what `config.data` names, "train" and "val", and collect what is wrong.

    Raises:
        ValueError: something is such that nothing can be indexed; all such faults in one message.
    """
    indexed, errors = {}, []
    for title in ("train", "val"):
        part = config.data[title]
        if not (part.annotations or part.tfds):
            continue
        try:
            selection = _selection(config.data, all_classes_known=title == "train")
            indexed[title] = _index(config.data, part, selection, check_files=True)
        except (FileNotFoundError, ValueError) as error:
            errors.append(str(error))
    if errors:
        raise ValueError("\n".join(errors))
    return indexed


def name_of(part: Any) -> str:
    """The name of `config.data.train` or `config.data.val` in messages."""
    return part.tfds or part.annotations


def _index(
    data: Any,
    part: Any,
    selection: DatasetSelection,
    with_images: bool = True,
    check_files: bool = False,
) -> tuple[CocoDataset, DatasetFaults]:
    """Index a json or a TFDS split."""
    if part.tfds:
        from sparseinst_jax.data import tfds  # takes seconds to import

        return tfds.index_tfds(part.tfds, data.tfds_dir, selection)
    images = part.images if with_images else None
    return index_coco(part.annotations, images, selection, check_files=check_files)


def _selection(data: Any, **others: Any) -> DatasetSelection:
    chosen = dict(classes=data.classes, class_map=data.class_map)
    return DatasetSelection(**chosen, exclude_classes=data.exclude_classes, **others)


def brief_check(config: Any, dataset: CocoDataset) -> list[str]:
    """Summarise the training data and warn of what will not be used; opens no image."""
    data = config.data
    map_stride = FAMILIES[config.model.family].map_stride
    lost = check_dataset.lost_at_ends(dataset, data.train_sizes, data.train_max_size, map_stride)
    warnings = [
        *check_dataset.warn_of_unusable(dataset),
        *check_dataset.warn(dataset, num_masks(config), data.flip_label_pairs),
        *check_dataset.warn_of_lost(lost, data.train_max_size),
    ]
    hint = ["`sparseinst check-data` says more, and looks at the images"] * bool(warnings)
    return [*check_dataset.describe(dataset), *_marked(warnings), *hint]


def brief_comparison(train: CocoDataset, val: CocoDataset) -> list[str]:
    """Warn of classes and images that make the validation AP misleading; opens no image."""
    overlap = check_dataset.find_overlap(train, val)
    return _marked(
        [
            *check_dataset.warn_of_classes(train, val),
            *check_dataset.warn_of_overlap(overlap, len(val.records)),
        ]
    )


def _marked(warnings: list[str]) -> list[str]:
    return [f"WARNING: {line}" for line in warnings]
