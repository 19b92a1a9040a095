"""CSPDarkNet-53 and DarkNet-53: a stem at full size and five stages, each of half the size.

Source: Redmon and Farhadi, "YOLOv3", arXiv:1804.02767 (DarkNet-53); Wang et al., "CSPNet",
arXiv:1911.11929 (cross stage partial connections); the form of timm's `cspdarknet53` and
`darknet53`, whose names the modules keep. Every convolution is normalised and goes through a leaky
ReLU, those of the transitions and of a block's end too; nothing follows the sum of a block.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparseinst_jax.models import layers
from sparseinst_jax.models.backbones import checks
from sparseinst_jax.models.layers import Conv, NormName

STAGES = ("stem", "stages/0", "stages/1", "stages/2", "stages/3", "stages/4")
DEPTHS = (1, 2, 8, 8, 4)  # the 53 layers
NEGATIVE_SLOPE = 0.01  # as in timm; DarkNet itself has 0.1


class ConvNorm(nnx.Module):
    """Convolution, norm, leaky ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        *,
        norm: NormName,
        dtype: Any,
        rng: np.random.Generator,
    ):
        self.conv = Conv(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            bias_init=None,
            dtype=dtype,
            rng=rng,
        )
        self.bn = layers.NORMS[norm](out_channels)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = self.conv(x) if self.bn is None else self.bn(self.conv(x), train)
        return jax.nn.leaky_relu(y, NEGATIVE_SLOPE)

    def fold_norm(self) -> None:
        """See `Conv.fold_norm`."""
        if isinstance(self.bn, layers.FrozenBatchNorm | layers.BatchNorm):
            self.conv.fold(self.bn)
            self.bn = None


class Stem(nnx.Module):
    """A 3x3 convolution at full size."""

    def __init__(self, width: int, conv):
        self.conv1 = conv(3, width, 3)

    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        return self.conv1(images, train)


class DarkBlock(nnx.Module):
    """1x1 reduce, 3x3 expand, added to the input; it starts as the identity."""

    def __init__(self, channels: int, inner: int, conv):
        self.conv1 = conv(channels, inner, 1)
        self.conv2 = conv(inner, channels, 3)
        self.conv2.bn.scale.set_value(np.zeros((channels,), np.float32))

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return x + self.conv2(self.conv1(x, train), train)


class DarkStage(nnx.Module):
    """A 3x3 convolution of stride 2, then residual blocks over all channels."""

    def __init__(self, in_channels: int, channels: int, depth: int, conv):
        self.conv_down = conv(in_channels, channels, 3, 2)
        self.blocks = nnx.List([DarkBlock(channels, channels // 2, conv) for _ in range(depth)])

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = self.conv_down(x, train)
        for block in self.blocks:
            x = block(x, train)
        return x


class CrossStage(nnx.Module):
    """A stage whose blocks see one half of the channels; the other half goes past them.

    Args:
      in_channels: of the stage before.
      channels: of the result.
      part: channels of each half.
      depth: number of blocks.
      conv: makes a `ConvNorm`.
    """

    def __init__(self, in_channels: int, channels: int, part: int, depth: int, conv):
        self.conv_down = conv(in_channels, channels, 3, 2)
        self.conv_exp = conv(channels, 2 * part, 1)
        self.blocks = nnx.List([DarkBlock(part, channels // 2, conv) for _ in range(depth)])
        self.conv_transition_b = conv(part, part, 1)
        self.conv_transition = conv(2 * part, channels, 1)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        bypass, x = jnp.split(self.conv_exp(self.conv_down(x, train), train), 2, axis=-1)
        for block in self.blocks:
            x = block(x, train)
        x = self.conv_transition_b(x, train)
        return self.conv_transition(jnp.concatenate([bypass, x], axis=-1), train)


class CSPDarkNet(nnx.Module):
    """CSPDarkNet or DarkNet without its classifier.

    Args:
      cross_stage: whether the stages are cross stage partial; False is DarkNet.
      stage_depths: blocks of the five stages; (1, 2, 8, 8, 4) makes the 53 layers.
      width: channels of the stem; each stage doubles them.
      norm: "batch_norm" as published; "frozen_batch_norm" keeps loaded statistics, "group_norm"
        suits small batches.
      frozen_stages: how many of the stem, the first stage, ... are not trained: no gradient enters
        them and their batch norms use and keep the running statistics.
      dtype: compute type.
      rng: source of the initial weights: as timm's, N(0, 2 / fan_out), and 0 for the scale of the
        last norm of each block.

    Attributes:
      out_channels: channels of the third, fourth and fifth stage (strides 8, 16, 32).
      frozen_names: paths of the stages that are not trained.
    """

    def __init__(
        self,
        *,
        cross_stage: bool = True,
        stage_depths: tuple[int, ...] = DEPTHS,
        width: int = 32,
        norm: NormName = "batch_norm",
        frozen_stages: int = 0,
        dtype: Any = jnp.float32,
        rng: np.random.Generator,
    ):
        self.frozen_names = checks.first_stages(STAGES, frozen_stages)

        def conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1):
            return ConvNorm(
                in_channels, out_channels, kernel_size, stride, norm=norm, dtype=dtype, rng=rng
            )

        self.stem = Stem(width, conv)
        stages: list[nnx.Module] = []
        for stage, depth in enumerate(stage_depths):
            before, channels = width * 2**stage, width * 2 ** (stage + 1)
            if cross_stage:
                # The first stage is too narrow to be halved: both parts have all its channels.
                part = channels if stage == 0 else channels // 2
                stages.append(CrossStage(before, channels, part, depth, conv))
            else:
                stages.append(DarkStage(before, channels, depth, conv))
        self.stages = nnx.List(stages)
        self.out_channels = tuple(width * 2**stage for stage in (3, 4, 5))

    @staticmethod
    def faults(*, stage_depths, width, norm, **_: Any) -> list[str]:
        """List what is wrong with the constructor's options."""
        return [
            *checks.norm_faults(norm),
            *checks.width_faults(width),
            *checks.depth_faults(stage_depths, DEPTHS),
        ]

    def __call__(
        self, images: jax.Array, train: bool = False, intermediates: dict | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Map normalised images [B, H, W, 3] to the maps of strides 8, 16 and 32."""
        named = {} if intermediates is None else intermediates
        x, maps = images, []
        for path, stage in zip(STAGES, [self.stem, *self.stages], strict=True):
            is_frozen = path in self.frozen_names
            x = stage(x, train and not is_frozen)
            if is_frozen:
                x = jax.lax.stop_gradient(x)
            named[path.replace("stages/", "csp")] = x
            maps.append(x)
        return maps[3], maps[4], maps[5]
