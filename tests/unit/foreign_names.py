"""The names of other implementations, written out from their descriptions, for tests.

Each function gives pairs of a foreign name and the name in the original release. They are loops
over a network's stages and blocks, made without the package's rules, which they check.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

NORM = ("weight", "bias", "running_mean", "running_var")
Pairs = Iterator[tuple[str, str]]


def blocks(depths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(stage 1...4, block) of a ResNet."""
    for stage, depth in enumerate(depths, 1):
        for block in range(depth):
            yield stage, block


def _norms(theirs: str, ours: str, names: Sequence[str] = NORM) -> Pairs:
    for their_name, our_name in zip(names, NORM, strict=True):
        yield f"{theirs}.{their_name}", f"{ours}.{our_name}"


def detectron2_block(stage: int, block: int, conv: str) -> tuple[str, str]:
    """Convolution and norm of a block in the original's names of a ResNet of variant b."""
    module = f"res{stage + 1}.{block}.{conv}"
    return module, f"{module}.norm"


def timm_block(stage: int, block: int, conv: str) -> tuple[str, str]:
    """Convolution and norm of a block in the original's names of a ResNet of variant d."""
    module = f"layer{stage}.{block}"
    if conv == "shortcut":
        return f"{module}.downsample.1", f"{module}.downsample.2"
    return f"{module}.{conv}", f"{module}.bn{conv[-1]}"


def torchvision(depths: Sequence[int], deformable: Sequence[int] = ()) -> Pairs:
    """A ResNet of torchvision; its deformable stages as mmdetection names them."""
    yield "conv1.weight", "stem.conv1.weight"
    yield from _norms("bn1", "stem.conv1.norm")
    for stage, block in blocks(depths):
        theirs = f"layer{stage}.{block}"
        for number in (1, 2, 3):
            conv, norm = detectron2_block(stage, block, f"conv{number}")
            yield f"{theirs}.conv{number}.weight", f"{conv}.weight"
            yield from _norms(f"{theirs}.bn{number}", norm)
        if stage in deformable:
            ours = f"res{stage + 1}.{block}.conv2_offset"
            for leaf in ("weight", "bias"):
                yield f"{theirs}.conv2.conv_offset.{leaf}", f"{ours}.{leaf}"
        if block == 0:
            conv, norm = detectron2_block(stage, block, "shortcut")
            yield f"{theirs}.downsample.0.weight", f"{conv}.weight"
            yield from _norms(f"{theirs}.downsample.1", norm)


def mmdetection_d(depths: Sequence[int]) -> Pairs:
    """mmdetection's ResNetV1d: a stem of its own, timm's blocks."""
    for number, ours in ((0, "conv1.0"), (3, "conv1.3"), (6, "conv1.6")):
        yield f"stem.{number}.weight", f"{ours}.weight"
    for number, ours in ((1, "conv1.1"), (4, "conv1.4"), (7, "bn1")):
        yield from _norms(f"stem.{number}", ours)
    for stage, block in blocks(depths):
        for name in ("conv1", "conv2", "conv3", *(["shortcut"] if block == 0 else [])):
            conv, norm = timm_block(stage, block, name)
            yield f"{conv}.weight", f"{conv}.weight"
            yield from _norms(norm, norm)


def paddle(depths: Sequence[int], variant: str, deformable: Sequence[int] = ()) -> Pairs:
    """A ResNet of PaddleDetection; `deformable` are stages 1...4."""
    leaves = ("weight", "bias", "_mean", "_variance")

    def layer(theirs: str, conv: str, norm: str) -> Pairs:
        yield f"{theirs}.conv.weight", f"{conv}.weight"
        yield from _norms(f"{theirs}.norm", norm, leaves)

    if variant == "b":
        yield from layer("conv1.conv1", "stem.conv1", "stem.conv1.norm")
    else:
        yield from layer("conv1.conv1_1", "conv1.0", "conv1.1")
        yield from layer("conv1.conv1_2", "conv1.3", "conv1.4")
        yield from layer("conv1.conv1_3", "conv1.6", "bn1")
    name_block = detectron2_block if variant == "b" else timm_block
    for stage, block in blocks(depths):
        is_long = stage == 3 and depths[2] > 6  # ResNet-101 runs out of letters
        letter = f"b{block}" if is_long and block else "abcdef"[block]
        theirs = f"res{stage + 1}.res{stage + 1}{letter}"
        for branch, name in (("2a", "conv1"), ("2b", "conv2"), ("2c", "conv3")):
            yield from layer(f"{theirs}.branch{branch}", *name_block(stage, block, name))
        if stage in deformable:
            offset = name_block(stage, block, "conv2")[0] + "_offset"
            for leaf in ("weight", "bias"):
                yield f"{theirs}.branch2b.conv_offset.{leaf}", f"{offset}.{leaf}"
        if block == 0:
            is_pooled = variant == "d" and stage > 1
            inner = ".conv" if is_pooled else ""
            conv, norm = name_block(stage, block, "shortcut")
            yield f"{theirs}.short{inner}.conv.weight", f"{conv}.weight"
            yield from _norms(f"{theirs}.short{inner}.norm", norm, leaves)
