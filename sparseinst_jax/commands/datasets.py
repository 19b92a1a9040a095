"""The data sets that a configuration names, for every command that reads one."""

from __future__ import annotations

from typing import Any

from sparseinst_jax.data import check
from sparseinst_jax.data.coco import CocoDataset, load_coco


def load_train(config: Any) -> CocoDataset:
    """Load `config.data.train` with the chosen classes, its files asked for.

    Raises:
        FileNotFoundError, ValueError: as `load_coco`.
    """
    data = config.data
    return load_coco(
        data.train.annotations,
        data.train.images,
        keep_empty=data.keep_empty,
        check_files=True,
        annotation_filter=data.get("annotation_filter", "detectron2"),
        # What a crop of PaddleDetection's keeps is decided by boxes.
        keeps_boxes=data.get("resize_rule") == "paddledetection"
        and data.augmentation == "flip_resize_crop",
        **_choice(data),
    )


def load_val(config: Any, *, with_images: bool = True, check_files: bool = False) -> CocoDataset:
    """Load `config.data.val` with the classes chosen as in training.

    A class that this json does not have is passed over, as long as it has one of them.

    Raises:
        FileNotFoundError, ValueError: as `load_coco`.
    """
    data = config.data
    return load_coco(
        data.val.annotations,
        data.val.images if with_images else None,
        check_files=check_files,
        **_choice(data),
        all_classes_known=False,
    )


def _choice(data: Any) -> dict[str, Any]:
    # A run that was made before these keys has every class.
    return {key: data.get(key, ()) for key in ("classes", "class_map")}


def brief_check(config: Any, dataset: CocoDataset) -> list[str]:
    """Lines that say what will be trained on and what of it not; opens no image."""
    data = config.data
    lost = check.lost_at_ends(dataset, data.train_sizes, data.train_max_size)
    warnings = [
        *check.warn_of_unusable(dataset),
        *check.warn(dataset, config.model.num_masks),
        *check.warn_of_lost(lost, data.train_max_size),
    ]
    hint = ["`sparseinst check-data` says more, and looks at the images"] * bool(warnings)
    return [*check.describe(dataset), *_marked(warnings), *hint]


def brief_comparison(train: CocoDataset, val: CocoDataset) -> list[str]:
    """Lines on classes and images of the validation data that spoil its AP; opens no image."""
    overlap = check.find_overlap(train, val)
    return _marked(
        [
            *check.warn_of_classes(train, val),
            *check.warn_of_overlap(overlap, len(val.records)),
        ]
    )


def _marked(warnings: list[str]) -> list[str]:
    return [f"WARNING: {line}" for line in warnings]
