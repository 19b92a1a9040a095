"""Names and layouts of the original PyTorch release, as data.

The parameter paths of this package mirror the original's state dict, so most names only change
their separator: `encoder.fusion.weight` is `encoder/fusion/kernel`. The tables below say the rest.

Source: state dicts of hustvl/SparseInst (detectron2 ResNet, SparseInst encoder and decoders).
"""

from __future__ import annotations

from typing import NamedTuple


class Rename(NamedTuple):
    """A list of modules that is numbered or nested differently.

    `{}` stands for the index; the original's index is ours times `step`.
    """

    original: str
    ours: str
    step: int
    why: str


class Leaf(NamedTuple):
    """An array of a module: its name on either side, its rank, and the axes that make ours."""

    original: str
    ours: str
    rank: int
    axes: tuple[int, ...]
    why: str


class Ignored(NamedTuple):
    """A pattern of original names that hold nothing of the model."""

    pattern: str
    why: str


RENAMES = (
    Rename(
        "decoder.inst_branch.inst_convs.{}",
        "decoder/inst_branch/inst_convs/{}",
        2,
        "convolution and ReLU alternate in one nn.Sequential",
    ),
    Rename(
        "decoder.mask_branch.mask_convs.{}",
        "decoder/mask_branch/mask_convs/{}",
        2,
        "convolution and ReLU alternate in one nn.Sequential",
    ),
    Rename(
        "encoder.ppm.stages.{}.1",
        "encoder/ppm/stages/{}",
        1,
        "a stage is nn.Sequential(pooling, convolution)",
    ),
)

LEAVES = (
    Leaf("weight", "kernel", 4, (2, 3, 1, 0), "convolution (also grouped): OIHW to HWIO"),
    Leaf("weight", "kernel", 2, (1, 0), "linear: [out, in] to [in, out]"),
    Leaf("weight", "scale", 1, (0,), "normalisation"),
    Leaf("bias", "bias", 1, (0,), "convolution, linear or normalisation"),
    Leaf("running_mean", "mean", 1, (0,), "normalisation"),
    Leaf("running_var", "var", 1, (0,), "normalisation"),
    Leaf("softmax_bias", "softmax_bias", 1, (0,), "the scalar of the softmax decoder"),
)

IGNORED = (
    Ignored(r"pixel_(mean|std)", "constants of ops.normalize_images"),
    Ignored(r".*\.num_batches_tracked", "a counter that no forward pass reads"),
    Ignored(r"criterion\..*", "buffers of the loss"),
)
