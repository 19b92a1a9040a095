"""The data sets that a configuration names, for every command that reads one."""

from __future__ import annotations

from typing import Any

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
        classes=data.classes,
        class_map=data.class_map,
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
        classes=data.classes,
        class_map=data.class_map,
        all_classes_known=False,
    )
