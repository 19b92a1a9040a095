"""The writer of SparseInst: encoder, decoder and the scores of every query."""

from __future__ import annotations

from typing import Any

from sparseinst_jax.export.blocks import (
    array,
    conv_relu,
    convolution,
    coordinates,
    enlarged,
    enlarged_nearest,
    linear,
    pyramid_pooling,
    relu,
    sigmoid,
    tokens,
    within,
)
from sparseinst_jax.export.graph import Graph
from sparseinst_jax.models.sparseinst import inference, model

STRIDE = model.MAP_STRIDE


def num_masks(module: model.SparseInst) -> int:
    """N."""
    return module.decoder.inst_branch.num_masks


def write(g: Graph, module: model.SparseInst, maps: Any, options: dict[str, Any]) -> dict[str, str]:
    """Write everything after the backbone.

    Args:
      g: the graph.
      module: the network.
      maps: the backbone's, strides 8, 16 and 32.
      options: of `models.sparseinst.inference.select`.

    Returns:
      Names of the outputs to names of results.
    """
    encoded = within(g, _encoder, module, "encoder", *maps)
    with g.scope("decoder"):
        seen = None
        if module.class_from_backbone:
            seen = g.add("Concat", maps[0], enlarged_nearest(g, maps[1]), axis=1)
        class_logits, mask_logits, objectness = _decoder(g, module.decoder, encoded, seen)
    with g.scope("scores"):
        return _select(g, class_logits, mask_logits, objectness, options)


def _encoder(g: Graph, module: Any, res3: str, res4: str, res5: str) -> str:
    def conv(path: str, x: str) -> str:
        return within(g, convolution, module, path, x)

    p5 = within(g, pyramid_pooling, module, "ppm", conv("fpn_laterals/0", res5), model.STRIDE)
    p4 = g.add("Add", conv("fpn_laterals/1", res4), enlarged_nearest(g, p5))
    p3 = g.add("Add", conv("fpn_laterals/2", res3), enlarged_nearest(g, p4))
    levels = [
        enlarged(g, conv(f"fpn_outputs/{i}", level), factor)
        for i, (level, factor) in enumerate(((p5, 4), (p4, 2), (p3, 1)))
    ]
    with g.scope("fusion"):
        return convolution(g, module.fusion, g.add("Concat", *levels[::-1], axis=1))


def _decoder(g: Graph, module: Any, encoded: str, seen: str | None) -> tuple[str, str, str]:
    placed = g.add("Concat", coordinates(g, STRIDE), encoded, axis=1)
    class_logits, kernels, objectness = within(g, _instances, module, "inst_branch", placed)
    with g.scope("mask_branch"):
        branch = module.mask_branch
        features = within(g, _stack, branch, "mask_convs", placed)
        features = within(g, convolution, branch, "projection", features)
        features = g.reshape(features, 0, branch.projection.kernel.shape[-1], -1)  # [B, D, h * w]
    masks = g.add("MatMul", kernels, features)
    if seen is not None:
        with g.scope("cls_backbone"):
            described = _under_masks(g, seen, module.cls_backbone.kernel.shape[0], masks)
            described = linear(g, module.cls_backbone, described)
        class_logits = g.add("Add", class_logits, described)
    masks = g.reshape(masks, 0, module.inst_branch.num_masks, *g.sides(STRIDE))
    return class_logits, enlarged(g, masks, STRIDE // model.MASK_STRIDE), objectness


def _under_masks(g: Graph, features: str, channels: int, mask_logits: str) -> str:
    """`models.sparseinst.model._under_masks`, of masks [B, N, h * w]."""
    mask = sigmoid(g, mask_logits)
    total = g.add("ReduceSum", mask, [2], keepdims=1)
    sums = g.add("MatMul", mask, tokens(g, features, channels))
    means = g.add("Div", sums, g.add("Add", total, float(model.EPSILON)))
    square = g.add("ReduceMean", g.add("Mul", means, means), [2], keepdims=1)
    return g.add("Div", means, g.add("Sqrt", g.add("Add", square, float(model.EPSILON))))


def _stack(g: Graph, convs: Any, x: str) -> str:
    for i in range(len(convs)):
        x = within(g, conv_relu, convs, str(i), x)
    return x


def _instances(g: Graph, module: Any, placed: str) -> tuple[str, str, str]:
    features = within(g, _stack, module, "inst_convs", placed)
    logits = within(g, convolution, module, "iam_conv", features)
    groups, number = module.num_groups, module.num_masks
    channels = module.iam_conv.kernel.shape[2] * groups
    logits = g.reshape(logits, 0, groups * number, -1)  # [B, G * N, h * w]
    if module.normalizer == "softmax":
        logits = g.add("Add", logits, array(module.softmax_bias))
        weight = g.add("Exp", g.add("Sub", logits, g.add("ReduceMax", logits, [2], keepdims=1)))
    else:
        weight = sigmoid(g, logits)
    total = g.add("ReduceSum", weight, [2], keepdims=1)
    total = g.add("Max", total, float(model.NORMALIZER_FLOOR))
    pooled = g.add("Div", g.add("MatMul", weight, tokens(g, features, channels)), total)
    if groups > 1:
        pooled = g.transpose(g.reshape(pooled, 0, groups, number, channels), 0, 2, 1, 3)
        pooled = g.reshape(pooled, 0, number, groups * channels)
        with g.scope("fc"):
            pooled = relu(g, linear(g, module.fc, pooled))
    scores, kernels, objectness = (
        within(g, linear, module, name, pooled)
        for name in ("cls_score", "mask_kernel", "objectness")
    )
    return scores, kernels, objectness


def _select(
    g: Graph, class_logits: str, mask_logits: str, objectness: str, options: dict[str, Any]
) -> dict[str, str]:
    """`models.sparseinst.inference.select`."""
    best = g.add(
        "Sqrt", g.add("Mul", sigmoid(g, class_logits), sigmoid(g, objectness))
    )  # [B, N, K]
    labels = g.add("ArgMax", best, axis=2, keepdims=0)
    scores = g.add("ReduceMax", best, [2], keepdims=0)
    mask_probs = g.add("Sigmoid", mask_logits)
    inside = g.add("Greater", mask_probs, float(options["mask_threshold"]))
    area = g.add("ReduceSum", g.as_float(inside), [2, 3], keepdims=0)
    total = g.add("ReduceSum", g.add("Where", inside, mask_probs, 0.0), [2, 3], keepdims=0)
    maskness = g.add("Div", total, g.add("Add", area, inference.MASKNESS_EPSILON))
    return {
        "scores": g.add("Mul", scores, maskness),
        "labels": labels,
        "is_kept": g.add("Greater", scores, float(options["score_threshold"])),
        "mask_probs": mask_probs,
    }
