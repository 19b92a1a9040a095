"""The writer of FastInst: pixel decoder, proposed queries, dual-path layers, the best pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sparseinst_jax.export.blocks import (
    affine,
    array,
    conv_relu,
    convolution,
    enlarged,
    layer_norm,
    linear,
    pyramid_pooling,
    relu,
    resized,
    tokens,
    within,
)
from sparseinst_jax.export.graph import Graph
from sparseinst_jax.models.fastinst import model

STRIDE, PROPOSAL_STRIDE = model.MASK_STRIDE, model.PROPOSAL_STRIDE
UNSEEN = np.float32(-1e30)  # a logit that softmax makes 0


def num_masks(module: model.FastInst) -> int:
    """N; fewer of an image that has fewer places of stride 16."""
    return module.decoder.num_queries


def write(
    g: Graph, module: model.FastInst, maps: Any, options: Mapping[str, Any]
) -> dict[str, str]:
    """Write everything after the backbone.

    Args:
      g: the graph.
      module: the network.
      maps: the backbone's, strides 8, 16 and 32.
      options: of `models.fastinst.inference.select`.

    Returns:
      Names of the outputs to names of results.
    """
    y3, y4 = within(g, _pixel_decoder, module, "pixel_decoder", *maps)
    class_logits, mask_logits = within(g, _decoder, module, "decoder", y3, y4)
    with g.scope("scores"):
        found = _select(g, module.decoder, class_logits, options)
    return {**found, "mask_logits": mask_logits}


def _pixel_decoder(g: Graph, module: Any, res3: str, res4: str, res5: str) -> tuple[str, str]:
    def conv(path: str, x: str) -> str:
        return within(g, convolution, module, path, x)

    y5 = within(g, pyramid_pooling, module, "ppm", conv("laterals/2", res5), model.STRIDE)
    y5 = relu(g, conv("outputs/2", y5))
    y4 = g.add("Add", conv("laterals/1", res4), enlarged(g, y5, 2))
    y4 = relu(g, conv("outputs/1", y4))
    y3 = g.add("Add", conv("laterals/0", res3), enlarged(g, y4, 2))
    return relu(g, conv("outputs/0", y3)), y4


def _proposal_scores(g: Graph, module: Any, y4: str) -> str:
    """`model.proposal_scores` of the map of stride 16: [B, h * w]."""
    x = within(g, conv_relu, module, "conv", y4)
    logits = within(g, convolution, module, "classify", x)
    number = module.classify.kernel.shape[-1] - 1
    probs = g.add("Slice", g.add("Softmax", logits, axis=1), [0], [number], [1])
    largest = g.add("ReduceMax", probs, [1], keepdims=1)  # [B, 1, h, w]
    label = g.add("ArgMax", probs, axis=1, keepdims=1)
    is_best = g.add("Equal", label, np.arange(number).reshape(1, -1, 1, 1))
    best = g.add("Where", is_best, largest, 0.0)  # in the channel of each pixel's class
    around = g.add("MaxPool", best, kernel_shape=[3, 3], strides=[1, 1], pads=[1] * 4)
    around = g.add("ReduceSum", g.add("Where", is_best, around, 0.0), [1], keepdims=1)
    is_peak = g.add(
        "And",
        g.add("GreaterOrEqual", largest, around),
        g.add("GreaterOrEqual", largest, float(model.PEAK_FLOOR)),
    )
    return g.reshape(g.add("Add", largest, g.as_float(is_peak)), 0, -1)


def _propose(g: Graph, module: Any, y4: str, channels: int) -> tuple[str, str]:
    """Features and positions of the queries: [B, N, C] both."""
    with g.scope("proposal"):
        scores = _proposal_scores(g, module.proposal, y4)
        _, index = g.add_several(
            "TopK", scores, _least(g, module.num_queries, g.pixels(PROPOSAL_STRIDE)), number=2
        )
    features = g.add(
        "GatherND", tokens(g, y4, channels), g.add("Unsqueeze", index, [2]), batch_dims=1
    )
    places = g.add("Squeeze", _positions(g, module, channels, PROPOSAL_STRIDE), [0])
    return features, g.add("Gather", places, index, axis=0)


def _least(g: Graph, number: int, available: int | str) -> Any:
    if isinstance(available, int):
        return np.array([min(number, available)], np.int64)
    return g.add("Min", available, np.array([number], np.int64))


def _positions(g: Graph, module: Any, channels: int, stride: int) -> str:
    """The learned map at the size of a stride: [1, h * w, C]."""
    learned = g.constant(array(module.positions).transpose(0, 3, 1, 2), "positions")
    return tokens(g, resized(g, learned, channels, stride), channels)


def _decoder(g: Graph, module: Any, y3: str, y4: str) -> tuple[str, str]:
    channels = module.positions.shape[-1]
    features, positions = _propose(g, module, y4, channels)
    number = module.num_auxiliary
    extra = []
    for name in ("auxiliary_features", "auxiliary_positions"):
        one = array(getattr(module, name))[None]
        extra.append(g.add("Expand", one, g.vector(g.batch, number, channels)))
    queries = g.add("Concat", features, extra[0], axis=1)
    query_positions = g.add("Concat", positions, extra[1], axis=1)
    pixels, pixel_positions = tokens(g, y3, channels), _positions(g, module, channels, STRIDE)
    class_logits, mask_logits = "", ""
    for i in range(len(module.layers) + 1):
        if i > 0:
            is_seen = _seen_pixels(g, mask_logits, number)
            paths = (queries, query_positions), (pixels, pixel_positions)
            queries, pixels = within(g, _layer, module, f"layers/{i - 1}", *paths, is_seen)
        with g.scope(f"heads/{i}"):
            is_last = i == len(module.layers)
            predicting = g.add("Slice", queries, [0], [-number], [1])
            class_logits, mask_logits = _head(g, module.heads[i], predicting, pixels, is_last)
    return class_logits, g.reshape(mask_logits, 0, 0, *g.sides(STRIDE))


def _seen_pixels(g: Graph, mask_logits: str, num_auxiliary: int) -> str:
    """`model.seen_pixels` of logits [B, N, P]: bool [B, 1, N+A, P]."""
    is_seen = g.as_float(g.add("GreaterOrEqual", mask_logits, 0.0))
    is_blind = g.add("Equal", g.add("ReduceMax", is_seen, [2], keepdims=1), 0.0)
    is_seen = g.add("Or", g.add("Greater", is_seen, 0.0), is_blind)
    shape = g.vector(g.batch, num_auxiliary, g.pixels(STRIDE))
    all_seen = g.add("Expand", np.ones((1, 1, 1), bool), shape)
    return g.add("Unsqueeze", g.add("Concat", is_seen, all_seen, axis=1), [1])


def _layer(
    g: Graph, module: Any, queries: tuple[str, str], pixels: tuple[str, str], is_seen: str
) -> tuple[str, str]:
    """Update both paths; each comes with its positions."""

    def attend(name: str, x: str, *others: Any) -> str:
        return within(g, _attention, module, name, x, *others)

    (query, query_place), (pixel, pixel_place) = queries, pixels
    placed = g.add("Add", query, query_place)
    pixel = attend("pixel_cross", pixel, g.add("Add", pixel, pixel_place), placed, query)
    pixel = within(g, _feed_forward, module, "pixel_ffn", pixel)
    pixel_key = g.add("Add", pixel, pixel_place)
    query = attend("query_cross", query, placed, pixel_key, pixel, is_seen)
    placed = g.add("Add", query, query_place)
    query = attend("query_self", query, placed, placed, query)
    return within(g, _feed_forward, module, "query_ffn", query), pixel


def _attention(
    g: Graph, module: Any, x: str, query: str, key: str, value: str, is_seen: str | None = None
) -> str:
    """Multi-head attention, added to x and normalised."""
    kernels = np.split(array(module.in_proj_kernel), 3, axis=1)
    biases, heads = np.split(array(module.in_proj_bias), 3), module.num_heads
    channels = kernels[0].shape[0]
    width = channels // heads
    q, k, v = (
        g.reshape(affine(g, each, kernel, bias), 0, -1, heads, width)
        for each, kernel, bias in zip((query, key, value), kernels, biases, strict=True)
    )
    q, k, v = g.transpose(q, 0, 2, 1, 3), g.transpose(k, 0, 2, 3, 1), g.transpose(v, 0, 2, 1, 3)
    logits = g.add("Mul", g.add("MatMul", q, k), width**-0.5)
    logits = logits if is_seen is None else g.add("Where", is_seen, logits, UNSEEN)
    mixed = g.add("MatMul", g.add("Softmax", logits, axis=-1), v)
    mixed = g.reshape(g.transpose(mixed, 0, 2, 1, 3), 0, -1, channels)
    mixed = within(g, linear, module, "out_proj", mixed)
    return layer_norm(g, module.norm, g.add("Add", x, mixed))


def _feed_forward(g: Graph, module: Any, x: str) -> str:
    y = linear(g, module.linear2, relu(g, linear(g, module.linear1, x)))
    return layer_norm(g, module.norm, g.add("Add", x, y))


def _head(g: Graph, module: Any, queries: str, pixels: str, classifies: bool) -> tuple[str, str]:
    """Class logits [B, N, K+1], where asked for, and mask logits [B, N, P]."""
    queries = layer_norm(g, module.norm, queries)
    features = g.transpose(linear(g, module.features, pixels), 0, 2, 1)
    mask_logits = g.add("MatMul", _perceptron(g, module.masks, queries), features)
    return _perceptron(g, module.classes, queries) if classifies else "", mask_logits


def _perceptron(g: Graph, linears: Any, x: str) -> str:
    *hidden, last = linears
    for each in hidden:
        x = relu(g, linear(g, each, x))
    return linear(g, last, x)


def _select(g: Graph, module: Any, class_logits: str, options: Mapping[str, Any]) -> dict[str, str]:
    """`models.fastinst.inference.select`."""
    number = module.heads[-1].classes[-1].kernel.shape[-1] - 1
    probs = g.add("Softmax", class_logits, axis=-1)
    pairs = g.reshape(g.add("Slice", probs, [0], [number], [2]), 0, -1)
    available: int | str = g.add("Shape", pairs, start=1, end=2)
    if g.size is not None:
        places = g.size[0] * g.size[1] // PROPOSAL_STRIDE**2
        available = min(module.num_queries, places) * number
    count = _least(g, options["num_detections"], available)
    scores, index = g.add_several("TopK", pairs, count, number=2)
    classes = np.int64(number)
    return {
        "scores": scores,
        "labels": g.add("Mod", index, classes),
        "query_index": g.add("Div", index, classes),
        "is_kept": g.add("Greater", scores, float(options["score_threshold"])),
    }
