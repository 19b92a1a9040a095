"""One writer for each building block of `models.layers`, and operations of `models.ops`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from sparseinst_jax.export.graph import Graph
from sparseinst_jax.models import forms, layers
from sparseinst_jax.models.ops import PIXEL_MEAN, PIXEL_STD

Write = Callable[..., Any]
COORDINATES = "coordinates"  # in the name of what makes them, which int8 leaves alone


def array(variable: Any) -> np.ndarray:
    """The float32 numbers of a variable."""
    return np.asarray(variable[...], np.float32)


def column(values: np.ndarray) -> np.ndarray:
    """Numbers of the channels, [C], for maps [B, C, h, w]."""
    return values.reshape(-1, 1, 1)


def within(g: Graph, write: Write, module: Any, path: str, *inputs: Any) -> Any:
    """Write a part of a module, its nodes named after its path there: "fc", "laterals/0"."""
    part = module
    for step in path.split("/"):
        part = part[int(step)] if step.isdecimal() else getattr(part, step)
    with g.scope(path):
        return write(g, part, *inputs)


def normalized_images(g: Graph) -> str:
    """`ops.normalize_images`: uint8 [B, H, W, 3] to float32 [B, 3, H, W], 0 in the padding."""
    x = g.transpose(g.as_float("images"), 0, 3, 1, 2)
    x = g.add("Div", g.add("Sub", x, column(PIXEL_MEAN)), column(PIXEL_STD))
    valid = g.as_float("valid_size")  # [B, 2]
    inside = []
    for axis in (0, 1):
        side = g.add("Slice", valid, [axis], [axis + 1], [1])  # [B, 1]
        inside.append(g.add("Less", g.places(axis, 1), side))
    rows, columns = (
        g.add("Unsqueeze", mask, axes) for mask, axes in zip(inside, ([1, 3], [1, 2]), strict=True)
    )
    return g.add("Where", g.add("And", rows, columns), x, 0.0)


def relu(g: Graph, x: str) -> str:
    """max(x, 0)."""
    return g.add("Relu", x)


def relu6(g: Graph, x: str) -> str:
    """min(max(x, 0), 6)."""
    return g.add("Clip", x, 0.0, 6.0)


def sigmoid(g: Graph, x: str) -> str:
    """1 / (1 + exp(-x)), relatively accurate.

    The `Sigmoid` of onnxruntime is accurate absolutely only: 7 % off at -14, 0 below -18.
    Activation maps are divided by their sum, and scores are roots.
    """
    return g.add("Reciprocal", g.add("Add", g.add("Exp", g.add("Neg", x)), 1.0))


def gelu(g: Graph, x: str) -> str:
    """`ops.gelu`."""
    error = g.add("Erf", g.add("Mul", x, np.sqrt(0.5)))
    return g.add("Mul", g.add("Mul", x, 0.5), g.add("Add", error, 1.0))


def enlarged(g: Graph, x: str, factor: int) -> str:
    """A map made `factor` times as large, bilinear."""
    if factor == 1:
        return x
    scales = np.array([1, 1, factor, factor], np.float32)
    return g.add("Resize", x, None, scales, mode="linear")


def enlarged_nearest(g: Graph, x: str) -> str:
    """`ops.upsample_nearest_x2`."""
    scales = np.array([1, 1, 2, 2], np.float32)
    modes = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return g.add("Resize", x, None, scales, mode="nearest", **modes)


def resized(g: Graph, x: str, channels: int, stride: int) -> str:
    """A map [B, C, ., .] at the size of a stride, bilinear; [1, C, ., .] where x is a constant."""
    batch = 1 if x in g.constants else g.batch
    sizes = g.vector(batch, channels, *g.sides(stride))
    return g.add("Resize", x, None, None, sizes, mode="linear")


def pooled(g: Graph, x: str, stride: int, target: int) -> str:
    """`ops.adaptive_average_pool` of the map of a stride: [B, C, target, target]."""
    rows = g.pooling_matrix(0, stride, target)
    columns = g.transpose(g.pooling_matrix(1, stride, target), 1, 0)
    return g.add("MatMul", g.add("MatMul", rows, x), columns)


def tokens(g: Graph, x: str, channels: int) -> str:
    """[B, C, h, w] to [B, h * w, C]."""
    return g.transpose(g.reshape(x, 0, channels, -1), 0, 2, 1)


def as_map(g: Graph, x: str, channels: int, stride: int) -> str:
    """[B, h * w, C] to [B, C, h, w] of a stride."""
    return g.reshape(g.transpose(x, 0, 2, 1), 0, channels, *g.sides(stride))


def coordinates(g: Graph, stride: int) -> str:
    """`ops.coordinates`: [B, 2, h, w], x then y, each from -1 to 1."""
    planes = []
    for axis, shape in ((1, (1, 1, 1, -1)), (0, (1, 1, -1, 1))):
        places = g.add("Mul", g.places(axis, stride), 2.0)
        places = g.add("Sub", g.add("Div", places, g.last_place(axis, stride)), 1.0)
        plane = g.reshape(places, *shape)
        planes.append(g.add("Expand", plane, g.vector(g.batch, 1, *g.sides(stride))))
    with g.scope(COORDINATES):
        return g.add("Concat", *planes, axis=1)


def convolution(g: Graph, module: layers.Conv, x: str, norm: Any = None) -> str:
    """A convolution, then its norm (or one that follows it)."""
    kernel = array(module.kernel)
    bias = array(module.bias) if module.has_bias else np.zeros(kernel.shape[-1], np.float32)
    norm = module.norm if norm is None and module.has_norm else norm
    if isinstance(norm, layers.FrozenBatchNorm | layers.BatchNorm):
        scale, shift = factors(norm)
        kernel, bias = kernel * scale, bias * scale + shift
    # Sizes are multiples of 32, and all even sizes are padded alike.
    before, behind = forms.borders(2, module.kernel_size, module.stride, module.same)
    y = g.add(
        "Conv",
        x,
        g.constant(kernel.transpose(3, 2, 0, 1), "kernel"),
        g.constant(bias, "bias"),
        kernel_shape=[module.kernel_size] * 2,
        strides=[module.stride] * 2,
        pads=[before, before, behind, behind],
        group=module.groups,
    )
    if isinstance(norm, layers.GroupNorm):
        with g.scope("norm"):
            return group_norm(g, norm, y)
    return y


def conv_relu(g: Graph, module: layers.Conv, x: str) -> str:
    """A convolution, its norm, and the positive part."""
    return relu(g, convolution(g, module, x))


def conv_relu6(g: Graph, module: layers.Conv, x: str) -> str:
    """The same, and at most 6."""
    return relu6(g, convolution(g, module, x))


def factors(norm: layers.FrozenBatchNorm | layers.BatchNorm) -> tuple[np.ndarray, np.ndarray]:
    """What evaluation multiplies by and adds then, float32 [C]; see `factors` of the norms."""
    root = np.sqrt(array(norm.var) + np.float32(norm.epsilon))
    scale = array(norm.scale) / root
    return scale, array(norm.bias) - array(norm.mean) * scale


def group_norm(g: Graph, module: layers.GroupNorm, x: str) -> str:
    """Instance norm over the groups, then scale and bias of each channel."""
    ones, zeros = np.ones(module.groups, np.float32), np.zeros(module.groups, np.float32)
    shape = g.add("Shape", x)
    y = g.reshape(x, 0, module.groups, -1)
    y = g.add("InstanceNormalization", y, ones, zeros, epsilon=module.epsilon)
    y = g.add("Reshape", y, shape)
    return g.add("Add", g.add("Mul", y, column(array(module.scale))), column(array(module.bias)))


def layer_norm(g: Graph, module: layers.LayerNorm, x: str) -> str:
    """Over the last axis."""
    scale, bias = array(module.scale), array(module.bias)
    return g.add("LayerNormalization", x, scale, bias, axis=-1, epsilon=module.epsilon)


def linear(g: Graph, module: layers.Linear, x: str) -> str:
    """Over the last axis."""
    return affine(g, x, array(module.kernel), array(module.bias))


def affine(g: Graph, x: str, kernel: np.ndarray, bias: np.ndarray) -> str:
    """X @ kernel + bias."""
    return g.add("Add", g.add("MatMul", x, g.constant(kernel, "kernel")), g.constant(bias, "bias"))


def pyramid_pooling(g: Graph, module: layers.PyramidPooling, x: str, stride: int) -> str:
    """Means over four grids of windows, projected, enlarged and joined with the input."""
    parts = []
    for i, (stage, size) in enumerate(zip(module.stages, layers.POOL_SIZES, strict=True)):
        with g.scope(f"stages/{i}"):
            y = conv_relu(g, stage, pooled(g, x, stride, size))
            parts.append(resized(g, y, array(stage.kernel).shape[-1], stride))
    with g.scope("bottleneck"):
        return conv_relu(g, module.bottleneck, g.add("Concat", *parts, x, axis=1))
