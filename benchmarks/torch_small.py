"""The network, losses and recipe of `finetune_lite` once more, in plain PyTorch.

  python benchmarks/torch_small.py START.npz LEARNED.npz

`python -m benchmarks.small_networks trials --only lite --torch PYTHON` calls it. START has the
first weights, the learning rates and every batch of a trial; LEARNED gets the weights after the
last step under the names of the original release, and the package scores both sides alike. START
also has what the package's own first steps gave, and the differences from them are printed: of the
terms of the loss and the gradient's norm, relative; of the weights, how far the two sides are apart
in shares of the way that they have come.

Convolutions, norms, resizing, AdamW and clipping are PyTorch's own. Eager, channels last, on a CPU.
Needs torch, NumPy and SciPy, and nothing of this package.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

PIXEL_MEAN, PIXEL_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
BACKBONE_MEAN, BACKBONE_STD = 127.0, 128.0
# Lite0's seven stages: kernel size, stride, widening, blocks, channels.
STAGES = (
    (3, 1, 1, 1, 16),
    (3, 2, 6, 2, 24),
    (5, 2, 6, 2, 40),
    (3, 2, 6, 3, 80),
    (5, 1, 6, 3, 112),
    (5, 2, 6, 4, 192),
    (3, 1, 6, 1, 320),
)
STEM, MAPS = 32, (2, 4, 6)  # the stages whose results are the maps of strides 8, 16 and 32
CHANNELS, GROUPS, MASKS, KERNEL, POOLED = 64, 4, 50, 32, (1, 2, 3, 6)
FROZEN = ("backbone.conv_stem.", "backbone.blocks.0.", "backbone.blocks.1.")
# What the learning rate is multiplied by, by the beginning of a name.
RATES = {"backbone.": 0.1, "decoder.inst_branch.cls_score.": 20.0, "decoder.cls_backbone.": 20.0}
WEIGHT_DECAY, CLIP_NORM = 0.05, 5.0


def bilinear(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Resize [B, C, H, W]."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def conv(inputs: int, outputs: int, side: int = 1, groups: int = 1) -> nn.Conv2d:
    """Make a convolution with a bias that keeps the size."""
    return nn.Conv2d(inputs, outputs, side, padding=side // 2, groups=groups)


def two_convs(inputs: int) -> nn.Sequential:
    """Make the beginning of a branch of the decoder."""
    first, second = conv(inputs, CHANNELS, 3), conv(CHANNELS, CHANNELS, 3)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU())


class SameConv(nn.Conv2d):
    """With TensorFlow's padding: of an odd border the larger part is behind."""

    def __init__(self, inputs: int, outputs: int, side: int = 1, stride: int = 1, groups: int = 1):
        super().__init__(inputs, outputs, side, stride, groups=groups, bias=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map [B, in, H, W] to [B, out, ceil(H / stride), ceil(W / stride)]."""
        (side, _), (stride, _), border = self.kernel_size, self.stride, []
        for length in (input.shape[3], input.shape[2]):
            whole = max((-(-length // stride) - 1) * stride + side - length, 0)
            border += [whole // 2, whole - whole // 2]
        return super().forward(F.pad(input, border) if any(border) else input)


class Block(nn.Sequential):
    """Widen, convolve each channel alone, narrow; the first stage does not widen."""

    def __init__(self, inputs: int, outputs: int, side: int, stride: int, widening: int):
        inner, layers = inputs * widening, OrderedDict()
        names = ("conv_pw", "conv_dw", "conv_pwl") if widening > 1 else ("conv_dw", "conv_pw")
        shapes = ((inputs, inner), (inner, inner, side, stride, inner), (inner, outputs))
        for number, name in enumerate(names, start=1):
            shape = shapes[number - 1 - len(names)]
            layers[name] = SameConv(*shape)
            layers[f"bn{number}"] = nn.BatchNorm2d(shape[1], eps=1e-3)
            layers[f"relu{number}"] = nn.ReLU6()
        layers.popitem()  # nothing follows the last norm
        super().__init__(layers)
        self.is_added = stride == 1 and inputs == outputs

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map [B, in, H, W] to [B, out, ceil(H / stride), ceil(W / stride)]."""
        return super().forward(input) + (input if self.is_added else 0)


class Backbone(nn.Module):
    """EfficientNet-Lite0 without its head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem, self.bn1 = SameConv(3, STEM, 3, 2), nn.BatchNorm2d(STEM, eps=1e-3)
        self.blocks, before = nn.ModuleList(), STEM
        for side, stride, widening, depth, channels in STAGES:
            stage = nn.Sequential()
            for block in range(depth):
                stage.append(Block(before, channels, side, 1 if block else stride, widening))
                before = channels
            self.blocks.append(stage)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Map [B, 3, H, W] to the maps of strides 8, 16 and 32."""
        found = [F.relu6(self.bn1(self.conv_stem(x)))]
        for stage in self.blocks:
            found.append(stage(found[-1]))
        return [found[1 + number] for number in MAPS]


class PyramidPooling(nn.Module):
    """Means over windows of four sizes, joined with the map itself."""

    def __init__(self) -> None:
        super().__init__()
        part = CHANNELS // len(POOLED)
        stages = (nn.Sequential(nn.AdaptiveAvgPool2d(n), conv(CHANNELS, part)) for n in POOLED)
        self.stages, self.bottleneck = nn.ModuleList(stages), conv(2 * CHANNELS, CHANNELS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, C, h, w] to the same."""
        pooled = [bilinear(F.relu(stage(x)), x.shape[2:]) for stage in self.stages]
        return F.relu(self.bottleneck(torch.cat([*pooled, x], 1)))


class Encoder(nn.Module):
    """Three levels into one of stride 8; position 0 of the lists is the coarsest."""

    def __init__(self, inputs: Sequence[int]):
        super().__init__()
        self.fpn_laterals = nn.ModuleList(conv(number, CHANNELS) for number in inputs[::-1])
        self.fpn_outputs = nn.ModuleList(conv(CHANNELS, CHANNELS, 3) for _ in inputs)
        self.ppm, self.fusion = PyramidPooling(), conv(3 * CHANNELS, CHANNELS)

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Map the backbone's three maps to [B, C, H / 8, W / 8]."""
        coarse, middle, fine = (f(x) for f, x in zip(self.fpn_laterals, maps[::-1], strict=True))
        coarse = self.ppm(coarse)
        middle = middle + F.interpolate(coarse, scale_factor=2.0)
        levels = coarse, middle, fine + F.interpolate(middle, scale_factor=2.0)
        outputs = [f(x) for f, x in zip(self.fpn_outputs, levels, strict=True)]
        return self.fusion(torch.cat([bilinear(x, fine.shape[2:]) for x in outputs[::-1]], 1))


class InstanceBranch(nn.Module):
    """Activation maps, the features under them, and three heads."""

    def __init__(self, classes: int):
        super().__init__()
        self.inst_convs, width = two_convs(CHANNELS + 2), CHANNELS * GROUPS
        self.iam_conv = conv(CHANNELS, GROUPS * MASKS, 3, GROUPS)
        self.fc, self.cls_score = nn.Linear(width, width), nn.Linear(width, classes)
        self.mask_kernel, self.objectness = nn.Linear(width, KERNEL), nn.Linear(width, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return class logits [B, N, K], kernels [B, N, D] and objectness logits [B, N]."""
        x = self.inst_convs(x)
        maps = self.iam_conv(x).sigmoid().flatten(2)
        pooled = maps @ x.flatten(2).transpose(1, 2) / maps.sum(-1, keepdim=True).clamp(min=1e-6)
        # Channels count (group, mask); each mask gets its groups one after the other.
        pooled = pooled.unflatten(1, (GROUPS, MASKS)).transpose(1, 2).flatten(2)
        found = F.relu(self.fc(pooled))
        return self.cls_score(found), self.mask_kernel(found), self.objectness(found)[..., 0]


class Decoder(nn.Module):
    """G-IAM, and the backbone's features under each mask for its class."""

    def __init__(self, classes: int, seen_channels: int):
        super().__init__()
        self.inst_branch = InstanceBranch(classes)
        parts = {"mask_convs": two_convs(CHANNELS + 2), "projection": conv(CHANNELS, KERNEL)}
        self.mask_branch = nn.Sequential(OrderedDict(parts))
        self.cls_backbone = nn.Linear(seen_channels, classes)

    def forward(self, x: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return class logits [B, N, K], mask logits [B, N, h, w], objectness logits [B, N]."""
        axes = (torch.linspace(-1, 1, length) for length in x.shape[2:])
        rows, columns = torch.meshgrid(*axes, indexing="ij")
        x = torch.cat([torch.stack([columns, rows]).expand(len(x), -1, -1, -1), x], 1)
        logits, kernels, objectness = self.inst_branch(x)
        masks = torch.einsum("bnd,bdhw->bnhw", kernels, self.mask_branch(x))
        share = masks.detach().sigmoid().flatten(2)  # a class is no reason to change a mask
        means = share @ seen.flatten(2).transpose(1, 2) / (share.sum(-1, keepdim=True) + 1e-6)
        means = means / (means.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return logits + self.cls_backbone(means), masks, objectness


class Network(nn.Module):
    """SparseInst with Lite0, as `finetune_lite` describes it."""

    def __init__(self, classes: int):
        super().__init__()
        channels = [STAGES[number][-1] for number in MAPS]
        self.backbone, self.encoder = Backbone(), Encoder(channels)
        self.decoder = Decoder(classes, sum(channels[:2]))

    def forward(self, images: torch.Tensor, valid_size: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Take uint8 [B, H, W, 3] and [B, 2], (height, width) of the content."""
        mean, deviation = torch.tensor(PIXEL_MEAN), torch.tensor(PIXEL_STD)
        x = (images.float() - mean) / deviation
        inside = [torch.arange(n) < valid_size[:, i, None] for i, n in enumerate(x.shape[1:3])]
        x = x * (inside[0][:, :, None] & inside[1][:, None])[..., None]  # the padding: mean colour
        x = x * (deviation / BACKBONE_STD) + (mean - BACKBONE_MEAN) / BACKBONE_STD
        maps = self.backbone(x.permute(0, 3, 1, 2))
        seen = torch.cat([maps[0], F.interpolate(maps[1], scale_factor=2.0)], 1)
        return self.decoder(self.encoder(maps), seen)


class Batch(NamedTuple):
    """One step's images and targets, as the package's loader makes them."""

    images: torch.Tensor  # uint8 [B, H, W, 3]
    valid_size: torch.Tensor  # int32 [B, 2]
    labels: torch.Tensor  # int32 [B, M]
    masks: torch.Tensor  # uint8 [B, M, H / 4, W / 4], in levels 0 to 4
    is_target: torch.Tensor  # bool [B, M]


@torch.no_grad()
def match(logits: torch.Tensor, masks: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the pairs [P, 3]: image, prediction, target."""
    t = batch.masks.flatten(2) / 4
    p = bilinear(masks, batch.masks.shape[2:]).sigmoid().flatten(2)
    squares = p.square().sum(-1)[:, :, None] + t.square().sum(-1)[:, None]
    dice = 2 * p @ t.transpose(1, 2) / (squares + 1e-4)
    classes = batch.labels.long()[:, None].expand_as(dice)
    score = dice**0.8 * logits.sigmoid().gather(2, classes) ** 0.2
    pairs: list[tuple[int, int, int]] = []
    for image, is_target in enumerate(batch.is_target.numpy()):
        (targets,) = np.nonzero(is_target)
        queries, chosen = linear_sum_assignment(score[image].numpy()[:, targets], maximize=True)
        pairs += [(image, q, t) for q, t in zip(queries, targets[chosen], strict=True)]
    return torch.tensor(pairs, dtype=torch.long).reshape(-1, 3)


def losses(outputs: Sequence[torch.Tensor], batch: Batch) -> dict[str, torch.Tensor]:
    """Return the four terms with their weights."""
    logits, masks, objectness = outputs
    image, query, target = match(logits, masks, batch).T
    number, matched = max(int(batch.is_target.sum()), 1), max(len(image), 1)
    one_hot = torch.zeros_like(logits)
    one_hot[image, query, batch.labels.long()[image, target]] = 1
    entropy = F.binary_cross_entropy_with_logits
    alpha, miss = 0.25 * one_hot + 0.75 * (1 - one_hot), logits.sigmoid() - one_hot
    focal = alpha * miss.square() * entropy(logits, one_hot, reduction="none")
    t = batch.masks[image, target].flatten(1) / 4
    x = bilinear(masks[image, query][:, None], batch.masks.shape[2:]).flatten(1)
    p = x.sigmoid()
    dice = 1 - 2 * (p * t).sum(1) / (p.square().sum(1) + t.square().sum(1) + 1e-4)
    found, wanted = p.detach() >= 0.4, t > 0.5
    iou = (found & wanted).sum(1) / ((found | wanted).sum(1) + 1e-6)
    return {
        "class": 2 * focal.sum() / number,
        "mask": 5 * entropy(x, t, reduction="none").mean(1).sum() / matched,
        "dice": 2 * dice.sum() / number,
        "objectness": entropy(objectness[image, query], iou, reduction="sum") / matched,
    }


def make_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """AdamW with a group for each factor of the learning rate; what is frozen is in none."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        is_of_norm = name.split(".")[-2].startswith("bn")
        parameter.requires_grad_(not is_of_norm and not name.startswith(FROZEN))
        if parameter.requires_grad:
            rates = [rate for start, rate in RATES.items() if name.startswith(start)]
            groups.setdefault(rates[0] if rates else 1.0, []).append(parameter)
    options: list[dict[str, Any]] = [{"params": p, "factor": f} for f, p in groups.items()]
    return torch.optim.AdamW(options, betas=(0.9, 0.999), eps=1e-8, weight_decay=WEIGHT_DECAY)


def arrays_of(model: nn.Module) -> dict[str, np.ndarray]:
    """Weights and statistics by name."""
    state = model.state_dict().items()
    return {name: x.contiguous().numpy() for name, x in state if x.is_floating_point()}


def differences(
    start: Mapping[str, Any], step: int, found: Mapping[str, float], model: nn.Module
) -> dict[str, str]:
    """Compare a step with the package's own."""
    ours = {name: start[f"ours/{step}/{name}"].item() for name in found}
    rows = {name: abs(found[name] - value) / abs(value) for name, value in ours.items()}
    after = f"ours/{step}/weights/"
    if any(name.startswith(after) for name in start):
        pairs = [(x, start[after + n], start[f"weights/{n}"]) for n, x in arrays_of(model).items()]
        apart = sum(np.square(x - y, dtype=np.float64).sum() for x, y, _ in pairs)
        way = sum(np.square(y - first, dtype=np.float64).sum() for _, y, first in pairs)
        rows["weights"] = float(np.sqrt(apart / way))
    return {name: f"{value:.1e}" for name, value in rows.items()}


def main() -> None:
    """Train from START to LEARNED; print one json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("start")
    parser.add_argument("learned")
    given = parser.parse_args()
    start = np.load(given.start)
    prefix = "weights/"
    weights = {n.removeprefix(prefix): start[n] for n in start if n.startswith(prefix)}
    model = Network(len(weights["decoder.cls_backbone.bias"])).eval()  # norms stay as they are
    model.load_state_dict({name: torch.from_numpy(x) for name, x in weights.items()})
    model.to(memory_format=torch.channels_last)
    optimizer, rates, compared = make_optimizer(model), start["rates"], {}
    clock, used = time.perf_counter(), 0.0
    for step, rate in enumerate(rates.tolist()):
        arrays = (start[f"batches/{step}/{name}"] for name in Batch._fields)
        batch = Batch(*map(torch.from_numpy, arrays))
        began = time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        terms = losses(model(batch.images, batch.valid_size), batch)
        total = torch.stack(list(terms.values())).sum()
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        used += time.process_time() - began
        found = {f"loss/{name}": x.item() for name, x in {**terms, "total": total}.items()}
        if f"ours/{step}/grad_norm" in start:
            found["grad_norm"] = norm.item()
            compared[f"step {step + 1}"] = differences(start, step, found, model)
        if (step + 1) % 20 == 0:
            left = (time.perf_counter() - clock) / (step + 1) * (len(rates) - step - 1)
            line = "  ".join(f"{name.removeprefix('loss/')} {x:.3f}" for name, x in found.items())
            print(f"step {step + 1}/{len(rates)}  ETA {left:.0f} s  {line}", file=sys.stderr)
    np.savez(given.learned, **arrays_of(model))  # type: ignore[arg-type]
    print(json.dumps({"cpu_seconds": round(used), "differences": compared}))


if __name__ == "__main__":
    main()
