"""Make one training image with its targets, as the plan says: read, move, paste, cover, ignore."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from sparseinst_jax.data.coco import Annotation, ImageRecord, Segmentation, read_record_picture
from sparseinst_jax.data.plan import ImagePlan, Paste
from sparseinst_jax.data.target_masks import QUARTER_LEVELS, TargetForm
from sparseinst_jax.data.transforms import (
    Size,
    Transform,
    boxes_in_crop,
    mask_levels,
    move_mask,
    transform_picture,
)

_Move = Callable[[Segmentation, Size, Transform], Any]


class TrainImage(NamedTuple):
    """One image and what is to be learned of it; h and w are those of the transformed image."""

    image: np.ndarray  # uint8 [h, w, 3]
    labels: list[int]  # of the targets, the image's own first, then the pasted ones
    # of each target, uint8 in the form asked for, such as levels [ceil(h/4), ceil(w/4)]
    masks: list[np.ndarray]
    # bool [ceil(h/s), ceil(w/s)] at the form's stride s, crowd regions; None when they are dropped
    is_ignored: np.ndarray | None
    # objects of which the transform leaves no pixel, and that were dropped for it
    outside: list[Annotation]
    covered: list[Annotation]  # objects that are wholly under pasted ones


def load_train_image(
    records: Sequence[ImageRecord],
    plan: ImagePlan,
    flip_labels: tuple[int, ...] = (),
    ignores_crowd: bool = False,
    form: TargetForm = QUARTER_LEVELS,
) -> TrainImage:
    """Read and transform one image and its objects.

    Objects of which no pixel is left are dropped, unless the form keeps them. Pasted objects take
    their pixels with them and cover those before; they overlap each other as in the image that
    they come from.

    Args:
        records: of the data set; the plan's positions index it.
        plan: what happens to the image.
        flip_labels: label of each label's object in a flipped image; empty for the same.
        ignores_crowd: say where crowd regions are; else they are left out.
        form: of the masks.

    Raises:
        ValueError: the image or a mask cannot be read; names the file and the annotation.
    """
    record = records[plan.position]
    image = transform_picture(read_record_picture(record), plan.transform)
    result = TrainImage(image, [], [], None, [], [])
    pasted, cover = None, None
    if plan.paste is not None:
        pasted, cover = _paste(result, records[plan.paste.position], plan.paste, flip_labels, form)
        result = result._replace(image=pasted.image)
    for annotation in record.targets:
        mask = _own_mask(annotation, record, plan.transform, cover, form, result)
        if mask is not None:
            result.labels.append(_label(annotation, plan.transform, flip_labels))
            result.masks.append(mask)
    if pasted is not None:
        result.labels.extend(pasted.labels)
        result.masks.extend(pasted.masks)
        result.outside.extend(pasted.outside)
    if ignores_crowd:
        width = -(-plan.transform.size[1] // form.stride)
        is_ignored = form.decode(form.encode(_crowd(record, plan.transform)))[:, :width]
        for mask in result.masks:
            # What an object covers is known, a pasted one too.
            is_ignored &= ~form.decode(mask)[:, :width]
        result = result._replace(is_ignored=is_ignored)
    return result


def _paste(
    first: TrainImage,
    record: ImageRecord,
    paste: Paste,
    flip_labels: tuple[int, ...],
    form: TargetForm,
) -> tuple[TrainImage, np.ndarray]:
    """Paste objects at the place where they are, cut at the border of the first image.

    Returns the changed image with the pasted targets alone, and bool [h, w] of what they cover.
    """
    image = first.image.copy()
    other = transform_picture(read_record_picture(record), paste.transform)
    common = tuple(min(a, b) for a, b in zip(image.shape[:2], other.shape[:2], strict=True))
    inside = np.s_[: common[0], : common[1]]
    cover = np.zeros(image.shape[:2], bool)
    result = TrainImage(image, [], [], None, [], [])
    targets = record.targets
    for index in paste.targets:
        annotation = targets[index]
        mask = np.zeros(cover.shape, np.uint8)
        mask[inside] = _moved(move_mask, annotation, record, paste.transform)[inside]
        if not mask.any():
            result.outside.append(annotation)
            continue
        cover |= mask.astype(bool)
        result.labels.append(_label(annotation, paste.transform, flip_labels))
        result.masks.append(form.encode(mask))
    image[inside][cover[inside]] = other[inside][cover[inside]]
    return result, cover


def _own_mask(
    annotation: Annotation,
    record: ImageRecord,
    transform: Transform,
    cover: np.ndarray | None,
    form: TargetForm,
    result: TrainImage,
) -> np.ndarray | None:
    """Encode what is seen of an object; None, and noted, when nothing is."""
    box, size = annotation.box_xyxy, (record.height, record.width)
    if box is not None and not boxes_in_crop(np.array(box), size, transform).all():
        result.outside.append(annotation)
        return None
    if cover is None and form == QUARTER_LEVELS:
        # The same levels, from run lengths: no mask at full size is drawn.
        levels = _moved(mask_levels, annotation, record, transform)
        if levels is None:
            result.outside.append(annotation)
        return levels
    mask = _moved(move_mask, annotation, record, transform)
    seen = mask if cover is None else mask * ~cover
    keeps_empty = form.keeps_empty or (cover is None and transform.pixels.keeps_empty)
    if seen.any() or keeps_empty:
        return form.encode(seen)
    (result.covered if mask.any() else result.outside).append(annotation)
    return None


def _crowd(record: ImageRecord, transform: Transform) -> np.ndarray:
    """Where the crowd regions of an image are, uint8 0/1 [h, w]."""
    region = np.zeros(transform.size, np.uint8)
    for annotation in record.annotations:
        if annotation.iscrowd:
            region |= _moved(move_mask, annotation, record, transform)
    return region


def _label(annotation: Annotation, transform: Transform, flip_labels: tuple[int, ...]) -> int:
    return flip_labels[annotation.label] if transform.flip and flip_labels else annotation.label


def _moved(move: _Move, annotation: Annotation, record: ImageRecord, transform: Transform) -> Any:
    try:
        return move(annotation.segmentation, (record.height, record.width), transform)
    except Exception as error:
        raise ValueError(
            f"annotation {annotation.id} of image {record.source} has a broken segmentation "
            f"({error}); correct or remove it"
        ) from error
