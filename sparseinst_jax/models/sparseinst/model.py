"""The SparseInst network: backbone, instance context encoder, IAM decoder.

To be read beside the paper: Cheng et al., "Sparse Instance Activation for Real-Time Instance
Segmentation", CVPR 2022, arXiv:2203.12827. Shapes: B batch, H W padded image in pixels, C channels,
N predicted masks, G groups of activation maps, D kernel width, K classes.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparseinst_jax.models import layers, ops
from sparseinst_jax.models.layers import Conv, Linear, PyramidPooling

STRIDE = 32  # the coarsest feature map's; padded sizes are multiples of it
MAP_STRIDE, MASK_STRIDE = 8, 4  # of the activation maps, and of the masks, which are twice as fine
NORMALIZER_FLOOR = EPSILON = 1e-6
PRIOR_BIAS = -float(np.log(99.0))  # sigmoid = 0.01: rare positives, as in RetinaNet

Normalizer = Literal["sigmoid", "softmax"]


class Outputs(NamedTuple):
    """What a model predicts for a batch.

    Attributes:
      class_logits: float32 [B, N, K].
      mask_logits: float32 [B, N, H/4, W/4]; in training [B, N, H/8, W/8], which the objective
        doubles where it needs them: for the gradient, only those that are matched.
      objectness_logits: float32 [B, N], logit of the predicted IoU.
    """

    class_logits: jax.Array
    mask_logits: jax.Array
    objectness_logits: jax.Array


class InstanceContextEncoder(nnx.Module):
    """Feature pyramid with pooled context, fused into one map of stride 8.

    Source: paper, "Instance Context Encoder"; reference `encoder.py`. No norm and no relu on the
    laterals, the outputs and the fusion. Position 0 of the lists is the coarsest level.
    """

    def __init__(
        self,
        in_channels: tuple[int, int, int],
        channels: int,
        *,
        dtype: Any,
        rng: np.random.Generator,
    ):
        conv = functools.partial(Conv, dtype=dtype, rng=rng)
        coarse_first = in_channels[::-1]
        self.fpn_laterals = nnx.List(
            [conv(c, channels, 1, kernel_init=layers.xavier) for c in coarse_first]
        )
        self.fpn_outputs = nnx.List(
            [conv(channels, channels, 3, kernel_init=layers.xavier) for _ in coarse_first]
        )
        self.ppm = PyramidPooling(channels, dtype=dtype, rng=rng)
        self.fusion = conv(3 * channels, channels, 1, kernel_init=layers.msra)

    def __call__(
        self, res3: jax.Array, res4: jax.Array, res5: jax.Array, intermediates: dict
    ) -> jax.Array:
        """Map res3, res4, res5 to [B, H/8, W/8, C]."""
        lateral = intermediates["lateral_coarsest"] = self.fpn_laterals[0](res5)
        p5 = intermediates["ppm"] = self.ppm(lateral)
        # The top-down path carries the sums before the 3x3 output convolutions.
        p4 = self.fpn_laterals[1](res4) + ops.upsample_nearest_x2(p5)
        p3 = self.fpn_laterals[2](res3) + ops.upsample_nearest_x2(p4)
        names = ("fpn_out_coarsest", "fpn_out_middle", "fpn_out_finest")
        levels = []
        for name, output, level in zip(names, self.fpn_outputs, (p5, p4, p3), strict=True):
            intermediates[name] = output(level)
            levels.insert(0, ops.resize_bilinear(intermediates[name], p3.shape[1:3]))
        encoded = self.fusion(jnp.concatenate(levels, axis=-1))  # finest first
        intermediates["encoder"] = encoded
        return encoded


def _conv_stack(in_channels: int, channels: int, depth: int, conv) -> nnx.List:
    inputs = [in_channels] + [channels] * (depth - 1)
    return nnx.List([conv(c, channels, 3, kernel_init=layers.msra) for c in inputs])


def _run_stack(convs: nnx.List, features: jax.Array, grid: jax.Array) -> jax.Array:
    """Convolve again and again; the first sees the coordinates before the features."""
    features = ops.relu(convs[0](features, shared=grid))
    for conv in convs[1:]:
        features = ops.relu(conv(features))
    return features


class InstanceBranch(nnx.Module):
    """Instance activation maps, the features pooled under them, and their three heads.

    For map n of group g with logits a: A = f(a) / sum(f(a)) over all pixels, where f is the sigmoid
    (or exp, which makes A a softmax), and the instance feature z_n is the concatenation over g of
    sum_pixels A_gn x. With one group there is no `fc` and the heads are C wide.

    Source: paper, "Instance Activation Maps" and "Group"; reference `decoder.py`.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        channels: int,
        num_convs: int,
        num_masks: int,
        num_groups: int,
        num_classes: int,
        kernel_dim: int,
        normalizer: Normalizer,
        dtype: Any,
        rng: np.random.Generator,
    ):
        conv = functools.partial(Conv, dtype=dtype, rng=rng)
        linear = functools.partial(Linear, dtype=dtype, rng=rng)
        self.inst_convs = _conv_stack(in_channels, channels, num_convs, conv)
        self.iam_conv = conv(
            channels,
            num_groups * num_masks,
            3,
            groups=num_groups,
            kernel_init=layers.normal(0.01),
            bias_init=layers.constant(PRIOR_BIAS),
        )
        width = channels * num_groups
        if num_groups > 1:
            self.fc = linear(width, width, kernel_init=layers.xavier)
        self.cls_score = linear(
            width,
            num_classes,
            kernel_init=layers.normal(0.01),
            bias_init=layers.constant(PRIOR_BIAS),
        )
        self.mask_kernel = linear(width, kernel_dim, kernel_init=layers.normal(0.01))
        self.objectness = linear(width, 1, bias_init=layers.torch_uniform)
        if normalizer == "softmax":
            # Added to every logit of a softmax, it cannot change a result; it is kept because
            # published weights hold it.
            self.softmax_bias = nnx.Param(np.ones((1,), np.float32))
        self.num_masks, self.num_groups, self.normalizer = num_masks, num_groups, normalizer

    def activate(self, iam_logits: jax.Array) -> jax.Array:
        """Return what each pixel counts in each map, before the sum is divided out: 0..1, float32.

        For a softmax it is the share of the map's highest pixel.
        """
        logits = iam_logits.astype(jnp.float32)
        if self.normalizer == "softmax":
            logits = logits + self.softmax_bias[...]
            return jnp.exp(logits - jax.lax.stop_gradient(logits.max((1, 2), keepdims=True)))
        return jax.nn.sigmoid(logits)

    def pool(self, weight: jax.Array, features: jax.Array) -> jax.Array:
        """Return the instance features [B, N, G*C] of maps [B, h, w, G*N] over [B, h, w, C].

        The maps and their sums are float32 in every compute type.
        """
        total = jnp.maximum(weight.sum((1, 2)), NORMALIZER_FLOOR)  # [B, G*N]
        pooled = jnp.einsum(
            "bhwm,bhwc->bmc",
            weight.astype(features.dtype),
            features,
            preferred_element_type=jnp.float32,
        )
        pooled = pooled / total[..., None]
        # Map channels are (group, mask); features regroup to (mask, group, channel).
        batch, _, channels = pooled.shape
        pooled = pooled.reshape(batch, self.num_groups, self.num_masks, channels)
        return pooled.transpose(0, 2, 1, 3).reshape(batch, self.num_masks, -1)

    def __call__(
        self, features: jax.Array, grid: jax.Array, intermediates: dict
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return class logits [B,N,K], mask kernels [B,N,D] and objectness [B,N].

        Args:
          features: [B, h, w, C].
          grid: [1, h, w, 2], the coordinates.
          intermediates: see `SparseInst`.
        """
        features = intermediates["inst_convs"] = _run_stack(self.inst_convs, features, grid)
        iam_logits = intermediates["iam"] = self.iam_conv(features)
        maps = intermediates["instance_activation_maps"] = self.activate(iam_logits)
        instances = self.pool(maps, features)
        if self.num_groups > 1:
            instances = intermediates["inst_fc"] = self.fc(instances)
            instances = ops.relu(instances)
        intermediates["instance_features"] = instances
        objectness = self.objectness(instances)[..., 0]
        return self.cls_score(instances), self.mask_kernel(instances), objectness


class MaskBranch(nnx.Module):
    """Convolutions and a projection to the D mask features that kernels are multiplied with."""

    def __init__(
        self,
        in_channels: int,
        *,
        channels: int,
        num_convs: int,
        kernel_dim: int,
        dtype: Any,
        rng: np.random.Generator,
    ):
        conv = functools.partial(Conv, dtype=dtype, rng=rng)
        self.mask_convs = _conv_stack(in_channels, channels, num_convs, conv)
        self.projection = conv(channels, kernel_dim, 1, kernel_init=layers.msra)

    def __call__(self, features: jax.Array, grid: jax.Array) -> jax.Array:
        """Map [B, h, w, C] and the coordinates [1, h, w, 2] to [B, h, w, D]."""
        return self.projection(_run_stack(self.mask_convs, features, grid))


class IAMDecoder(nnx.Module):
    """Coordinates, the instance and mask branches, and their product: the masks.

    With `backbone_channels` (ours, not in the paper) the backbone's own features, averaged under
    each predicted mask, have a say in its class. Activation maps are wider than their objects, and
    an encoder that was not trained on the user's classes may have dropped what tells them apart;
    the features of an ImageNet network under the mask do tell them apart.

    Attributes:
      instance_branch: class of the instance branch, for a subclass to replace.
    """

    instance_branch: Any = InstanceBranch

    def __init__(
        self,
        in_channels: int,
        *,
        channels: int,
        num_convs: int,
        kernel_dim: int,
        num_classes: int,
        backbone_channels: int = 0,
        dtype: Any,
        rng: np.random.Generator,
        **instance_options: Any,
    ):
        shared: dict[str, Any] = dict(
            channels=channels, num_convs=num_convs, kernel_dim=kernel_dim, dtype=dtype, rng=rng
        )
        self.inst_branch = self.instance_branch(
            in_channels + 2, num_classes=num_classes, **shared, **instance_options
        )
        self.mask_branch = MaskBranch(in_channels + 2, **shared)
        if backbone_channels:
            options: dict[str, Any] = dict(kernel_init=layers.normal(0.01), dtype=dtype, rng=rng)
            self.cls_backbone = Linear(backbone_channels, num_classes, **options)

    def __call__(
        self,
        features: jax.Array,
        train: bool,
        intermediates: dict,
        backbone: jax.Array | None = None,
    ) -> Outputs:
        """Map the encoder's [B, H/8, W/8, C] to the predictions.

        Args:
          features: of the encoder.
          train: leaves the masks at stride 8, see `Outputs`.
          intermediates: see `SparseInst`.
          backbone: [B, H/8, W/8, `backbone_channels`], where the decoder was made with some.
        """
        height, width = features.shape[1:3]
        grid = jnp.asarray(ops.coordinates(height, width), features.dtype)[None]
        instances = self.inst_branch(features, grid, intermediates)
        class_logits, mask_kernels, objectness_logits = instances
        mask_features = self.mask_branch(features, grid)
        intermediates["mask_kernels"] = mask_kernels
        intermediates["mask_features"] = mask_features
        mask_logits = jnp.einsum(
            "bnd,bhwd->bnhw", mask_kernels, mask_features, preferred_element_type=jnp.float32
        )
        if backbone is not None:
            class_logits += self.cls_backbone(_under_masks(backbone, mask_logits))
        if not train:
            mask_logits = ops.resize_bilinear(mask_logits, (2 * height, 2 * width), axes=(2, 3))
        return Outputs(
            class_logits.astype(jnp.float32), mask_logits, objectness_logits.astype(jnp.float32)
        )


def _under_masks(features: jax.Array, mask_logits: jax.Array) -> jax.Array:
    """Means [B, N, C] of [B, h, w, C] in the masks [B, N, h, w], of unit mean square.

    A class is no reason to change a mask: no gradient reaches it.
    """
    mask = jax.lax.stop_gradient(jax.nn.sigmoid(mask_logits))
    sums = jnp.einsum("bnhw,bhwc->bnc", mask, features, preferred_element_type=jnp.float32)
    means = sums / (mask.sum((2, 3))[..., None] + EPSILON)
    return means / jnp.sqrt((means * means).mean(-1, keepdims=True) + EPSILON)


class SparseInst(nnx.Module):
    """A backbone, the instance context encoder and an IAM decoder.

    Args:
      backbone: maps normalised images to res3, res4, res5; has `out_channels`.
      num_classes: K.
      encoder_channels: C of the encoder's map.
      decoder_channels: C of the decoder's branches.
      decoder_convs: 3x3 convolutions in each branch.
      num_masks: N, the most objects that one image can get.
      num_groups: G; 1 is the plain IAM decoder, 4 the published grouped one (G-IAM).
      kernel_dim: D.
      normalizer: how activation maps are normalised over the pixels.
      class_from_backbone: whether res3 and res4 have a say in the classes, see `IAMDecoder`.
      dtype: compute type; parameters, normalisers and results are float32.
      rng: source of the initial weights.

    Attributes:
      make_decoder: class of the decoder, for a subclass to replace.

    Raises:
      ValueError: if `decoder_channels` is no multiple of `num_groups`.
    """

    make_decoder: Any = IAMDecoder

    def __init__(
        self,
        backbone: Any,
        *,
        num_classes: int,
        encoder_channels: int = 256,
        decoder_channels: int = 256,
        decoder_convs: int = 4,
        num_masks: int = 100,
        num_groups: int = 4,
        kernel_dim: int = 128,
        normalizer: Normalizer = "sigmoid",
        class_from_backbone: bool = False,
        dtype: Any = jnp.float32,
        rng: np.random.Generator,
    ):
        if decoder_channels % num_groups:
            raise ValueError(
                f"decoder_channels must be a multiple of num_groups, got {decoder_channels} and "
                f"{num_groups}: each group of activation maps sees its own slice of the channels. "
                f"Use decoder_channels={-(-decoder_channels // num_groups) * num_groups}."
            )
        self.backbone, self.class_from_backbone = backbone, class_from_backbone
        self.encoder = InstanceContextEncoder(
            backbone.out_channels, encoder_channels, dtype=dtype, rng=rng
        )
        self.decoder = self.make_decoder(
            encoder_channels,
            channels=decoder_channels,
            num_convs=decoder_convs,
            num_masks=num_masks,
            num_groups=num_groups,
            num_classes=num_classes,
            kernel_dim=kernel_dim,
            normalizer=normalizer,
            backbone_channels=class_from_backbone * sum(backbone.out_channels[:2]),
            dtype=dtype,
            rng=rng,
        )

    @property
    def class_layers(self) -> tuple[str, ...]:
        """Paths of the layers with an output for each class."""
        layers = ("decoder/inst_branch/cls_score", "decoder/cls_backbone")
        return layers[: 1 + self.class_from_backbone]

    @property
    def undecayed(self) -> tuple[str, ...]:
        """Words in paths of parameters that have no weight decay.

        The original exempts a parameter by such a word, and nothing else: biases of convolutions
        and linear layers do decay.
        """
        return ("norm", *getattr(self.backbone, "undecayed", ()))

    def __call__(
        self, images: jax.Array, train: bool = False, intermediates: dict | None = None
    ) -> Outputs:
        """Predict N masks for every image.

        Args:
          images: float [B, H, W, 3], normalised, 0 in the padding; H and W multiples of 32.
          train: whether trainable batch norm uses and updates the statistics of the batch.
          intermediates: an empty dict, to be filled with the named tensors on the way, NHWC.

        Raises:
          ValueError: if H or W is no multiple of 32.
        """
        ops.require_padding(images, STRIDE)
        named = {} if intermediates is None else intermediates
        res3, res4, res5 = self.backbone(images, train, named)
        encoded = self.encoder(res3, res4, res5, named)
        if not self.class_from_backbone:
            return self.decoder(encoded, train, named)
        seen = jnp.concatenate([res3, ops.upsample_nearest_x2(res4)], axis=-1)
        return self.decoder(encoded, train, named, seen)
