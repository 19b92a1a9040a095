"""What trainers write around the weights: wrappers, moving averages, class names, optimizers.

A trainer's file is a dict. The weights lie in it, or under one of a few names, beside the state of
the optimizer, a moving average, counters and facts about the data set.

Source: detectron2, mmengine (`EMAHook`, `BaseAveragedModel`, `Runner.save_checkpoint`), torch
(`AveragedModel`), PaddleDetection (`ppdet/utils/checkpoint.py`), Ultralytics.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

from sparseinst_jax.runtime.class_names import class_name_fault
from sparseinst_jax.runtime.messages import listed
from sparseinst_jax.weights.reading.pickled_values import (
    Foreign,
    Name,
    PickledArray,
    PickledTensor,
)
from sparseinst_jax.weights.reading.stored_arrays import StoredArray, WeightsFileError, short

# Under which names trainers keep the weights, most usual first: detectron2, everybody, D2Go and
# fvcore, Lightning-like, Caffe2's Detectron.
WRAPPERS = ("model", "state_dict", "model_state", "model_state_dict", "blobs")
# The same for the exponential moving average of the weights.
EMA_WRAPPERS = ("model_ema", "ema_state_dict", "state_dict_ema", "ema_state", "ema_model", "ema")
_INNER_WRAPPERS = ("module", *WRAPPERS)
# Of torch's DistributedDataParallel and of averaged models; of torch.compile.
_PREFIXES = ("module.", "_orig_mod.")
# What an averaged model counts beside them: mmengine, torch, others.
_COUNTERS = ("steps", "n_averaged", "num_updates", "updates", "decay")
_PADDLE_NAMES = "StructuredToParameterName@@"
_PADDLE_SLICES = "UnpackBigParamInfor@@"
_PADDLE_MOMENTS = re.compile(r".+_(moment[12]?|beta[12]_pow_acc|velocity|mean_square)_\d+")
_KEYS_OF_CLASSES = ("classes", "CLASSES", "class_names", "thing_classes", "names", "categories")
_PLACES_OF_CLASSES = (
    ("meta", "dataset_meta"),
    ("dataset_meta",),
    ("meta",),
    ("metadata",),
    ("hyper_parameters",),
    (),
)


class FileClasses(NamedTuple):
    """The classes that a file names."""

    names: list[str]  # of label 0 ... K-1
    # of each label in the data set; None where the file does not say
    category_ids: list[int] | None
    place: str  # where in the file they stand, such as "meta.dataset_meta.classes"


class TrainerContent(NamedTuple):
    """The weights of a checkpoint."""

    arrays: dict[str, StoredArray]  # by name, not read yet
    # name -> (shape, names of the slices) of arrays that Paddle cut
    slices: dict[str, tuple[tuple[int, ...], list[str]]]
    notes: list[str]  # what was chosen, left out and renamed
    classes: FileClasses | None = None  # that the file names, or None


def has_wrapper(content: Any) -> bool:
    """Whether the weights lie under a name; Paddle's are flat, where detectron2's have one."""
    return any(isinstance(content.get(name), dict) for name in WRAPPERS)


def find_weights(content: Any, prefer_ema: bool, is_paddle: bool = False) -> TrainerContent:
    """Finds the weights in what a pickle holds.

    The first of `WRAPPERS` that holds arrays is taken, else the first of `EMA_WRAPPERS`, else the
    content itself; with `prefer_ema` the averaged weights come first, wherever the trainer keeps
    them.

    Args:
      content: the pickle's.
      prefer_ema: take the moving average of the weights.
      is_paddle: the arrays are Paddle's, which writes bfloat16 as uint16.

    Raises:
      WeightsFileError: if there are none, or objects of a foreign class among them.
    """
    if not isinstance(content, dict):
        raise WeightsFileError(
            f"it holds {_kind_of(content)}, expected a dict of arrays; save the state dict of the "
            "model (torch.save(model.state_dict(), FILE)) and give that"
        )
    _refuse_optimizer(content)
    weights, notes = _choose(content, prefer_ema)
    slices = _slices(weights.pop(_PADDLE_SLICES, None))
    if isinstance(weights.pop(_PADDLE_NAMES, None), dict):
        notes.append(f"left out {_PADDLE_NAMES}, Paddle's table of internal names")
    arrays: dict[str, StoredArray] = {}
    foreign, others = [], []
    for name, value in weights.items():
        array = _array(value)
        if isinstance(name, str) and array is not None:
            arrays[name] = stored = array.stored()
            # NumPy has no bfloat16; no network has weights of uint16.
            if stored.dtype == "uint16" and (is_paddle or array is not value):
                arrays[name] = stored._replace(dtype="bfloat16")
        else:
            rows = foreign if isinstance(value, Foreign | Name) else others
            rows.append(f"{_label(name)} ({_kind_of(value)})")
    if foreign:
        raise WeightsFileError(
            f"among the weights are objects that are no arrays: {listed(foreign, between='; ')}; "
            "nothing of them was run; expected a state dict of arrays"
        )
    if others:
        notes.append(f"left out {len(others)} entries that are no arrays: {listed(others)}")
    return TrainerContent(_without_prefixes(arrays, notes), slices, notes, find_classes(content))


def _without_prefixes(arrays: dict[str, StoredArray], notes: list[str]) -> dict[str, StoredArray]:
    """Strips what stands in front of all names, counters aside."""
    for prefix in _PREFIXES:
        counters = [
            name for name in arrays if name in _COUNTERS and arrays[name].shape in ((), (1,))
        ]
        inside = [name for name in arrays if name not in counters]
        if not inside or not all(name.startswith(prefix) for name in inside):
            continue
        arrays = {name.removeprefix(prefix): arrays[name] for name in inside}
        notes.append(f"stripped the prefix {prefix} from all names")
        if counters:
            notes.append(f"left out what an averaged model counts: {listed(counters)}")
    return arrays


def _choose(content: dict[Any, Any], prefer_ema: bool) -> tuple[dict[Any, Any], list[str]]:
    wrapped = {name: _inner(content.get(name)) for name in (*WRAPPERS, *EMA_WRAPPERS)}
    found = [name for name in (*WRAPPERS, *EMA_WRAPPERS) if wrapped[name] is not None]
    averaged = [name for name in found if name in EMA_WRAPPERS]
    if not found:
        if _has_arrays(content):
            return dict(content), []
        _refuse_without_arrays(content)
    is_swapped = bool(averaged) and found[0] in WRAPPERS and _is_of_mmengine(content)
    taken = averaged[0] if prefer_ema and averaged and not is_swapped else found[0]
    notes = [f"took the weights under {taken}"]
    if taken in averaged:
        notes[0] += ", a moving average"
    elif is_swapped:
        notes[0] += ", where mmengine keeps the moving average"
        notes.append(f"left out {averaged[0]}: with mmengine, the last weights, not averaged")
    elif averaged:
        notes.append(
            f"left out the moving average under {averaged[0]}, though it may be what was evaluated"
        )
    beside = [name for name in content if name != taken and name not in averaged]
    if beside:
        notes.append(f"not read, beside the weights: {listed(map(_label, beside))}")
    weights = wrapped[taken]
    assert weights is not None
    return dict(weights), notes


def _is_of_mmengine(content: dict[Any, Any]) -> bool:
    """Whether mmengine wrote it; it exchanges average and last weights when it saves."""
    meta, average = content.get("meta"), content.get("ema_state_dict")
    return (
        "message_hub" in content
        or (isinstance(meta, dict) and "mmengine_version" in meta)
        or (isinstance(average, dict) and "steps" in average)
    )


def _refuse_optimizer(content: dict[Any, Any]) -> None:
    """Refuses the state of an optimizer, whose arrays look like weights."""
    is_paddles = "LR_Scheduler" in content or any(
        isinstance(name, str) and _PADDLE_MOMENTS.fullmatch(name) for name in content
    )
    if is_paddles:
        raise WeightsFileError(
            "it is the state of an optimizer (Paddle's .pdopt: moments and learning rate), which "
            "holds no weights under their names; give the .pdparams beside it"
        )
    if "param_groups" in content and "state" in content:
        raise WeightsFileError(
            "it is the state of an optimizer (torch.optim: state and param_groups), expected the "
            "state dict of a model; give the checkpoint of the model"
        )


def _refuse_without_arrays(content: dict[Any, Any]) -> NoReturn:
    wrapped = [content.get(name) for name in (*WRAPPERS, *EMA_WRAPPERS)]
    objects = [
        f"{_label(name)} ({_kind_of(value)})"
        for part in (content, *wrapped)
        if isinstance(part, dict)
        for name, value in part.items()
        if isinstance(value, Foreign)
    ]
    keys = [short(name) for name in content if isinstance(name, str)]
    cure = "; if a whole model was saved, save its state_dict() and give that" if objects else ""
    raise WeightsFileError(
        "no arrays were found in it, expected them at the top or under one of "
        f"{', '.join((*WRAPPERS, *EMA_WRAPPERS))}; it has: "
        f"{listed(objects or keys) or 'nothing'}{cure}"
    )


def _inner(value: Any) -> dict[Any, Any] | None:
    """The dict of arrays that a wrapper holds, perhaps under one more."""
    for _ in range(2):
        if _has_arrays(value):
            return value
        if not isinstance(value, dict):
            return None
        value = next((value[name] for name in _INNER_WRAPPERS if name in value), None)
    return value if _has_arrays(value) else None


def _has_arrays(value: Any) -> bool:
    return isinstance(value, dict) and any(
        isinstance(name, str) and _array(entry) is not None for name, entry in value.items()
    )


def _array(value: Any) -> PickledTensor | PickledArray | None:
    """The array of a value; Paddle has some as (internal name, array)."""
    if type(value) in (tuple, list) and len(value) == 2 and isinstance(value[0], str):
        value = value[1]
    return value if isinstance(value, PickledTensor | PickledArray) else None


def _slices(table: Any) -> dict[str, tuple[tuple[int, ...], list[str]]]:
    """Paddle's table of arrays above 1 GB, which it cuts into flat slices."""
    if table is None:
        return {}
    try:
        plan = {
            name: (tuple(entry["OriginShape"]), list(entry["slices"]))
            for name, entry in table.items()
        }
        is_whole = all(
            isinstance(name, str)
            and all(type(size) is int and size >= 0 for size in shape)
            and parts
            and all(isinstance(part, str) for part in parts)
            for name, (shape, parts) in plan.items()
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        is_whole, plan = False, {}
    if not is_whole:
        raise WeightsFileError(f"{_PADDLE_SLICES}, Paddle's table of slices, is damaged")
    return plan


def _label(name: Any) -> str:
    return short(name) if isinstance(name, str) else _kind_of(name)


def _kind_of(value: Any) -> str:
    if isinstance(value, Foreign | Name):
        return f"an object of {short(value.path)}"
    if isinstance(value, PickledTensor | PickledArray):
        return "a single array"
    return type(value).__name__


# Class names


def find_classes(content: Mapping[Any, Any]) -> FileClasses | None:
    """Finds the class names that a trainer, or this package, wrote beside the weights."""
    for path, names in _tables(content):
        found = _class_names(names)
        if found:
            around = _at(content, path[:-1])
            return FileClasses(found[0], found[1] or _ids(around, len(found[0])), ".".join(path))
    return None


def _tables(content: Mapping[Any, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for place in _PLACES_OF_CLASSES:
        around = _at(content, place)
        for key in _KEYS_OF_CLASSES:
            if isinstance(around, Mapping) and key in around:
                yield (*place, key), around[key]


def _at(content: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content


def _class_names(value: Any) -> tuple[list[str], list[int] | None] | None:
    """Names, and ids where they are given: of a list, a dict by label, or COCO's categories."""
    if isinstance(value, str):  # mmengine takes one class so
        value = [value]
    if isinstance(value, dict):
        by_label = {name: label for label, name in value.items()}
        if value and all(type(label) is int for label in value.values()):  # name -> label
            by_label = value
        try:
            value = sorted(by_label, key=lambda name: int(by_label[name]))
            labels = sorted(int(label) for label in by_label.values())
        except (TypeError, ValueError):
            return None
        if labels != list(range(len(labels))):
            return None
    if not isinstance(value, list | tuple) or not value:
        return None
    if all(isinstance(entry, dict) for entry in value):
        names, ids = [e.get("name") for e in value], [e.get("id") for e in value]
    else:
        names, ids = list(value), None
    if not all(isinstance(name, str) and class_name_fault(name) is None for name in names):
        return None
    return names, ids if ids and all(type(number) is int for number in ids) else None


def _ids(around: Any, count: int) -> list[int] | None:
    """The data set's ids of the labels: this package's and detectron2's table of them."""
    ids = around.get("category_ids")
    label_of = around.get("thing_dataset_id_to_contiguous_id")
    if isinstance(label_of, dict) and sorted(map(str, label_of.values())) == sorted(
        map(str, range(count))
    ):
        ids = sorted(label_of, key=lambda number: label_of[number])
    is_whole = isinstance(ids, list) and len(ids) == count
    return ids if is_whole and all(type(number) is int for number in ids) else None
