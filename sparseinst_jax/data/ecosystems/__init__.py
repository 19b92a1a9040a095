"""The rules of other implementations, by the names that a configuration gives.

Each is followed to reproduce the published numbers of that implementation, for nothing else. The
rest of the package knows `data.rules` and names no product.
"""

from collections.abc import Mapping
from typing import TypeVar

from sparseinst_jax.data.ecosystems import mmdetection, paddledetection
from sparseinst_jax.data.rules import (
    ORIGINAL_FILTER,
    ORIGINAL_PROTOCOL,
    ORIGINAL_RESIZE,
    AnnotationFilter,
    EvalProtocol,
    ResizeRule,
)

DEFAULT_RULES = "detectron2"  # which the original trains with
FILTERS = {
    DEFAULT_RULES: ORIGINAL_FILTER,
    "paddledetection": paddledetection.FILTER,
    "mmdetection": mmdetection.FILTER,
}
RESIZE_RULES = {
    DEFAULT_RULES: ORIGINAL_RESIZE,
    "paddledetection": paddledetection.RESIZE,
    "mmdetection": mmdetection.RESIZE,
}
PROTOCOLS = {"original": ORIGINAL_PROTOCOL, "paddledetection": paddledetection.PROTOCOL}
_Rule = TypeVar("_Rule")


def find_filter(name: str) -> AnnotationFilter:
    """Find what is learned by `config.data.annotation_filter`, or raise a ValueError."""
    return _find(FILTERS, name, "config.data.annotation_filter")


def find_resize_rule(name: str) -> ResizeRule:
    """Find the rule of `config.data.resize_rule`, or raise a ValueError."""
    return _find(RESIZE_RULES, name, "config.data.resize_rule")


def find_protocol(name: str) -> EvalProtocol:
    """Find the protocol of `config.eval.protocol`, or raise a ValueError."""
    return _find(PROTOCOLS, name, "config.eval.protocol")


def _find(rules: Mapping[str, _Rule], name: str, option: str) -> _Rule:
    if name not in rules:
        raise ValueError(f"{option} must be one of {', '.join(rules)}, got {name!r}")
    return rules[name]
