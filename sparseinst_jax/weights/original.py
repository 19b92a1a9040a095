"""Names and layouts of the original PyTorch release, as data: from ours to the original's.

The parameter paths of this package mirror the original's state dict, so most names only change
their separator: `encoder/fusion/kernel` is `encoder.fusion.weight`. The tables below say the rest.
The original takes its backbones from others, and their names with them: ResNet from detectron2
(mirrored), ResNet-50-vd and DarkNet from timm, PVTv2 from its release (both mirrored but for the
former, whose modules `RESNET_D` lists).

Source: state dicts of hustvl/SparseInst with each of its backbones and decoders.
"""

from __future__ import annotations

from sparseinst_jax.weights.rules import Ignored, Leaf, Rename

RENAMES = (
    Rename(
        "decoder/inst_branch/inst_convs/{i}",
        "decoder.inst_branch.inst_convs.{twice_i}",
        "convolution and ReLU alternate in one nn.Sequential",
    ),
    Rename(
        "decoder/mask_branch/mask_convs/{i}",
        "decoder.mask_branch.mask_convs.{twice_i}",
        "convolution and ReLU alternate in one nn.Sequential",
    ),
    Rename(
        "encoder/ppm/stages/{i}",
        "encoder.ppm.stages.{i}.1",
        "a stage is nn.Sequential(pooling, convolution)",
    ),
)

_STEM_D = "convolution, norm and ReLU alternate in one nn.Sequential; the last norm is outside"
_POOLED = "a shortcut is nn.Sequential(pooling or nothing, convolution, norm)"
# Only where the backbone is a ResNet of variant d; variant b has detectron2's names, as ours.
RESNET_D = (
    Rename("backbone/stem/conv1", "backbone.conv1.0", _STEM_D),
    Rename("backbone/stem/conv1/norm", "backbone.conv1.1", _STEM_D),
    Rename("backbone/stem/conv2", "backbone.conv1.3", _STEM_D),
    Rename("backbone/stem/conv2/norm", "backbone.conv1.4", _STEM_D),
    Rename("backbone/stem/conv3", "backbone.conv1.6", _STEM_D),
    Rename("backbone/stem/conv3/norm", "backbone.bn1", _STEM_D),
    *(
        rename
        for s in (1, 2, 3, 4)
        for rename in (
            *(
                Rename(
                    f"backbone/res{s + 1}/{{i}}/conv{j}/norm",
                    f"backbone.layer{s}.{{i}}.bn{j}",
                    "norms lie beside their convolutions",
                )
                for j in (1, 2, 3)
            ),
            *(
                Rename(
                    f"backbone/res{s + 1}/{{i}}/{conv}",
                    f"backbone.layer{s}.{{i}}.{conv}",
                    "stages count from 1",
                )
                for conv in ("conv1", "conv2", "conv3", "conv2_offset")
            ),
            Rename(
                f"backbone/res{s + 1}/{{i}}/shortcut",
                f"backbone.layer{s}.{{i}}.downsample.1",
                _POOLED,
            ),
            Rename(
                f"backbone/res{s + 1}/{{i}}/shortcut/norm",
                f"backbone.layer{s}.{{i}}.downsample.2",
                _POOLED,
            ),
        )
    ),
)

LEAVES = (
    Leaf("kernel", "weight", 4, (3, 2, 0, 1), "convolution (also grouped): HWIO to OIHW"),
    Leaf("kernel", "weight", 2, (1, 0), "linear: [in, out] to [out, in]"),
    Leaf("scale", "weight", 1, (0,), "normalisation"),
    Leaf("bias", "bias", 1, (0,), "convolution, linear or normalisation"),
    Leaf("mean", "running_mean", 1, (0,), "normalisation"),
    Leaf("var", "running_var", 1, (0,), "normalisation"),
    Leaf("softmax_bias", "softmax_bias", 1, (0,), "the scalar of the softmax decoder"),
)

# Of ours: arrays that the original has no place for.
OURS_ALONE = (Ignored(r".*/drop_path_step", "counts training steps for the random paths"),)

# Of the original's.
IGNORED = (
    Ignored(r"pixel_(mean|std)", "constants of ops.normalize_images"),
    Ignored(r".*\.num_batches_tracked", "a counter that no forward pass reads"),
    Ignored(r"criterion\..*", "buffers of the loss"),
)
