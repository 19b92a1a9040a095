"""ResNet with bottleneck blocks: stem, res2, res3, res4, res5.

Variant b is the v1.5 form (STRIDE_IN_1X1 False): the stride is in the 3x3 convolution. Variant d
("vd") has a stem of three 3x3 convolutions and average-pools the shortcuts that shrink the map. Any
stage can have deformable 3x3 convolutions.

Source: He et al., arXiv:1512.03385; variants: He et al., arXiv:1812.01187, figure 2; as in
detectron2, and variant d as in timm's resnet50d and PaddleDetection. Names follow detectron2.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparseinst_jax.models import layers, ops
from sparseinst_jax.models.backbones import checks, deformable
from sparseinst_jax.models.backbones.deformable import DeformableConv
from sparseinst_jax.models.layers import Conv, NormName

STAGES = ("stem", "res2", "res3", "res4", "res5")
Variant = Literal["b", "d"]
EXPANSION = 4  # output channels of a bottleneck over its inner width


class Maker:
    """Makes the convolutions of one network."""

    def __init__(self, norm: NormName, dtype: Any, rng: np.random.Generator):
        self.norm, self.options = layers.NORMS[norm], {"dtype": dtype, "rng": rng}

    def conv(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> Conv:
        """Make an ordinary convolution with a norm and without a bias."""
        return Conv(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            bias_init=None,
            norm=self.norm(out_channels),
            **self.options,
        )

    def deformable_conv(self, channels: int, stride: int) -> DeformableConv:
        """Make a deformable 3x3 convolution with a norm."""
        return DeformableConv(channels, stride=stride, norm=self.norm(channels), **self.options)

    def offset_conv(self, in_channels: int, out_channels: int, stride: int) -> Conv:
        """Make the convolution that says where to sample: nothing moves at the start."""
        return Conv(
            in_channels, out_channels, 3, stride=stride, kernel_init=layers.zeros, **self.options
        )


class Bottleneck(nnx.Module):
    """1x1 reduce, 3x3, 1x1 expand, each normalised, added to the shortcut.

    Args:
      in_channels: channels of the input.
      width: channels of the 3x3 convolution; the output has four times as many.
      stride: of the 3x3 convolution, 1 or 2.
      is_pooled: whether a shortcut that shrinks the map averages it (variant d) or skips pixels.
      offset_channels: of a deformable 3x3 convolution, 18 or 27; 0 for an ordinary one.
      make: of the network's convolutions.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        *,
        is_pooled: bool,
        offset_channels: int,
        make: Maker,
    ):
        out_channels = width * EXPANSION
        self.has_shortcut = in_channels != out_channels or stride != 1
        self.is_pooled = is_pooled and stride == 2
        if self.has_shortcut:
            step = 1 if self.is_pooled else stride
            self.shortcut = make.conv(in_channels, out_channels, 1, step)
        self.conv1 = make.conv(in_channels, width, 1)
        if offset_channels:
            self.conv2_offset = make.offset_conv(width, offset_channels, stride)
            self.conv2 = make.deformable_conv(width, stride)
        else:
            self.conv2 = make.conv(width, width, 3, stride)
        self.conv3 = make.conv(width, out_channels, 1)

    def __call__(self, x: jax.Array, train: bool, intermediates: dict) -> jax.Array:
        """Map [B, H, W, in] to [B, ceil(H / stride), ceil(W / stride), 4 * width]."""
        y = ops.relu(self.conv1(x, train))
        if isinstance(self.conv2, DeformableConv):
            places = self.conv2_offset(y)
            intermediates.setdefault("offset_first", places)
            intermediates["offset_last"] = places
            y = self.conv2(y, places, train)
        else:
            y = self.conv2(y, train)
        y = self.conv3(ops.relu(y), train)
        if self.is_pooled:
            x = ops.average_pool_2x2_stride_2(x)
        return ops.relu_of_sum(y, self.shortcut(x, train) if self.has_shortcut else x)


class Stem(nnx.Module):
    """Variant b: 7x7 convolution of stride 2, norm, relu, 3x3 maximum of stride 2."""

    def __init__(self, width: int, make: Maker):
        self.conv1 = make.conv(3, width, 7, 2)

    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Map [B, H, W, 3] to [B, H / 4, W / 4, width]."""
        # The maximum first: the same numbers, and the relu has a quarter of the pixels.
        return ops.relu(ops.max_pool_3x3_stride_2(self.conv1(images, train)))


class DeepStem(nnx.Module):
    """Variant d: three 3x3 convolutions, the first of stride 2, then the maximum."""

    def __init__(self, width: int, make: Maker):
        self.conv1 = make.conv(3, width // 2, 3, 2)
        self.conv2 = make.conv(width // 2, width // 2, 3)
        self.conv3 = make.conv(width // 2, width, 3)

    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Map [B, H, W, 3] to [B, H / 4, W / 4, width]."""
        x = images
        for conv in (self.conv1, self.conv2, self.conv3):
            x = ops.relu(conv(x, train))
        return ops.max_pool_3x3_stride_2(x)


class ResNet(nnx.Module):
    """ResNet without its classifier.

    Args:
      stage_depths: blocks in res2, res3, res4, res5; (3, 4, 6, 3) is ResNet-50, (3, 4, 23, 3)
        ResNet-101.
      width: channels of the stem and inner width of res2; each later stage doubles it.
      norm: "frozen_batch_norm" for fine-tuning from ImageNet weights, "batch_norm" or
        "group_norm" for training from scratch.
      variant: "b", the usual one, or "d", with a deep stem and average-pooled shortcuts.
      deformable_stages: names of the stages whose 3x3 convolutions are deformable.
      modulated: whether these also weigh their samples (version 2) or not (version 1).
      frozen_stages: how many of the stem, res2, ... are not trained: no gradient enters them and
        their batch norms use and keep the running statistics.
      dtype: compute type.
      rng: source of the initial weights (`msra`).

    Attributes:
      out_channels: channels of res3, res4, res5.
      frozen_names: of the stages that are not trained.
    """

    def __init__(
        self,
        *,
        stage_depths: tuple[int, int, int, int] = (3, 4, 6, 3),
        width: int = 64,
        norm: NormName = "frozen_batch_norm",
        variant: Variant = "b",
        deformable_stages: tuple[str, ...] = (),
        modulated: bool = False,
        frozen_stages: int = 0,
        dtype: Any = jnp.float32,
        rng: np.random.Generator,
    ):
        self.frozen_names = checks.first_stages(STAGES, frozen_stages)
        make = Maker(norm, dtype, rng)
        self.stem = (DeepStem if variant == "d" else Stem)(width, make)
        channels = width
        for stage, (name, depth) in enumerate(zip(STAGES[1:], stage_depths, strict=True)):
            inner, blocks = width * 2**stage, []
            is_deformable = name in deformable_stages
            for block in range(depth):
                stride = 2 if stage > 0 and block == 0 else 1
                options: dict[str, Any] = dict(
                    is_pooled=variant == "d",
                    offset_channels=deformable.offset_channels(modulated) if is_deformable else 0,
                )
                blocks.append(Bottleneck(channels, inner, stride, make=make, **options))
                channels = inner * EXPANSION
            setattr(self, name, nnx.List(blocks))
        self.out_channels = tuple(width * EXPANSION * 2**stage for stage in (1, 2, 3))

    @staticmethod
    def faults(
        *, stage_depths, width, norm, variant, deformable_stages, modulated, **_: Any
    ) -> list[str]:
        """List what is wrong with the constructor's options."""
        return [
            *_variant_faults(variant),
            *_deformable_faults(deformable_stages, modulated),
            *checks.norm_faults(norm),
            *checks.width_faults(width),
            *checks.depth_faults(stage_depths, (3, 4, 6, 3)),
        ]

    def __call__(
        self, images: jax.Array, train: bool = False, intermediates: dict | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Map normalised images [B, H, W, 3] to res3, res4, res5 at strides 8, 16, 32."""
        named = {} if intermediates is None else intermediates
        x = images
        for name in STAGES:
            is_trained = train and name not in self.frozen_names
            if name == "stem":
                x = self.stem(x, is_trained)
            else:
                for block in getattr(self, name):
                    x = block(x, is_trained, named)
            if name in self.frozen_names:
                x = jax.lax.stop_gradient(x)
            named[name] = x
        return named["res3"], named["res4"], named["res5"]


def _variant_faults(variant: Any) -> list[str]:
    known = get_args(Variant)
    return [] if variant in known else [f"variant must be {' or '.join(known)}, got {variant!r}"]


def _deformable_faults(stages: Any, modulated: bool) -> list[str]:
    if isinstance(stages, str) or not set(stages) <= set(STAGES[1:]):
        return [
            f"deformable_stages must be a tuple of {', '.join(STAGES[1:])}, such as"
            f' ("res4", "res5"), got {stages!r}'
        ]
    if modulated and not stages:
        return [
            "modulated is True, but no convolution is deformable: give deformable_stages too, such"
            ' as ("res3", "res4", "res5")'
        ]
    return []
