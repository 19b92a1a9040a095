"""The FastInst network: backbone, pixel decoder, instance-activation-guided queries, dual decoder.

To be read beside the paper: He et al., "FastInst: A Simple Query-Based Model for Real-Time Instance
Segmentation", CVPR 2023, arXiv:2303.08594. Shapes: B batch, H W padded image in pixels, C channels,
N queries that predict, A auxiliary queries, P = H/8 * W/8 pixels of the finest map, L decoder
layers, K classes.

There is no mask of the padding anywhere, as in the original: queries are proposed there too, and
attention sees it.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparseinst_jax.models import layers, ops
from sparseinst_jax.models.layers import Conv, GroupNorm, LayerNorm, Linear, PyramidPooling

STRIDE = 32  # the coarsest feature map's; padded sizes are multiples of it
PROPOSAL_STRIDE, MASK_STRIDE = 16, 8  # of the map that proposes queries, and of pixels and masks
LAYER_NORM_EPSILON = 1e-5
PEAK_FLOOR = 1e-6  # a less probable class is no peak


class Prediction(NamedTuple):
    """What one prediction head says of the N queries.

    Attributes:
      class_logits: float32 [B, N, K+1], the last for no object; None where nobody asks.
      mask_logits: float32 [B, N, H/8, W/8].
    """

    class_logits: Any
    mask_logits: jax.Array


class Memory(NamedTuple):
    """Both paths of the decoder after a layer: queries [B, N+A, C] and pixels [B, P, C]."""

    queries: jax.Array
    pixels: jax.Array


class Outputs(NamedTuple):
    """What a model predicts for a batch.

    Attributes:
      heads: predictions before the first layer, then after each: L+1. Outside of training only the
        last one.
      proposal_logits: float32 [B, H/16 * W/16, K+1], a class for each place of the map.
      query_locations: float32 [B, N, 2], where on it the queries come from: x, y in 0..1, both ends
        included.
      memory: after each layer; empty outside of training, as what follows.
      query_positions: [B, N+A, C].
      pixel_positions: [1, P, C].
    """

    heads: tuple[Prediction, ...]
    proposal_logits: jax.Array
    query_locations: jax.Array
    memory: tuple[Memory, ...]
    query_positions: Any
    pixel_positions: Any


class PixelDecoder(nnx.Module):
    """PPM-FPN: the pyramid's top-down path carries what the 3x3 output convolutions give.

    Source: paper, "Lightweight pixel decoder"; reference `pixel_decoder/fastinst_ppm_fpn.py`. No
    activation on the laterals; position 0 of the lists is the finest level.
    """

    def __init__(self, in_channels: tuple[int, ...], channels: int, *, dtype: Any, rng: Any):
        def conv(inputs: int, kernel_size: int) -> Conv:
            return Conv(
                inputs,
                channels,
                kernel_size,
                kernel_init=layers.xavier,
                bias_init=None,
                norm=GroupNorm(channels),
                dtype=dtype,
                rng=rng,
            )

        self.laterals = nnx.List([conv(inputs, 1) for inputs in in_channels])
        self.outputs = nnx.List([conv(channels, 3) for _ in in_channels])
        self.ppm = PyramidPooling(channels, dtype=dtype, rng=rng)

    def __call__(
        self, res3: jax.Array, res4: jax.Array, res5: jax.Array, intermediates: dict
    ) -> tuple[jax.Array, jax.Array]:
        """Map res3, res4, res5 to the levels of strides 8 and 16, [B, h, w, C]."""
        pooled = intermediates["ppm"] = self.ppm(self.laterals[2](res5))
        y5 = ops.relu(self.outputs[2](pooled))
        x4, x3 = self.laterals[1](res4), self.laterals[0](res3)
        y4 = ops.relu(self.outputs[1](x4 + ops.resize_bilinear(y5, x4.shape[1:3])))
        y3 = ops.relu(self.outputs[0](x3 + ops.resize_bilinear(y4, x3.shape[1:3])))
        named = {"fpn_out_stride8": y3, "fpn_out_stride16": y4, "fpn_out_stride32": y5}
        intermediates.update(named)
        return y3, y4


class QueryProposal(nnx.Module):
    """Class logits for every place of the map of stride 16; the places of peaks become queries.

    Source: paper, "Instance activation-guided queries".
    """

    def __init__(self, channels: int, num_classes: int, *, dtype: Any, rng: Any):
        conv = functools.partial(
            Conv,
            kernel_init=layers.torch_uniform,
            bias_init=layers.torch_uniform,
            dtype=dtype,
            rng=rng,
        )
        self.conv = conv(channels, channels, 3)
        self.classify = conv(channels, num_classes + 1, 1)

    def __call__(self, y4: jax.Array) -> jax.Array:
        """Map [B, h, w, C] to float32 [B, h, w, K+1]."""
        return self.classify(ops.relu(self.conv(y4))).astype(jnp.float32)


def proposal_scores(logits: jax.Array) -> jax.Array:
    """Score every place: the probability of its best class, plus 1 where that is a peak.

    A peak is at least as probable as the same class at each of the eight neighbours where it is
    the best one, too: of equal neighbours all are peaks. No object is not a class here.

    Args:
      logits: float32 [B, h, w, K+1], the last for no object.

    Returns:
      float32 [B, h, w]; peaks above 1, the rest up to 1.
    """
    probs = jax.nn.softmax(logits, axis=-1)[..., :-1]
    largest, label = probs.max(-1), probs.argmax(-1)
    height, width = largest.shape[1:]
    border = ((0, 0), (1, 1), (1, 1))
    around, labels = jnp.pad(largest, border), jnp.pad(label, border, constant_values=-1)
    is_peak = largest >= PEAK_FLOOR
    for y in range(3):
        for x in range(3):
            rows, columns = slice(y, y + height), slice(x, x + width)
            is_other = labels[:, rows, columns] != label
            is_peak &= is_other | (largest >= around[:, rows, columns])
    return largest + is_peak


class Attention(nnx.Module):
    """Multi-head attention, added to its first input and normalised.

    The projections of query, key and value lie in one kernel, in this order. The softmax is float32
    in every compute type.
    """

    def __init__(self, channels: int, num_heads: int, *, dtype: Any, rng: np.random.Generator):
        shape = channels, 3 * channels
        self.in_proj_kernel = nnx.Param(layers.glorot(rng, shape, *shape))
        self.in_proj_bias = nnx.Param(np.zeros(3 * channels, np.float32))
        self.out_proj = Linear(channels, channels, kernel_init=layers.glorot, dtype=dtype, rng=rng)
        self.norm = LayerNorm(channels, LAYER_NORM_EPSILON)
        self.num_heads, self.dtype = num_heads, dtype

    def __call__(
        self,
        x: jax.Array,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        is_seen: jax.Array | None = None,
    ) -> jax.Array:
        """Return norm(x + attention), [B, Q, C].

        Args:
          x: [B, Q, C].
          query: [B, Q, C].
          key: [B, S, C].
          value: [B, S, C].
          is_seen: bool [B, Q, S], what each query attends to; everything by default.
        """
        kernels = jnp.split(self.in_proj_kernel[...].astype(self.dtype), 3, axis=1)
        biases = jnp.split(self.in_proj_bias[...].astype(self.dtype), 3)
        q, k, v = (
            layers.affine(each.astype(self.dtype), kernel, bias)
            for each, kernel, bias in zip((query, key, value), kernels, biases, strict=True)
        )
        return self.norm(x + self.out_proj(ops.attend(q, k, v, self.num_heads, is_seen)))


class FeedForward(nnx.Module):
    """Two linear maps with a relu between, added to the input and normalised."""

    def __init__(self, channels: int, width: int, *, dtype: Any, rng: np.random.Generator):
        linear = functools.partial(
            Linear, kernel_init=layers.glorot, bias_init=layers.torch_uniform, dtype=dtype, rng=rng
        )
        self.linear1, self.linear2 = linear(channels, width), linear(width, channels)
        self.norm = LayerNorm(channels, LAYER_NORM_EPSILON)

    def __call__(self, x: jax.Array) -> jax.Array:  # [..., C] to the same
        return self.norm(x + self.linear2(ops.relu(self.linear1(x))))


class DualPathLayer(nnx.Module):
    """The pixels see the queries, then the queries see the new pixels and one another.

    Source: paper, "Dual-path update strategy". Values never carry positions.
    """

    def __init__(self, channels: int, num_heads: int, width: int, *, dtype: Any, rng: Any):
        attention = functools.partial(Attention, channels, num_heads, dtype=dtype, rng=rng)
        feed_forward = functools.partial(FeedForward, channels, width, dtype=dtype, rng=rng)
        self.pixel_cross, self.pixel_ffn = attention(), feed_forward()
        self.query_cross, self.query_self, self.query_ffn = attention(), attention(), feed_forward()

    def __call__(
        self,
        memory: Memory,
        query_positions: jax.Array,
        pixel_positions: jax.Array,
        is_seen: jax.Array,
        intermediates: dict,
        name: str,
    ) -> Memory:
        """Update both paths; `is_seen` is bool [B, N+A, P], `name` follows the intermediates'."""
        queries, pixels = memory
        placed = queries + query_positions
        pixels = self.pixel_cross(pixels, pixels + pixel_positions, placed, queries)
        intermediates[f"pixel_cross_{name}"] = pixels
        pixels = intermediates[f"pixel_ffn_{name}"] = self.pixel_ffn(pixels)
        queries = self.query_cross(queries, placed, pixels + pixel_positions, pixels, is_seen)
        intermediates[f"query_cross_{name}"] = queries
        placed = queries + query_positions
        queries = self.query_self(queries, placed, placed, queries)
        intermediates[f"query_self_{name}"] = queries
        queries = intermediates[f"query_ffn_{name}"] = self.query_ffn(queries)
        return Memory(queries, pixels)


class Head(nnx.Module):
    """Classes and masks of the queries, with mask features of its own from the pixels."""

    def __init__(self, channels: int, num_classes: int, *, dtype: Any, rng: np.random.Generator):
        linear = functools.partial(Linear, bias_init=layers.torch_uniform, dtype=dtype, rng=rng)
        self.norm = LayerNorm(channels, LAYER_NORM_EPSILON)
        widths = channels, channels, num_classes + 1
        self.classes = nnx.List([linear(channels, width) for width in widths])
        self.masks = nnx.List([linear(channels, channels) for _ in widths])
        self.features = linear(channels, channels)

    def __call__(
        self, queries: jax.Array, pixels: jax.Array, size: tuple[int, int], classifies: bool
    ) -> Prediction:
        """Predict for queries [B, N, C] on pixels [B, P, C] of a map of `size`."""
        queries = self.norm(queries)
        mask_logits = jnp.einsum(
            "bnc,bpc->bnp",
            _perceptron(self.masks, queries),
            self.features(pixels),
            preferred_element_type=jnp.float32,
        )
        logits = _perceptron(self.classes, queries).astype(jnp.float32) if classifies else None
        return Prediction(logits, mask_logits.reshape(*mask_logits.shape[:2], *size))


def _perceptron(linears: nnx.List, x: jax.Array) -> jax.Array:
    *hidden, last = linears
    for linear in hidden:
        x = ops.relu(linear(x))
    return last(x)


def seen_pixels(is_seen: jax.Array, num_auxiliary: int) -> jax.Array:
    """Open the attention of queries that would see nothing, and add the auxiliary ones.

    Args:
      is_seen: bool [B, N, h, w].
      num_auxiliary: A, which see everything.

    Returns:
      bool [B, N+A, P].
    """
    is_seen = is_seen.reshape(*is_seen.shape[:2], -1)
    is_seen |= ~is_seen.any(-1, keepdims=True)
    return jnp.pad(is_seen, ((0, 0), (0, num_auxiliary), (0, 0)), constant_values=True)


class DualPathDecoder(nnx.Module):
    """Queries from the map of stride 16, and L layers with a prediction head before and after each.

    The map of positions is learned and starts from zero, which is what the memory that the original
    takes without filling it mostly holds.

    Source: paper, "Dual-path update strategy", "GT mask-guided learning"; reference
    `transformer_decoder/fastinst_decoder.py`.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_classes: int,
        num_layers: int,
        num_queries: int,
        num_auxiliary: int,
        num_heads: int,
        ffn_width: int,
        dtype: Any,
        rng: np.random.Generator,
    ):
        side = round(num_queries**0.5)
        self.positions = nnx.Param(np.zeros((1, side, side, channels), np.float32))
        shape = num_auxiliary, channels
        self.auxiliary_features = nnx.Param(rng.standard_normal(shape, np.float32))
        self.auxiliary_positions = nnx.Param(rng.standard_normal(shape, np.float32))
        options: dict[str, Any] = dict(dtype=dtype, rng=rng)
        self.proposal = QueryProposal(channels, num_classes, **options)
        self.layers = nnx.List(
            [DualPathLayer(channels, num_heads, ffn_width, **options) for _ in range(num_layers)]
        )
        self.heads = nnx.List(
            [Head(channels, num_classes, **options) for _ in range(num_layers + 1)]
        )
        self.num_queries, self.num_auxiliary = num_queries, num_auxiliary

    def propose(
        self, y4: jax.Array, intermediates: dict
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Choose the queries from [B, h, w, C]; of a map with fewer places, all of them.

        Returns:
          Their features and positions [B, N, C], their locations [B, N, 2], and the logits
          [B, h * w, K+1].
        """
        batch, height, width, channels = y4.shape
        logits = self.proposal(y4)
        scores = proposal_scores(jax.lax.stop_gradient(logits)).reshape(batch, -1)
        _, index = jax.lax.top_k(scores, min(self.num_queries, height * width))
        features = jnp.take_along_axis(y4.reshape(batch, -1, channels), index[..., None], axis=1)
        positions = ops.resize_bilinear(self.positions[...], (height, width))
        positions = positions.reshape(-1, channels).astype(y4.dtype)[index]
        xs, ys = (np.linspace(0, 1, n, dtype=np.float32) for n in (width, height))
        locations = jnp.stack([jnp.asarray(xs)[index % width], jnp.asarray(ys)[index // width]], -1)
        intermediates |= {
            "proposal_cls_logits": logits,
            "proposal_score_map": scores,
            "proposal_index": index,
            "proposal_features": features,
            "proposal_positions": positions,
        }
        return features, positions, locations, logits.reshape(batch, -1, logits.shape[-1])

    def __call__(self, y3: jax.Array, y4: jax.Array, train: bool, intermediates: dict) -> Outputs:
        """Map the levels of strides 8 and 16 to the predictions."""
        batch, height, width, channels = y3.shape
        size = height, width
        features, positions, locations, proposal_logits = self.propose(y4, intermediates)
        repeated = (batch, self.num_auxiliary, channels)
        extra = (self.auxiliary_features, self.auxiliary_positions)
        features, query_positions = (
            jnp.concatenate([x, jnp.broadcast_to(more[...].astype(x.dtype), repeated)], axis=1)
            for x, more in zip((features, positions), extra, strict=True)
        )
        pixel_positions = ops.resize_bilinear(self.positions[...], size).astype(y3.dtype)
        pixel_positions = pixel_positions.reshape(1, -1, channels)
        memory = Memory(features, y3.reshape(batch, -1, channels))
        found = [self._predict(0, memory, size, train)]
        memories = []
        for i, layer in enumerate(self.layers):
            mask_logits = jax.lax.stop_gradient(found[-1].mask_logits)
            intermediates[f"mask_logits_{i}"] = jnp.moveaxis(mask_logits, 1, -1)
            is_seen = intermediates[f"is_seen_{i}"] = seen_pixels(
                mask_logits >= 0, self.num_auxiliary
            )
            memory = layer(memory, query_positions, pixel_positions, is_seen, intermediates, str(i))
            memories.append(memory)
            is_last = i + 1 == len(self.layers)
            found.append(self._predict(i + 1, memory, size, train or is_last))
        if not train:
            return Outputs((found[-1],), proposal_logits, locations, (), None, None)
        return Outputs(
            tuple(found),
            proposal_logits,
            locations,
            tuple(memories),
            query_positions,
            pixel_positions,
        )

    def guided(
        self, outputs: Outputs, is_seen: jax.Array, intermediates: dict
    ) -> tuple[Prediction, ...]:
        """Run each layer again, on its own result, where queries see what they have to find.

        Args:
          outputs: of training.
          is_seen: bool [B, N, H/8, W/8].
          intermediates: see `FastInst`.

        Returns:
          The prediction of the head after each layer.
        """
        size = is_seen.shape[2], is_seen.shape[3]
        is_seen = intermediates["guided_is_seen"] = seen_pixels(is_seen, self.num_auxiliary)
        found = []
        for i, (layer, memory) in enumerate(zip(self.layers, outputs.memory, strict=True)):
            places = outputs.query_positions, outputs.pixel_positions
            memory = layer(memory, *places, is_seen, intermediates, f"guided_{i}")
            found.append(self._predict(i + 1, memory, size, True))
        return tuple(found)

    def _predict(
        self, head: int, memory: Memory, size: tuple[int, int], classifies: bool
    ) -> Prediction:
        num_queries = memory.queries.shape[1] - self.num_auxiliary
        return self.heads[head](memory.queries[:, :num_queries], memory.pixels, size, classifies)


class FastInst(nnx.Module):
    """A backbone, the PPM-FPN pixel decoder and the dual-path decoder.

    Args:
      backbone: maps normalised images to res3, res4, res5; has `out_channels`.
      num_classes: K.
      channels: C.
      num_layers: L; 1 and 3 are published.
      num_queries: N, the most objects that one image can get in training.
      num_auxiliary: A, learned queries that take part in attention and predict nothing.
      num_heads: of attention.
      ffn_width: inner width of the feed-forward parts.
      dtype: compute type; parameters, softmaxes, norms' statistics and results are float32.
      rng: source of the initial weights.
    """

    learning_rate_factors = (("backbone", 0.1),)

    def __init__(
        self,
        backbone: Any,
        *,
        num_classes: int,
        channels: int = 256,
        num_layers: int = 3,
        num_queries: int = 100,
        num_auxiliary: int = 8,
        num_heads: int = 8,
        ffn_width: int = 1024,
        dtype: Any = jnp.float32,
        rng: np.random.Generator,
    ):
        self.backbone = backbone
        self.pixel_decoder = PixelDecoder(backbone.out_channels, channels, dtype=dtype, rng=rng)
        self.decoder = DualPathDecoder(
            channels,
            num_classes=num_classes,
            num_layers=num_layers,
            num_queries=num_queries,
            num_auxiliary=num_auxiliary,
            num_heads=num_heads,
            ffn_width=ffn_width,
            dtype=dtype,
            rng=rng,
        )

    @property
    def class_layers(self) -> tuple[str, ...]:
        """Paths of the layers with an output for each class."""
        heads = range(len(self.decoder.heads))
        return ("decoder/proposal/classify", *(f"decoder/heads/{i}/classes/2" for i in heads))

    @property
    def undecayed(self) -> tuple[str, ...]:
        """Words in paths of parameters that have no weight decay; the map of positions has."""
        return ("norm", "auxiliary", *getattr(self.backbone, "undecayed", ()))

    def __call__(
        self, images: jax.Array, train: bool = False, intermediates: dict | None = None
    ) -> Outputs:
        """Predict N masks for every image.

        Args:
          images: float [B, H, W, 3], normalised, 0 in the padding; H and W multiples of 32.
          train: whether all heads predict, and what the guided pass needs is kept.
          intermediates: an empty dict, to be filled with the named tensors on the way.

        Raises:
          ValueError: if H or W is no multiple of 32.
        """
        ops.require_padding(images, STRIDE)
        named = {} if intermediates is None else intermediates
        res3, res4, res5 = self.backbone(images, train, named)
        return self.decoder(*self.pixel_decoder(res3, res4, res5, named), train, named)

    def guided(
        self, outputs: Outputs, is_seen: jax.Array, intermediates: dict | None = None
    ) -> tuple[Prediction, ...]:
        """Run the guided pass of training, see `DualPathDecoder.guided`."""
        return self.decoder.guided(outputs, is_seen, {} if intermediates is None else intermediates)
