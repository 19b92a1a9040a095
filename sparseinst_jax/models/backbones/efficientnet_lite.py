"""EfficientNet-Lite: inverted residual blocks without squeeze-and-excite, for CPUs and int8.

A block widens its input by a 1x1 convolution, convolves each channel alone, and narrows the result
by another 1x1 convolution, which nothing follows; where input and output have the same shape they
are added. Activations are ReLU6, which int8 has room for.

Source: Tan and Le, "EfficientNet", arXiv:1905.11946; Liu, "Higher accuracy on vision models with
EfficientNet-Lite", 2020; the form of timm's `tf_efficientnet_lite0` to `2`, whose names the modules
keep. As TensorFlow has it: padding, 1e-3 in the norms, and images as (x - 127) / 128.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparseinst_jax.models import layers, ops
from sparseinst_jax.models.backbones import checks
from sparseinst_jax.models.layers import Conv, NormName

NORM_EPSILON = 1e-3
OWN_MEAN, OWN_STD = 127.0, 128.0  # of all channels
STEM_CHANNELS = 32
# Of the seven stages; the first has no convolution that widens.
EXPANSIONS = (1, 6, 6, 6, 6, 6, 6)
KERNEL_SIZES = (3, 3, 5, 3, 5, 5, 3)
STRIDES = (1, 2, 2, 2, 1, 2, 1)
DEPTHS = (1, 2, 2, 3, 3, 4, 1)  # Lite0
CHANNELS = (16, 24, 40, 80, 112, 192, 320)  # Lite0 and Lite1
MAPS = (2, 4, 6)  # the stages whose results are those of strides 8, 16 and 32
# What `frozen_stages` counts: the modules of each size of the map.
FREEZABLE = {
    "stride 2": ("conv_stem", "blocks/0"),
    "stride 4": ("blocks/1",),
    "stride 8": ("blocks/2",),
    "stride 16": ("blocks/3", "blocks/4"),
    "stride 32": ("blocks/5", "blocks/6"),
}


def own_units() -> tuple[np.ndarray, np.ndarray]:
    """Return what to multiply normalised images by and to add then, so that they are the network's.

    It cannot go into the first kernel: the zeros around an image are grey 127.
    """
    return ops.PIXEL_STD / OWN_STD, (ops.PIXEL_MEAN - OWN_MEAN) / OWN_STD


class Maker:
    """Makes the convolutions of one network: normalised, without a bias."""

    def __init__(self, norm: NormName, dtype: Any, rng: np.random.Generator):
        self.norm, self.options = layers.NORMS[norm], {"dtype": dtype, "rng": rng}

    def conv(
        self, in_channels: int, out_channels: int, kernel_size: int = 1, stride: int = 1, **how: Any
    ) -> Conv:
        """Make one; its kernel is drawn from N(0, 2 / fan_out)."""
        norm = self.norm(out_channels, epsilon=NORM_EPSILON)
        shape = in_channels, out_channels, kernel_size
        how |= {"stride": stride, "same": True, "bias_init": None, "norm": norm}
        return Conv(*shape, **how, **self.options)

    def depthwise(self, channels: int, kernel_size: int, stride: int) -> Conv:
        """Make one of each channel alone, whose fan-out is the pixels of a kernel."""
        kernel_init = layers.normal(np.sqrt(2.0) / kernel_size)
        shape = channels, channels, kernel_size, stride
        return self.conv(*shape, groups=channels, kernel_init=kernel_init)


class SeparableBlock(nnx.Module):
    """A convolution of each channel, then a 1x1 convolution: the block that does not widen."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int, stride: int, make: Maker):
        self.conv_dw = make.depthwise(in_channels, kernel_size, stride)
        self.conv_pw = make.conv(in_channels, channels)
        self.is_added = stride == 1 and in_channels == channels

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map [B, H, W, in] to [B, ceil(H / stride), ceil(W / stride), channels]."""
        y = self.conv_pw(ops.relu6(self.conv_dw(x, train)), train)
        return x + y if self.is_added else y


class InvertedResidual(nnx.Module):
    """1x1 to `expansion` times the channels, each convolved alone, 1x1 to the result."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel_size: int,
        stride: int,
        expansion: int,
        make: Maker,
    ):
        inner = in_channels * expansion
        self.conv_pw = make.conv(in_channels, inner)
        self.conv_dw = make.depthwise(inner, kernel_size, stride)
        self.conv_pwl = make.conv(inner, channels)
        self.is_added = stride == 1 and in_channels == channels

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map [B, H, W, in] to [B, ceil(H / stride), ceil(W / stride), channels]."""
        y = ops.relu6(self.conv_pw(x, train))
        y = self.conv_pwl(ops.relu6(self.conv_dw(y, train)), train)
        return x + y if self.is_added else y


class EfficientNetLite(nnx.Module):
    """EfficientNet-Lite without its last 1x1 convolution and classifier.

    Args:
      stage_depths: blocks of the seven stages; (1, 2, 2, 3, 3, 4, 1) is Lite0, (1, 3, 3, 4, 4, 5,
        1) Lite1 and Lite2.
      stage_channels: of their results; (16, 24, 40, 80, 112, 192, 320) is Lite0 and Lite1, (16, 24,
        48, 88, 120, 208, 352) Lite2.
      norm: "frozen_batch_norm" for fine-tuning from ImageNet weights, "batch_norm" or
        "group_norm" for training from scratch.
      frozen_stages: how many of the parts of strides 2, 4, 8, 16 and 32 are not trained: no
        gradient enters them and their batch norms use and keep the running statistics.
      dtype: compute type.
      rng: source of the initial weights, N(0, 2 / fan_out).

    Attributes:
      out_channels: channels of the maps of strides 8, 16 and 32.
      frozen_names: paths of the modules that are not trained.
    """

    def __init__(
        self,
        *,
        stage_depths: tuple[int, ...] = DEPTHS,
        stage_channels: tuple[int, ...] = CHANNELS,
        norm: NormName = "frozen_batch_norm",
        frozen_stages: int = 0,
        dtype: Any = jnp.float32,
        rng: np.random.Generator,
    ):
        frozen = checks.first_stages(tuple(FREEZABLE), frozen_stages)
        self.frozen_names = tuple(name for part in frozen for name in FREEZABLE[part])
        make = Maker(norm, dtype, rng)
        self.conv_stem = make.conv(3, STEM_CHANNELS, 3, 2)
        stages, before = [], STEM_CHANNELS
        rows = zip(stage_depths, stage_channels, KERNEL_SIZES, STRIDES, EXPANSIONS, strict=True)
        for depth, channels, kernel_size, first_stride, expansion in rows:
            blocks: list[nnx.Module] = []
            for block in range(depth):
                shape = before, channels, kernel_size, first_stride if block == 0 else 1
                blocks.append(
                    SeparableBlock(*shape, make)
                    if expansion == 1
                    else InvertedResidual(*shape, expansion, make)
                )
                before = channels
            stages.append(nnx.List(blocks))
        self.blocks = nnx.List(stages)
        self.out_channels = tuple(stage_channels[stage] for stage in MAPS)

    @staticmethod
    def faults(*, stage_depths, stage_channels, norm, **_: Any) -> list[str]:
        """List what is wrong with the constructor's options."""
        return [
            *checks.norm_faults(norm),
            *(
                f"{name} must be {what} of seven stages, such as {example}, got {given}"
                for name, what, example, given, least in (
                    ("stage_depths", "the blocks", DEPTHS, stage_depths, 1),
                    ("stage_channels", "the channels", CHANNELS, stage_channels, 2),
                )
                if len(given) != len(example) or min(given) < least
            ),
        ]

    def __call__(
        self, images: jax.Array, train: bool = False, intermediates: dict | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Map normalised images [B, H, W, 3] to the maps of strides 8, 16 and 32."""
        named = {} if intermediates is None else intermediates

        def held(name: str, x: jax.Array) -> jax.Array:
            x = jax.lax.stop_gradient(x) if name in self.frozen_names else x
            named[name.replace("/", "")] = x
            return x

        def is_trained(name: str) -> bool:
            return train and name not in self.frozen_names

        scale, shift = own_units()
        x = images * scale + shift
        x = held("conv_stem", ops.relu6(self.conv_stem(x, is_trained("conv_stem"))))
        for stage, blocks in enumerate(self.blocks):
            name = f"blocks/{stage}"
            for block in blocks:
                x = block(x, is_trained(name))
            x = held(name, x)
        return tuple(named[f"blocks{stage}"] for stage in MAPS)  # type: ignore[return-value]
