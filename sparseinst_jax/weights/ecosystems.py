"""Names and layouts of other implementations, as data: from theirs to the original release's.

All are written as they stand behind `backbone.`: in classification weights, which are a backbone
alone, nothing stands in front. What no rule speaks of has the original's name already, as the
encoder and the decoder have everywhere.

Source: PaddleDetection, pull request 7357; mmdetection 3, projects/SparseInst; torchvision;
detectron2, tools/convert-torchvision-to-d2.py; timm; the release of PVTv2.
"""

from __future__ import annotations

from typing import NamedTuple

from sparseinst_jax.weights.rules import Ignored, Leaf, Rename

_STAGES = (1, 2, 3, 4)  # layer1 is res2
_CONVS = (1, 2, 3)


class Ecosystem(NamedTuple):
    """An implementation's naming.

    Attributes:
      title: what files of whole networks with these names come from.
      backbone_title: what files with a backbone alone come from.
      evidence: a pattern of a name that only this naming has.
      renames: modules, to the original's.
      leaves: arrays, to the original's.
    """

    title: str
    backbone_title: str
    evidence: str
    renames: tuple[Rename, ...] = ()
    leaves: tuple[Leaf, ...] = ()


_NESTED = "the norm is inside its convolution in detectron2"
_POOL = "its shortcut is nn.Sequential(convolution, norm), without a pooling"
_TORCHVISION = (
    Rename("conv1", "stem.conv1", "detectron2 has a stem"),
    Rename("bn1", "stem.conv1.norm", _NESTED),
    *(
        rename
        for s in _STAGES
        for rename in (
            *(
                rename
                for j in _CONVS
                for rename in (
                    Rename(f"layer{s}.{{i}}.conv{j}", f"res{s + 1}.{{i}}.conv{j}", "res2 is first"),
                    Rename(f"layer{s}.{{i}}.bn{j}", f"res{s + 1}.{{i}}.conv{j}.norm", _NESTED),
                )
            ),
            Rename(
                f"layer{s}.{{i}}.conv2.conv_offset",
                f"res{s + 1}.{{i}}.conv2_offset",
                "the offsets of a deformable convolution are inside it",
            ),
            Rename(f"layer{s}.{{i}}.downsample.0", f"res{s + 1}.{{i}}.shortcut", _POOL),
            Rename(f"layer{s}.{{i}}.downsample.1", f"res{s + 1}.{{i}}.shortcut.norm", _POOL),
        )
    ),
)

# Variant d of mmdetection has timm's blocks, which are the original's, and a stem of its own.
_STEM = "the deep stem is one nn.Sequential, named stem"
_MMDETECTION_D = (
    *(Rename(f"stem.{k}", f"conv1.{k}", _STEM) for k in (0, 1, 3, 4, 6)),
    Rename("stem.7", "bn1", _STEM),
    *(
        Rename(
            f"layer{s}.{{i}}.conv2.conv_offset",
            f"layer{s}.{{i}}.conv2_offset",
            "the offsets of a deformable convolution are inside it",
        )
        for s in _STAGES
    ),
)

_WRAPPED = "a convolution and its norm lie in one layer"
# The blocks of a stage: a, b, c, ..., but a, b1, b2, ... in the long stages of ResNet-101.
_BLOCKS = ("{letter}", "b{i}")


def _paddle_block(s: int, block: str, is_variant_d: bool) -> tuple[Rename, ...]:
    """Modules of the blocks of a stage, to detectron2's names or, for variant d, to timm's."""
    theirs = f"res{s + 1}.res{s + 1}{block}"
    ours = f"layer{s}.{{i}}" if is_variant_d else f"res{s + 1}.{{i}}"
    norm = "bn{}" if is_variant_d else "conv{}.norm"
    shortcut = ("downsample.1", "downsample.2") if is_variant_d else ("shortcut", "shortcut.norm")
    pooled = "the shortcut that averages holds one more layer"
    return (
        *(
            rename
            for j, branch in zip(_CONVS, "abc", strict=True)
            for rename in (
                Rename(f"{theirs}.branch2{branch}.conv", f"{ours}.conv{j}", _WRAPPED),
                Rename(f"{theirs}.branch2{branch}.norm", f"{ours}.{norm.format(j)}", _WRAPPED),
            )
        ),
        Rename(f"{theirs}.branch2b.conv_offset", f"{ours}.conv2_offset", _WRAPPED),
        Rename(f"{theirs}.short.conv", f"{ours}.{shortcut[0]}", _WRAPPED),
        Rename(f"{theirs}.short.norm", f"{ours}.{shortcut[1]}", _WRAPPED),
        Rename(f"{theirs}.short.conv.conv", f"{ours}.{shortcut[0]}", pooled),
        Rename(f"{theirs}.short.conv.norm", f"{ours}.{shortcut[1]}", pooled),
    )


def _paddle_blocks(is_variant_d: bool) -> tuple[Rename, ...]:
    return tuple(
        rename
        for s in _STAGES
        for block in _BLOCKS
        for rename in _paddle_block(s, block, is_variant_d)
    )


_PADDLE_B = (
    Rename("conv1.conv1.conv", "stem.conv1", _WRAPPED),
    Rename("conv1.conv1.norm", "stem.conv1.norm", _WRAPPED),
    *_paddle_blocks(is_variant_d=False),
)
_PADDLE_D = (
    *(
        rename
        for k, conv, norm in ((1, "conv1.0", "conv1.1"), (2, "conv1.3", "conv1.4"))
        for rename in (
            Rename(f"conv1.conv1_{k}.conv", conv, _WRAPPED),
            Rename(f"conv1.conv1_{k}.norm", norm, _WRAPPED),
        )
    ),
    Rename("conv1.conv1_3.conv", "conv1.6", _WRAPPED),
    Rename("conv1.conv1_3.norm", "bn1", _WRAPPED),
    *_paddle_blocks(is_variant_d=True),
)
_PADDLE_LEAVES = (
    Leaf("weight", "weight", 2, (1, 0), "linear: [in, out] to [out, in]"),
    Leaf("_mean", "running_mean", 1, (0,), "Paddle's name"),
    Leaf("_variance", "running_var", 1, (0,), "Paddle's name"),
)

_ORIGINAL = "the original release"
# The first whose evidence is found is the one.
ECOSYSTEMS = (
    Ecosystem(
        "PaddleDetection (ResNet-vd)",
        "Paddle (ResNet-vd)",
        r"conv1\.conv1_1\.conv\.weight",
        _PADDLE_D,
        _PADDLE_LEAVES,
    ),
    Ecosystem(
        "PaddleDetection", "Paddle", r"conv1\.conv1\.conv\.weight", _PADDLE_B, _PADDLE_LEAVES
    ),
    Ecosystem(
        "mmdetection (ResNetV1d)", "mmpretrain (ResNetV1d)", r"stem\.0\.weight", _MMDETECTION_D
    ),
    Ecosystem(f"{_ORIGINAL} (ResNet-vd)", "timm (ResNet-d)", r"conv1\.0\.weight"),
    Ecosystem("mmdetection", "torchvision", r"layer1\.0\.conv1\.weight", _TORCHVISION),
    Ecosystem(_ORIGINAL, "detectron2", r"stem\.conv1\.weight"),
    Ecosystem(f"{_ORIGINAL} (DarkNet)", "timm (DarkNet)", r"stages\.0\.conv_down\.conv\.weight"),
    Ecosystem(f"{_ORIGINAL} (PVTv2)", "PVTv2", r"patch_embed1\.proj\.weight"),
)

# Beyond `original.IGNORED`; these are written with `backbone.` in front.
IGNORED = (
    Ignored(
        r"backbone\.(fc|stem\.fc|head|head\.fc|out)\.(weight|bias)", "the classifier of ImageNet"
    ),
    Ignored(r"data_preprocessor\.(mean|std)", "constants of ops.normalize_images"),
)
