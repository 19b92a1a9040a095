"""ResNet with bottleneck blocks: stem, res2, res3, res4, res5.

Source: He et al., arXiv:1512.03385; the v1.5 form of torchvision and detectron2
(STRIDE_IN_1X1 False): the stride is in the 3x3 convolution. Names follow detectron2.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparseinst_jax import layers, ops
from sparseinst_jax.layers import Conv, NormName

STAGES = ("stem", "res2", "res3", "res4", "res5")
EXPANSION = 4  # output channels of a bottleneck over its inner width


class Bottleneck(nnx.Module):
    """1x1 reduce, 3x3, 1x1 expand, each normalised, added to the shortcut."""

    def __init__(self, in_channels: int, width: int, stride: int, conv):
        out_channels = width * EXPANSION
        self.has_shortcut = in_channels != out_channels or stride != 1
        if self.has_shortcut:
            self.shortcut = conv(in_channels, out_channels, 1, stride)
        self.conv1 = conv(in_channels, width, 1, 1)
        self.conv2 = conv(width, width, 3, stride)
        self.conv3 = conv(width, out_channels, 1, 1)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = jax.nn.relu(self.conv1(x, train))
        y = jax.nn.relu(self.conv2(y, train))
        y = self.conv3(y, train)
        return jax.nn.relu(y + (self.shortcut(x, train) if self.has_shortcut else x))


class Stem(nnx.Module):
    """7x7 convolution of stride 2, norm, relu, 3x3 maximum of stride 2."""

    def __init__(self, width: int, conv):
        self.conv1 = conv(3, width, 7, 2)

    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        return ops.max_pool_3x3_stride_2(jax.nn.relu(self.conv1(images, train)))


class ResNet(nnx.Module):
    """ResNet without its classifier.

    Args:
      stage_depths: blocks in res2, res3, res4, res5; (3, 4, 6, 3) is ResNet-50.
      width: channels of the stem and inner width of res2; each later stage doubles it.
      norm: "frozen_batch_norm" for fine-tuning from ImageNet weights, "batch_norm" or
        "group_norm" for training from scratch.
      frozen_stages: how many of the stem, res2, ... are not trained: no gradient enters them and
        their batch norms use and keep the running statistics.
      dtype: compute type.
      rng: source of the initial weights (`c2_msra_fill`, as detectron2's).

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
        frozen_stages: int = 0,
        dtype: Any = jnp.float32,
        rng: np.random.Generator,
    ):
        if not 0 <= frozen_stages <= len(STAGES):
            raise ValueError(
                f"frozen_stages must be from 0 to {len(STAGES)}, the number of the first of"
                f" {', '.join(STAGES)} that are not trained, got {frozen_stages}."
            )
        self.frozen_names = STAGES[:frozen_stages]

        def conv(in_channels: int, out_channels: int, kernel_size: int, stride: int) -> Conv:
            return Conv(
                in_channels,
                out_channels,
                kernel_size,
                stride=stride,
                bias_init=None,
                norm=layers.NORMS[norm](out_channels),
                dtype=dtype,
                rng=rng,
            )

        self.stem = Stem(width, conv)
        channels = width
        for stage, depth in enumerate(stage_depths):
            inner, blocks = width * 2**stage, []
            for block in range(depth):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(Bottleneck(channels, inner, stride, conv))
                channels = inner * EXPANSION
            setattr(self, f"res{stage + 2}", nnx.List(blocks))
        self.out_channels = tuple(width * EXPANSION * 2**stage for stage in (1, 2, 3))

    def __call__(
        self, images: jax.Array, train: bool = False, intermediates: dict | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Map normalised images [B, H, W, 3] to res3, res4, res5 at strides 8, 16, 32."""
        named = {} if intermediates is None else intermediates
        x = images
        for name in STAGES:
            is_trained = train and name not in self.frozen_names
            for layer in [self.stem] if name == "stem" else getattr(self, name):
                x = layer(x, is_trained)
            if name in self.frozen_names:
                x = jax.lax.stop_gradient(x)
            named[name] = x
        return named["res3"], named["res4"], named["res5"]
