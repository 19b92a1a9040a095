"""What an exported file says of itself: one strict JSON under one key of its metadata.

The graph of an ONNX file:

    images      uint8 [B, H, W, 3]    RGB, resized; anything in the padding, which the graph clears
    valid_size  int64 [B, 2]          (height, width) of the resized image inside H and W
    scores      float32 [B, D]        candidates, in the order of the queries; without sorting D = N
    labels      int64 [B, D]          0...K-1, an index into `class_names`
    is_kept     bool [B, D]           which candidates are results
    mask_probs  float32 [B, N, H/S, W/S]  masks at `mask_stride` S over the padded image

Where `masks_are_logits` (FastInst) the last one is called `mask_logits`, and there is one more,
`query_index` int64 [B, D]: the mask of each candidate. Elsewhere candidate n has mask n. With
`scores_at_original_size` a score is still to be multiplied by the mean probability inside the mask,
where that has the size of the photo.

A photo [h, w] is resized so that its short side has `shortest_side` pixels, or where its long side
would pass `longest_side`, the long one that: in float64, each side int(x + 0.5) at the end, at
least 1; see `data.transforms.resized_size`. A photo of that size already is taken as it is. Where
there is a `fixed_size` [H, W] and the result does not fit into it, the photo is resized by
min(H / h, W / w) instead, rounded in the same way.

H and W are multiples of `size_multiple`, or `fixed_size`. To the photo's size a mask goes by two
bilinear resizes without antialiasing (half-pixel centres): times S, crop to `valid_size`, then to
the photo's size; logits become probabilities there; a pixel belongs to it above `mask_threshold`.

The JSON, under the key `sparseinst_jax` of `metadata_props`:

    {
      "schema": 1,
      "version": "0.1.0",                      of this package
      "family": "sparseinst",                  or "fastinst"
      "precision": "float32",                  or "int8"
      "class_names": ["person", ...],          K of them
      "category_ids": [1, 2, null, ...],       the data set's; null for a class that is left out
      "shortest_side": 640,                    resize: the short side gets this length, but the
      "longest_side": 853,                     long one at most that; both at least 1
      "resize": "pillow_bilinear",             Pillow's antialiased bilinear; "other": by `protocol`
      "protocol": "original",                  `config.eval.protocol`, the test procedure
      "size_multiple": 32,
      "fixed_size": null,                      or [H, W]: the only size that the graph takes
      "num_masks": 100,                        N
      "mask_stride": 4,                        S
      "score_threshold": 0.005,                in the graph already: `is_kept`
      "mask_threshold": 0.45,
      "masks_are_logits": false,
      "scores_at_original_size": false,
      "config": {"model": {...}, ...},         the whole configuration
      "weights_sha256": "9f...",               of the parameters, see `export.weights_sha256`
      "verification": {"passed": true, ...}    what was compared with the model; or null
    }

A reader ignores keys that it does not know; another `schema` is another layout.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from sparseinst_jax.runtime.messages import brief

KEY = "sparseinst_jax"
SCHEMA = 1
SIZE_MULTIPLE = 32
PILLOW_BILINEAR = "pillow_bilinear"
# Far above what any network has; a file that came from elsewhere may say anything.
MAX_BYTES, MAX_CLASSES, MAX_SIDE, MAX_MASKS = 1 << 22, 1 << 16, 1 << 14, 1 << 16


class Metadata(NamedTuple):
    """The JSON of a file, see the module."""

    version: str
    family: str
    precision: str
    class_names: tuple[str, ...]
    category_ids: tuple[int | None, ...]
    shortest_side: int
    longest_side: int
    resize: str
    protocol: str
    size_multiple: int
    fixed_size: tuple[int, int] | None
    num_masks: int
    mask_stride: int
    score_threshold: float
    mask_threshold: float
    masks_are_logits: bool
    scores_at_original_size: bool
    config: Mapping[str, Any]
    weights_sha256: str
    verification: Mapping[str, Any] | None

    def to_json(self) -> str:
        """Write it as one line of strict JSON: no NaN, no infinity."""
        plain = {"schema": SCHEMA, **self._asdict()}
        return json.dumps(plain, allow_nan=False, ensure_ascii=False)


def from_json(text: str, path: Any) -> Metadata:
    """Read the JSON of a file that may come from anywhere.

    Args:
      text: the value under `KEY`.
      path: of the file, for messages.

    Raises:
      ValueError: it is too long or no JSON, of another schema, or holds values of another type or
        beyond bounds; all faults in one message.
    """
    cure = "export it again with `sparseinst export`"
    if len(text) > MAX_BYTES:
        raise ValueError(f"{path}: its metadata has {len(text)} characters, too many; {cure}")
    try:
        plain = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its metadata is not a JSON ({brief(error)}); {cure}") from None
    if not isinstance(plain, dict):
        raise ValueError(f"{path}: its metadata is no JSON object, got {brief(plain)}; {cure}")
    if plain.get("schema") != SCHEMA:
        raise ValueError(
            f"{path}: its metadata has the schema {brief(plain.get('schema'))}, this version of the"
            f" package reads {SCHEMA}; {cure}, or install the version that wrote it"
            f" ({brief(plain.get('version'))})"
        )
    faults = [
        f"{key}: expected {expected}, got {brief(plain.get(key))}"
        for key, (expected, is_valid) in _RULES.items()
        if not is_valid(plain.get(key))
    ]
    if not faults and len(plain["class_names"]) != len(plain["category_ids"]):
        faults = ["class_names and category_ids: expected as many of one as of the other"]
    if faults:
        raise ValueError(f"{path}: its metadata is not valid; {cure}:\n  " + "\n  ".join(faults))
    values = {key: plain[key] for key in Metadata._fields}
    for key in ("class_names", "category_ids", "fixed_size"):
        values[key] = None if values[key] is None else tuple(values[key])
    return Metadata(**values)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _is_int(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _is_fraction(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and 0 <= value <= 1


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 1000


def _is_list(value: Any, is_valid: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) <= MAX_CLASSES and all(map(is_valid, value))


def _is_size(value: Any) -> bool:
    def is_side(side: Any) -> bool:
        return _is_int(side, SIZE_MULTIPLE, MAX_SIDE) and side % SIZE_MULTIPLE == 0

    return value is None or (
        isinstance(value, list) and len(value) == 2 and all(map(is_side, value))
    )


def _is_id(value: Any) -> bool:
    return value is None or _is_int(value, -(2**63), 2**63 - 1)


def _whole(most: int) -> tuple[str, Any]:
    return f"a whole number of 1 to {most}", lambda value: _is_int(value, 1, most)


_TEXT = ("a text", _is_text)
_FRACTION = ("a number of 0 to 1", _is_fraction)
_TRUTH = ("true or false", lambda value: isinstance(value, bool))
_RULES: dict[str, tuple[str, Any]] = {
    "version": _TEXT,
    "family": _TEXT,
    "precision": _TEXT,
    "class_names": ("a list of texts", lambda value: _is_list(value, _is_text)),
    "category_ids": ("a list of whole numbers and nulls", lambda value: _is_list(value, _is_id)),
    "shortest_side": _whole(MAX_SIDE),
    "longest_side": _whole(MAX_SIDE),
    "resize": _TEXT,
    "protocol": _TEXT,
    "size_multiple": (f"{SIZE_MULTIPLE}", lambda value: value == SIZE_MULTIPLE),
    "fixed_size": (f"null or two multiples of {SIZE_MULTIPLE}", _is_size),
    "num_masks": _whole(MAX_MASKS),
    "mask_stride": _whole(SIZE_MULTIPLE),
    "score_threshold": _FRACTION,
    "mask_threshold": _FRACTION,
    "masks_are_logits": _TRUTH,
    "scores_at_original_size": _TRUTH,
    "config": ("an object", lambda value: isinstance(value, dict)),
    "weights_sha256": _TEXT,
    "verification": ("an object or null", lambda value: isinstance(value, dict | None)),
}
