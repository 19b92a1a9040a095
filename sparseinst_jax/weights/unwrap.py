"""Which part of a checkpoint are the weights, and what lies beside them."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

from sparseinst_jax.weights.arrays import StoredArray, WeightsFileError, join_some, name_some, short
from sparseinst_jax.weights.stand_ins import Foreign, Name, PickledArray, Tensor

# Under which names trainers keep the weights, most usual first: detectron2, everybody, D2Go and
# fvcore, Lightning-like, Caffe2's Detectron.
WRAPPERS = ("model", "state_dict", "model_state", "model_state_dict", "blobs")
# The same for the exponential moving average of the weights.
EMA_WRAPPERS = ("model_ema", "ema_state_dict", "state_dict_ema", "ema_state", "ema_model", "ema")
_INNER_WRAPPERS = ("module", *WRAPPERS)
_PREFIX = "module."  # of torch's DistributedDataParallel
PADDLE_NAMES = "StructuredToParameterName@@"
PADDLE_SLICES = "UnpackBigParamInfor@@"


class Unwrapped(NamedTuple):
    """The weights of a checkpoint.

    Attributes:
      arrays: by name, not read yet.
      slices: name -> (shape, names of the slices) of arrays that Paddle cut.
      notes: what was chosen, left out and renamed.
    """

    arrays: dict[str, StoredArray]
    slices: dict[str, tuple[tuple[int, ...], list[str]]]
    notes: list[str]


def unwrap(content: Any, prefer_ema: bool) -> Unwrapped:
    """Finds the weights in what a pickle holds.

    The first of `WRAPPERS` that holds arrays is taken, else the first of `EMA_WRAPPERS`, else the
    content itself; with `prefer_ema` the averaged weights come first.

    Raises:
      WeightsFileError: if there are none, or objects of a foreign class among them.
    """
    if not isinstance(content, dict):
        raise WeightsFileError(
            f"it holds {_kind_of(content)}, expected a dict of arrays; save the state dict of the "
            "model (torch.save(model.state_dict(), FILE)) and give that"
        )
    weights, notes = _choose(content, prefer_ema)
    slices = _slices(weights.pop(PADDLE_SLICES, None))
    if isinstance(weights.pop(PADDLE_NAMES, None), dict):
        notes.append(f"left out {PADDLE_NAMES}, Paddle's table of internal names")
    arrays: dict[str, StoredArray] = {}
    foreign, others = [], []
    for name, value in weights.items():
        array = _array(value)
        if isinstance(name, str) and array is not None:
            arrays[name] = array.stored()
        elif isinstance(value, Foreign | Name):
            foreign.append(f"{short(name)} ({_kind_of(value)})")
        else:
            others.append(f"{short(name) if isinstance(name, str) else _kind_of(name)}")
            others[-1] += f" ({_kind_of(value)})"
    if foreign:
        raise WeightsFileError(
            f"among the weights are objects that are no arrays: {join_some(foreign)}; nothing of "
            "them was run; expected a state dict of arrays"
        )
    if others:
        notes.append(
            f"left out {len(others)} entries that are no arrays: {join_some(others, between=', ')}"
        )
    if arrays and all(name.startswith(_PREFIX) for name in arrays):
        arrays = {name.removeprefix(_PREFIX): array for name, array in arrays.items()}
        notes.append(f"stripped the prefix {_PREFIX} from all names")
    return Unwrapped(arrays, slices, notes)


def is_paddle(content: Any) -> bool:
    """Whether a plain pickle is one of Paddle: flat, where detectron2's have wrappers."""
    return isinstance(content, dict) and not any(
        isinstance(content.get(name), dict) for name in WRAPPERS
    )


def _choose(content: dict[Any, Any], prefer_ema: bool) -> tuple[dict[Any, Any], list[str]]:
    wrapped = {name: _inner(content.get(name)) for name in (*WRAPPERS, *EMA_WRAPPERS)}
    found = [name for name in (*WRAPPERS, *EMA_WRAPPERS) if wrapped[name] is not None]
    averaged = [name for name in found if name in EMA_WRAPPERS]
    if not found:
        if _has_arrays(content):
            return dict(content), []
        _refuse_without_arrays(content)
    taken = averaged[0] if prefer_ema and averaged else found[0]
    notes = [f"took the weights under {taken}"]
    if taken in averaged:
        notes[0] += ", a moving average"
    elif averaged:
        notes.append(
            f"left out the moving average under {averaged[0]}, though it may be what was evaluated"
            if "message_hub" not in content
            else f"left out {averaged[0]}: mmengine keeps the average under state_dict and the "
            "last weights there"
        )
    beside = [name for name in content if name != taken and name not in averaged]
    if beside:
        notes.append(f"not read, beside the weights: {name_some(map(_key, beside))}")
    weights = wrapped[taken]
    assert weights is not None
    return dict(weights), notes


def _refuse_without_arrays(content: dict[Any, Any]) -> NoReturn:
    wrapped = [content.get(name) for name in (*WRAPPERS, *EMA_WRAPPERS)]
    objects = [
        f"{short(name) if isinstance(name, str) else _kind_of(name)} ({_kind_of(value)})"
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
        f"{join_some(objects or keys, between=', ') or 'nothing'}{cure}"
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


def _array(value: Any) -> Tensor | PickledArray | None:
    """The array of a value; Paddle has some as (internal name, array)."""
    is_array = isinstance(value, Tensor | PickledArray)
    if not is_array and type(value) in (tuple, list) and len(value) == 2:
        value = value[1] if isinstance(value[0], str) else None
    return value if isinstance(value, Tensor | PickledArray) else None


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
        raise WeightsFileError(f"{PADDLE_SLICES}, Paddle's table of slices, is damaged")
    return plan


def _key(name: Any) -> str:
    return name if isinstance(name, str) else f"a key of type {type(name).__name__}"


def _kind_of(value: Any) -> str:
    if isinstance(value, Foreign | Name):
        return f"an object of {short(value.path)}"
    if isinstance(value, Tensor | PickledArray):
        return "a single array"
    return type(value).__name__
