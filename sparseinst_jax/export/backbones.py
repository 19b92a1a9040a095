"""One writer for each backbone: from normalised images to the maps of strides 8, 16 and 32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from sparseinst_jax.export.blocks import (
    affine,
    array,
    as_map,
    column,
    conv_relu,
    conv_relu6,
    convolution,
    factors,
    gelu,
    group_norm,
    layer_norm,
    linear,
    pooled,
    relu,
    tokens,
    within,
)
from sparseinst_jax.export.graph import Graph
from sparseinst_jax.models import layers
from sparseinst_jax.models.backbones import cspdarknet, deformable, efficientnet_lite, pvt, resnet

Maps = tuple[str, str, str]


def write_resnet(g: Graph, module: resnet.ResNet, x: str) -> Maps:
    """`models.backbones.resnet`."""
    with g.scope("stem"):
        is_deep = isinstance(module.stem, resnet.DeepStem)
        for name in ("conv1", "conv2", "conv3") if is_deep else ("conv1",):
            x = within(g, conv_relu, module.stem, name, x)
        x = g.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    maps = []
    for stage, name in enumerate(resnet.STAGES[1:]):
        for i in range(len(getattr(module, name))):
            x = within(g, _bottleneck, module, f"{name}/{i}", x, 4 * 2**stage)
        maps.append(x)
    return maps[1], maps[2], maps[3]


def _bottleneck(g: Graph, block: resnet.Bottleneck, x: str, stride: int) -> str:
    y = relu(g, within(g, convolution, block, "conv1", x))
    if isinstance(block.conv2, deformable.DeformableConv):
        places = within(g, convolution, block, "conv2_offset", y)
        y = within(g, _deformable, block, "conv2", y, places, block.conv2_offset, stride)
    else:
        y = within(g, convolution, block, "conv2", y)
    y = within(g, convolution, block, "conv3", relu(g, y))
    if block.is_pooled:
        x = g.add("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = within(g, convolution, block, "shortcut", x) if block.has_shortcut else x
    return relu(g, g.add("Add", y, x))


def _deformable(
    g: Graph, module: deformable.DeformableConv, x: str, places: str, offset: Any, stride: int
) -> str:
    """All taps in one `GridSample`, then a 1x1 convolution over taps and channels.

    Args:
      g: the graph.
      module: the convolution.
      x: [B, C, H, W].
      places: [B, 18 or 27, h, w], offsets and logits of the modulation.
      offset: the convolution that made them.
      stride: of the result's map, in pixels of the image.
    """
    taps, kernel = deformable.TAPS, array(module.kernel)  # [3, 3, C, O]
    channels, height, width = kernel.shape[2], *g.sides(stride)
    is_modulated = offset.kernel.shape[-1] == deformable.MODULATED_CHANNELS
    if is_modulated:
        sizes = np.array([deformable.OFFSET_CHANNELS, taps])
        places, weight = g.add_several("Split", places, sizes, number=2, axis=1)
    moves = g.reshape(places, 0, taps, 2, height, width)
    tap_rows, tap_columns = np.divmod(np.arange(taps), deformable.KERNEL_SIZE)
    grids = []
    for axis, (tap, shape) in enumerate(((tap_rows, (1, 1, -1, 1)), (tap_columns, (1, 1, 1, -1)))):
        start = g.reshape(g.add("Mul", g.places(axis, stride), float(module.stride)), *shape)
        start = g.add("Add", start, (tap - 1.0).reshape(1, taps, 1, 1))
        move = g.add("Gather", moves, np.int64(axis), axis=2)  # [B, taps, h, w]
        place = g.add("Add", move, start)
        # Pixel p of n is at (2 p + 1) / n - 1 where the corners of the map are at -1 and 1.
        side = g.side(axis, stride // module.stride)
        side = np.array([side], np.float32) if isinstance(side, int) else g.as_float(side)
        place = g.add("Div", g.add("Add", g.add("Mul", place, 2.0), 1.0), side)
        grids.append(g.add("Unsqueeze", g.add("Sub", place, 1.0), [4]))
    grid = g.add("Concat", *grids[::-1], axis=4)  # x, y
    grid = g.reshape(grid, 0, -1, width, 2)  # [B, taps * h, w, 2]
    modes = {"mode": "bilinear", "padding_mode": "zeros", "align_corners": 0}
    y = g.add("GridSample", x, grid, **modes)  # [B, C, taps * h, w]
    if is_modulated:
        # Relatively accurate is not asked for here: a weight near 0 is near 0.
        weight = g.reshape(g.add("Sigmoid", weight), 0, 1, -1, width)
        y = g.add("Mul", y, weight)
    y = g.reshape(y, 0, channels * taps, height, width)
    kernel = kernel.reshape(taps, channels, -1).transpose(2, 1, 0).reshape(-1, channels * taps)
    norm: Any = module.norm
    scale, shift = (
        (np.float32(1), np.zeros(len(kernel), np.float32))
        if isinstance(norm, layers.GroupNorm)
        else factors(norm)
    )
    kernel = (kernel * np.reshape(scale, (-1, 1)))[:, :, None, None]
    y = g.add("Conv", y, g.constant(kernel, "kernel"), g.constant(shift, "bias"))
    return group_norm(g, norm, y) if isinstance(norm, layers.GroupNorm) else y


def write_cspdarknet(g: Graph, module: cspdarknet.CSPDarkNet, x: str) -> Maps:
    """`models.backbones.cspdarknet`."""
    x, maps = within(g, _conv_norm, module, "stem/conv1", x), []
    for i in range(len(module.stages)):
        x = within(g, _dark_stage, module, f"stages/{i}", x)
        maps.append(x)
    return maps[2], maps[3], maps[4]


def _conv_norm(g: Graph, module: cspdarknet.ConvNorm, x: str) -> str:
    y = convolution(g, module.conv, x, module.bn)
    return g.add("LeakyRelu", y, alpha=cspdarknet.NEGATIVE_SLOPE)


def _dark_stage(g: Graph, stage: Any, x: str) -> str:
    x = within(g, _conv_norm, stage, "conv_down", x)
    is_crossed, bypass = isinstance(stage, cspdarknet.CrossStage), ""
    if is_crossed:
        x = within(g, _conv_norm, stage, "conv_exp", x)
        part = array(stage.conv_transition_b.conv.kernel).shape[-2]
        bypass, x = g.add_several("Split", x, np.array([part, part]), number=2, axis=1)
    for i, block in enumerate(stage.blocks):
        with g.scope(f"blocks/{i}"):
            y = within(g, _conv_norm, block, "conv1", x)
            x = g.add("Add", x, within(g, _conv_norm, block, "conv2", y))
    if is_crossed:
        x = within(g, _conv_norm, stage, "conv_transition_b", x)
        joined = g.add("Concat", bypass, x, axis=1)
        x = within(g, _conv_norm, stage, "conv_transition", joined)
    return x


def write_pvt(g: Graph, module: pvt.PyramidVisionTransformer, x: str) -> Maps:
    """`models.backbones.pvt`; its maps are tokens [B, h * w, C] within a stage."""
    maps = []
    for stage in range(1, len(pvt.STAGES) + 1):
        stride = 2 ** (stage + 1)
        embed, norm = getattr(module, f"patch_embed{stage}"), getattr(module, f"norm{stage}")
        channels = norm.scale.shape[0]
        with g.scope(f"patch_embed{stage}"):
            with g.scope("proj"):
                x = tokens(g, convolution(g, embed.proj, x), channels)
            x = layer_norm(g, embed.norm, x)
        for i in range(len(getattr(module, f"block{stage}"))):
            x = within(g, _pvt_block, module, f"block{stage}/{i}", x, channels, stride)
        with g.scope(f"norm{stage}"):
            x = as_map(g, layer_norm(g, norm, x), channels, stride)
        maps.append(x)
    return maps[1], maps[2], maps[3]


def _pvt_block(g: Graph, block: pvt.Block, x: str, channels: int, stride: int) -> str:
    with g.scope("attn"):
        y = _pvt_attention(g, block.attn, layer_norm(g, block.norm1, x), channels, stride)
    x = g.add("Add", x, y)
    with g.scope("mlp"):
        y = layer_norm(g, block.norm2, x)
        y = linear(g, block.mlp.fc1, y)
        y = relu(g, y) if block.mlp.linear else y
        depthwise = block.mlp.dwconv.dwconv
        hidden = array(depthwise.kernel).shape[-1]
        y = g.add(
            "Conv",
            as_map(g, y, hidden, stride),
            g.constant(array(depthwise.kernel).transpose(3, 2, 0, 1), "kernel"),
            g.constant(array(depthwise.bias), "bias"),
            pads=[1] * 4,
            group=hidden,
        )
        y = linear(g, block.mlp.fc2, tokens(g, gelu(g, y), hidden))
    return g.add("Add", x, y)


def _pvt_attention(g: Graph, module: pvt.Attention, x: str, channels: int, stride: int) -> str:
    source, heads = x, module.num_heads
    width = channels // heads
    if module.is_reduced:
        y = as_map(g, source, channels, stride)
        y = pooled(g, y, stride, pvt.POOL_SIZE) if module.linear else y
        size = module.sr.size
        kernel, bias = array(module.sr.kernel).transpose(3, 2, 0, 1), array(module.sr.bias)
        y = g.add("Conv", y, g.constant(kernel, "kernel"), bias, strides=[size] * 2)
        source = layer_norm(g, module.norm, tokens(g, y, channels))
    source = gelu(g, source) if module.linear else source
    q = linear(g, module.q, x)
    kernel, bias = array(module.kv.kernel), array(module.kv.bias)
    k, v = (
        affine(g, source, kernel[:, part], bias[part])
        for part in (slice(channels), slice(channels, None))
    )
    q, k, v = (g.reshape(each, 0, -1, heads, width) for each in (q, k, v))
    q, k, v = g.transpose(q, 0, 2, 1, 3), g.transpose(k, 0, 2, 3, 1), g.transpose(v, 0, 2, 1, 3)
    weight = g.add("Softmax", g.add("Mul", g.add("MatMul", q, k), width**-0.5), axis=-1)
    mixed = g.transpose(g.add("MatMul", weight, v), 0, 2, 1, 3)
    return linear(g, module.proj, g.reshape(mixed, 0, -1, channels))


def write_efficientnet_lite(g: Graph, module: efficientnet_lite.EfficientNetLite, x: str) -> Maps:
    """`models.backbones.efficientnet_lite`."""
    scale, shift = efficientnet_lite.own_units()
    x = g.add("Add", g.add("Mul", x, column(scale)), column(shift))
    x, maps = within(g, conv_relu6, module, "conv_stem", x), []
    for stage, blocks in enumerate(module.blocks):
        for i in range(len(blocks)):
            x = within(g, _lite_block, module, f"blocks/{stage}/{i}", x)
        maps.append(x)
    first, second, third = (maps[stage] for stage in efficientnet_lite.MAPS)
    return first, second, third


def _lite_block(g: Graph, block: Any, x: str) -> str:
    is_widened = isinstance(block, efficientnet_lite.InvertedResidual)
    names, last = (("conv_pw", "conv_dw"), "conv_pwl") if is_widened else (("conv_dw",), "conv_pw")
    y = x
    for name in names:
        y = within(g, conv_relu6, block, name, y)
    y = within(g, convolution, block, last, y)
    return g.add("Add", x, y) if block.is_added else y


BACKBONE_WRITERS: dict[type, Callable[[Graph, Any, str], Maps]] = {
    resnet.ResNet: write_resnet,
    cspdarknet.CSPDarkNet: write_cspdarknet,
    pvt.PyramidVisionTransformer: write_pvt,
    efficientnet_lite.EfficientNetLite: write_efficientnet_lite,
}
