"""What published SparseInst weights call each parameter, as data.

The paths of the model's parameters mirror the state dict of the original PyTorch release, so most
names only change their separator: `encoder/fusion/kernel` is `encoder.fusion.weight`. The table
says the rest. All known implementations have the same names outside of the backbone.

Source: state dicts of hustvl/SparseInst with each of its backbones and decoders.
"""

from __future__ import annotations

from sparseinst_jax.models.weight_names import Ignored, Leaf, Rename, WeightNames

_ALTERNATE = "convolution and ReLU alternate in one nn.Sequential"
NAMES = WeightNames(
    title="SparseInst",
    parts=("encoder", "decoder"),
    class_layers=("decoder.inst_branch.cls_score", "decoder.cls_backbone"),
    options="num_groups, normalizer",
    renames=(
        Rename(
            "decoder/inst_branch/inst_convs/{i}", "decoder.inst_branch.inst_convs.{2i}", _ALTERNATE
        ),
        Rename(
            "decoder/mask_branch/mask_convs/{i}", "decoder.mask_branch.mask_convs.{2i}", _ALTERNATE
        ),
        Rename(
            "encoder/ppm/stages/{i}",
            "encoder.ppm.stages.{i}.1",
            "a stage is nn.Sequential(pooling, convolution)",
        ),
    ),
    leaves=(Leaf("softmax_bias", "softmax_bias", 1, (0,), "the scalar of the softmax decoder"),),
    ignored=(Ignored(r"criterion\..*", "buffers of the loss"),),
)
