"""PVTv2: a transformer of four stages whose keys and values come from a shrunken map.

Source: Wang et al., "PVT v2: Improved Baselines with Pyramid Vision Transformer",
arXiv:2106.13797; names and details follow its release, which SparseInst uses. Shapes: B batch,
h w the map of a stage, C its channels, N = h w queries, M keys.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparseinst_jax.models import layers, ops
from sparseinst_jax.models.backbones import checks
from sparseinst_jax.models.layers import Conv, LayerNorm, Linear
from sparseinst_jax.models.trees import device_index

STAGES = ("p1", "p2", "p3", "p4")  # strides 4, 8, 16, 32
HEADS = (1, 2, 5, 8)
MLP_RATIOS = (8, 8, 4, 4)
REDUCTIONS = (8, 4, 2, 1)  # sides of the patches that become one key
POOL_SIZE = 7  # of the linear variant: 7x7 keys whatever the image
BLOCK_EPSILON, EMBED_EPSILON = 1e-6, 1e-5  # two, as in the release
NORMAL = layers.normal(0.02)  # the release cuts it off at 2, a hundred deviations away


class PatchConv(nnx.Module):
    """Convolution whose stride is its size, without a border: a product for each patch."""

    def __init__(self, channels: int, size: int, *, dtype: Any, rng: np.random.Generator):
        shape = (size, size, channels, channels)
        fan_in = fan_out = size * size * channels
        self.kernel = nnx.Param(layers.msra(rng, shape, fan_in, fan_out))
        self.bias = nnx.Param(layers.zeros(rng, (channels,), fan_in, fan_out))
        self.size, self.dtype = size, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [B, h, w, C] to [B, h / size, w / size, C]."""
        batch, height, width, channels = x.shape
        patches = x.reshape(
            batch, height // self.size, self.size, width // self.size, self.size, channels
        )
        kernel = self.kernel[...].astype(self.dtype)
        y = jnp.einsum("bhiwjc,ijcd->bhwd", patches.astype(self.dtype), kernel)
        return y + self.bias[...].astype(self.dtype)


class Attention(nnx.Module):
    """Attention of every pixel to a map that is reduced in space.

    Args:
      channels: C.
      num_heads: heads, each C / num_heads wide.
      reduction: side of the patches that one key is made of; 1 takes the pixels themselves.
      linear: instead, the keys are the means of 7x7 windows, so that the cost grows with N only.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        reduction: int,
        linear: bool,
        *,
        dtype: Any,
        rng: np.random.Generator,
    ):
        project = functools.partial(Linear, kernel_init=NORMAL, dtype=dtype, rng=rng)
        project = functools.partial(project, bias_init=layers.zeros)
        self.q = project(channels, channels)
        self.kv = project(channels, 2 * channels)
        self.proj = project(channels, channels)
        self.is_reduced = linear or reduction > 1
        if self.is_reduced:
            self.sr = PatchConv(channels, 1 if linear else reduction, dtype=dtype, rng=rng)
            self.norm = LayerNorm(channels, EMBED_EPSILON)
        self.num_heads, self.linear = num_heads, linear

    def __call__(self, x: jax.Array) -> jax.Array:  # [B, h, w, C] to the same
        batch, _, _, channels = x.shape
        width = channels // self.num_heads
        source = x
        if self.linear:
            source = ops.adaptive_average_pool(source, POOL_SIZE)
        if self.is_reduced:
            source = self.norm(self.sr(source))
        if self.linear:
            source = ops.gelu(source)
        q = self.q(x).reshape(batch, -1, self.num_heads, width)  # [B, N, heads, width]
        kv = self.kv(source).reshape(batch, -1, 2, self.num_heads, width)  # [B, M, 2, ...]
        logits = jnp.einsum("bnhc,bmhc->bhnm", q, kv[:, :, 0], preferred_element_type=jnp.float32)
        # The softmax is float32 in every compute type.
        weight = jax.nn.softmax(logits * width**-0.5, axis=-1).astype(q.dtype)
        mixed = jnp.einsum("bhnm,bmhc->bnhc", weight, kv[:, :, 1])
        return self.proj(mixed.reshape(x.shape))


class DepthwiseConv(nnx.Module):
    """3x3 kernel and bias for each channel."""

    def __init__(self, channels: int, *, rng: np.random.Generator):
        # Its fans are those of one channel: 3x3 pixels.
        self.kernel = nnx.Param(layers.msra(rng, (3, 3, 1, channels), 9, 9))
        self.bias = nnx.Param(layers.zeros(rng, (channels,), 9, 9))


@jax.checkpoint
def _convolve_and_activate(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """GELU of the depthwise convolution.

    Recomputed in the backward pass: its own intermediates would be a dozen times x, which is the
    widest map of the network.
    """
    y = ops.depthwise_3x3(x, kernel) + bias
    return ops.gelu(y).astype(x.dtype)


class Mlp(nnx.Module):
    """Linear, depthwise 3x3 convolution, GELU, linear; the linear variant adds a relu."""

    def __init__(
        self, channels: int, hidden: int, linear: bool, *, dtype: Any, rng: np.random.Generator
    ):
        project = functools.partial(Linear, kernel_init=NORMAL, dtype=dtype, rng=rng)
        self.fc1 = project(channels, hidden, bias_init=layers.zeros)
        self.dwconv = nnx.Dict(dwconv=DepthwiseConv(hidden, rng=rng))  # named twice in the release
        self.fc2 = project(hidden, channels, bias_init=layers.zeros)
        self.linear = linear

    def __call__(self, x: jax.Array) -> jax.Array:  # [B, h, w, C] to the same
        x = self.fc1(x)
        if self.linear:
            x = jax.nn.relu(x)
        conv = self.dwconv.dwconv
        return self.fc2(_convolve_and_activate(x, conv.kernel[...], conv.bias[...]))


class Block(nnx.Module):
    """Attention and MLP, each of the normalised input and added to it."""

    def __init__(
        self,
        channels: int,
        num_heads: int,
        mlp_ratio: int,
        reduction: int,
        linear: bool,
        *,
        dtype: Any,
        rng: np.random.Generator,
    ):
        self.norm1 = LayerNorm(channels, BLOCK_EPSILON)
        self.attn = Attention(channels, num_heads, reduction, linear, dtype=dtype, rng=rng)
        self.norm2 = LayerNorm(channels, BLOCK_EPSILON)
        self.mlp = Mlp(channels, channels * mlp_ratio, linear, dtype=dtype, rng=rng)

    def __call__(self, x: jax.Array, weight: jax.Array | None) -> jax.Array:
        """Map [B, h, w, C] to the same; `weight` [B, 2] multiplies the branches of each image."""
        for branch, (norm, layer) in enumerate(((self.norm1, self.attn), (self.norm2, self.mlp))):
            y = layer(norm(x))
            if weight is not None:
                y = y * weight[:, branch, None, None, None].astype(y.dtype)
            x = x + y
        return x


class PatchEmbed(nnx.Module):
    """Convolution over overlapping patches, normalised."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int, stride: int, **options):
        self.proj = Conv(in_channels, channels, kernel_size, stride=stride, **options)
        self.norm = LayerNorm(channels, EMBED_EPSILON)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.proj(x))


class PyramidVisionTransformer(nnx.Module):
    """PVTv2 without its classifier.

    Stochastic depth needs random numbers inside a training step. They are a function of
    `drop_path_step`, a counter among the statistics that goes up with every training call, and of
    the position of the image in the batch over all devices: a run that continues draws on as if
    uninterrupted, and a batch is treated the same on any number of devices. The counter starts at a
    number drawn from the seed. It belongs to this package only: no file of published weights has
    it, and conversion leaves statistics of that name as they are.

    Args:
      stage_depths: blocks of the four stages; (2, 2, 2, 2) is b1, (3, 4, 6, 3) b2.
      embed_dims: channels of the stages, multiples of their 1, 2, 5 and 8 heads.
      linear: whether attention is to 7x7 means, as in b2-linear.
      drop_path: probability in training with which an image skips a branch of the last block; it
        grows linearly from 0 in the first.
      frozen_stages: how many stages are not trained: no gradient enters them and nothing is
        skipped in them.
      dtype: compute type; norms, softmax and GELU of the MLP are float32.
      rng: source of the initial weights: as in the release, N(0, 0.02²) for linear layers and
        N(0, 2 / fan_out) for convolutions.

    Attributes:
      out_channels: channels of the second, third and fourth stage (strides 8, 16, 32).
      frozen_names: of the modules that are not trained.
      undecayed: words in the names of parameters that have no weight decay, in its own recipe.
    """

    undecayed = ("patch_embed", "cls_token")

    def __init__(
        self,
        *,
        stage_depths: tuple[int, int, int, int] = (2, 2, 2, 2),
        embed_dims: tuple[int, int, int, int] = (64, 128, 320, 512),
        linear: bool = False,
        drop_path: float = 0.1,
        frozen_stages: int = 0,
        dtype: Any = jnp.float32,
        rng: np.random.Generator,
    ):
        self.frozen_stages = len(checks.first_stages(STAGES, frozen_stages))
        self.frozen_names = tuple(
            f"{module}{stage + 1}"
            for stage in range(self.frozen_stages)
            for module in ("patch_embed", "block", "norm")
        )
        in_channels = (3, *embed_dims)
        for stage, (channels, depth) in enumerate(zip(embed_dims, stage_depths, strict=True)):
            kernel_size, stride = (7, 4) if stage == 0 else (3, 2)
            embed = PatchEmbed(
                in_channels[stage], channels, kernel_size, stride, dtype=dtype, rng=rng
            )
            shape = channels, HEADS[stage], MLP_RATIOS[stage], REDUCTIONS[stage], linear
            blocks = [Block(*shape, dtype=dtype, rng=rng) for _ in range(depth)]
            setattr(self, f"patch_embed{stage + 1}", embed)
            setattr(self, f"block{stage + 1}", nnx.List(blocks))
            setattr(self, f"norm{stage + 1}", LayerNorm(channels, BLOCK_EPSILON))
        first_step = np.asarray(rng.random((), np.float32) * 2.0**32, np.uint32)
        self.drop_path_step = layers.Counter(first_step)
        self.drop_rates = tuple(np.linspace(0.0, drop_path, sum(stage_depths)).tolist())
        self.out_channels = tuple(embed_dims[1:])

    @staticmethod
    def faults(*, stage_depths, embed_dims, drop_path, **_: Any) -> list[str]:
        """List what is wrong with the constructor's options."""
        faults = checks.depth_faults(stage_depths, (2, 2, 2, 2))
        fits = [n > 0 and n % heads == 0 for n, heads in zip(embed_dims, HEADS, strict=False)]
        if len(embed_dims) != len(HEADS) or not all(fits):
            faults.append(
                f"embed_dims must be positive multiples of the stages' heads {HEADS}, such as"
                f" (64, 128, 320, 512), got {embed_dims}"
            )
        if not 0 <= drop_path < 1:
            faults.append(f"drop_path must be at least 0 (off) and below 1, got {drop_path}")
        return faults

    def branch_weights(self, batch: int) -> jax.Array:
        """Draw [B, blocks, 2], what each branch of each image is multiplied by.

        0 with the block's probability p, else 1 / (1 - p), so that the expectation is 1.
        """
        key = jax.random.fold_in(jax.random.key(0), self.drop_path_step[...])
        self.drop_path_step[...] = self.drop_path_step[...] + 1
        positions = device_index() * batch + jnp.arange(batch)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, positions)
        shape = len(self.drop_rates), 2
        drawn = jax.vmap(lambda key: jax.random.uniform(key, shape))(keys)
        rates = jnp.asarray(self.drop_rates, jnp.float32)[:, None]
        return (drawn >= rates) / (1 - rates)

    def __call__(
        self, images: jax.Array, train: bool = False, intermediates: dict | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Map normalised images [B, H, W, 3] to the maps of strides 8, 16 and 32.

        H and W are multiples of 32.
        """
        named = {} if intermediates is None else intermediates

        def record(name: str, x: jax.Array) -> None:  # as the release has it: [B, N, C]
            named[name] = x.reshape(x.shape[0], -1, x.shape[-1])

        drawn = self.branch_weights(len(images)) if train and self.drop_rates[-1] else None
        x, number = images, 0
        for stage, name in enumerate(STAGES, start=1):
            is_frozen = stage <= self.frozen_stages
            x = getattr(self, f"patch_embed{stage}")(x)
            record(f"patch_embed{stage}.0", x)
            for i, block in enumerate(getattr(self, f"block{stage}")):
                x = block(x, None if drawn is None or is_frozen else drawn[:, number])
                record(f"block{stage}_{i}", x)
                number += 1
            # The normalised map is both the result and what the next stage takes.
            x = getattr(self, f"norm{stage}")(x)
            if is_frozen:
                x = jax.lax.stop_gradient(x)
            named[name] = x
        return named["p2"], named["p3"], named["p4"]
