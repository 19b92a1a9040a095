"""PyTorch's rows for gpu.py: torch/<mode>/<work>/<batch> of a yardstick, channels last.

The yardstick is a Python file with `SparseInst(groups)`, `postprocess(logits, masks, objectness,
valid, original)` for one image, and `dice_matrix`; tensors are NCHW, of the published sizes.
Modes: eager and compiled under autocast, graphs (compiled with `reduce-overhead`), bf16 (graphs,
and weights that are bfloat16). Data takes the way of the package's own rows: uint8 images and masks
from the host's pageable memory, normalised within the step. A step waits for the device once,
where the match scores of the whole batch come to the host; scores and losses are compiled when the
network is. Needs torch and nothing of this package.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

import gpu_rows
import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

CLASSES, OBJECTS, LEARNING_RATE, WEIGHT_DECAY = 80, 8, 5e-5, 0.05
MEAN, DEVIATION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
Work = Callable[[], Any]


class Setting:
    """A model in one mode, and images on the host."""

    def __init__(self, yardstick: Any, mode: str, batch: int, is_dry: bool):
        torch.manual_seed(0)
        self.device = "cpu" if is_dry else "cuda"
        self.size = (64, 96) if is_dry else (640, 864)
        self.photo = (64, 96) if is_dry else (480, 640)
        self.valid = (64, 96) if is_dry else (640, 853)
        self.yardstick, self.mode, self.batch = yardstick, mode, batch
        model = yardstick.SparseInst(4).to(self.device, memory_format=torch.channels_last)
        self.model = model.bfloat16() if mode == "bf16" else model
        self.rng = np.random.default_rng(0)
        self.images = self.rng.integers(0, 256, (batch, *self.size, 3), np.uint8)
        self.mean = torch.tensor(MEAN, device=self.device)[:, None, None]
        self.deviation = torch.tensor(DEVIATION, device=self.device)[:, None, None]
        self.forward = self.compiled(self._forward)

    def compiled(self, function: Callable[..., Any], graphs: bool = True) -> Callable[..., Any]:
        """Compile a function as the mode says."""
        if self.mode == "eager":
            return function
        if graphs and self.mode in ("graphs", "bf16"):
            return torch.compile(function, mode="reduce-overhead")
        return torch.compile(function)

    def send(self, array: np.ndarray) -> torch.Tensor:
        """Copy an array from pageable memory to the device."""
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def _forward(self, images: torch.Tensor) -> Any:
        x = (images.permute(0, 3, 1, 2).float() - self.mean) / self.deviation
        if self.mode == "bf16":
            return self.model(x.bfloat16())
        with torch.autocast(self.device, dtype=torch.bfloat16):
            return self.model(x)


def network(setting: Setting) -> tuple[Work, Work]:
    """From uint8 images in the host's memory to the network's outputs; and from the device's."""
    setting.model.eval()
    placed = setting.send(setting.images)

    @torch.no_grad()
    def run(images: torch.Tensor | None = None) -> Any:
        if setting.mode in ("graphs", "bf16"):
            torch.compiler.cudagraph_mark_step_begin()
        return setting.forward(setting.send(setting.images) if images is None else images)

    return run, lambda: run(placed)


def with_masks(setting: Setting, kept: int = 0) -> tuple[Work, None]:
    """From uint8 images to the masks at the photo's size, on the host."""
    run_network, _ = network(setting)
    post = setting.compiled(setting.yardstick.postprocess, graphs=False)
    offset = torch.zeros(100, 1, device=setting.device)
    if kept:
        offset[kept:] = -100.0

    @torch.no_grad()
    def run() -> None:
        for logits, masks, objectness in zip(*run_network(), strict=True):
            score = objectness.float() + offset
            post(logits.float(), masks.float(), score, setting.valid, setting.photo)[2].cpu()

    return run, None


def training(setting: Setting) -> tuple[Work, None]:
    """From uint8 images and masks in the host's memory to the new weights."""
    batch, rng = setting.batch, setting.rng
    height, width = setting.size[0] // 4, setting.size[1] // 4
    labels = rng.integers(0, CLASSES, (batch, OBJECTS))
    masks = 4 * rng.integers(0, 2, (batch, OBJECTS, height, width), np.uint8)
    score = setting.compiled(match_score, graphs=False)
    loss = setting.compiled(losses, graphs=False)
    optimizer = torch.optim.AdamW(
        setting.model.parameters(),
        lr=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        fused=setting.device != "cpu",
    )

    def run() -> Any:
        if setting.mode in ("graphs", "bf16"):
            torch.compiler.cudagraph_mark_step_begin()
        wanted = setting.send(masks).float().flatten(2) / 4
        classes = setting.send(labels)
        outputs = setting.forward(setting.send(setting.images))
        optimizer.zero_grad(set_to_none=True)
        scores = score(*outputs[:2], classes, wanted).cpu().numpy()
        rows = np.stack([_match(image) for image in scores])
        total = loss(*outputs, classes, wanted, setting.send(rows))
        total.backward()
        optimizer.step()
        return total

    return run, None


def _match(score: np.ndarray) -> np.ndarray:
    """The prediction of each target, int64 [M], of scores [N, M]."""
    rows, columns = linear_sum_assignment(score, maximize=True)
    return rows[np.argsort(columns)]


@torch.no_grad()
def match_score(
    logits: torch.Tensor, masks: torch.Tensor, labels: torch.Tensor, wanted: torch.Tensor
) -> torch.Tensor:
    """Score each prediction for each target, [B, N, M]."""
    prob, wanted = masks.flatten(2).float().sigmoid(), wanted.transpose(1, 2)
    sums = (prob * prob).sum(-1)[..., None] + (wanted * wanted).sum(1)[:, None]
    dice = 2 * (prob @ wanted) / (sums + 1e-4)
    classes = labels[:, None].expand(-1, logits.shape[1], -1)
    return dice**0.8 * logits.float().sigmoid().gather(2, classes) ** 0.2


def losses(
    logits: torch.Tensor,
    masks: torch.Tensor,
    objectness: torch.Tensor,
    labels: torch.Tensor,
    wanted: torch.Tensor,
    rows: torch.Tensor,
) -> torch.Tensor:
    """The yardstick's losses for all images at once; `rows` [B, M] are the matched predictions."""
    logits, masks, objectness = logits.float(), masks.float().flatten(2), objectness.float()[..., 0]
    image = torch.arange(len(rows), device=rows.device)[:, None]
    one_hot = torch.zeros_like(logits)
    one_hot[image, rows, labels] = 1
    p, count = logits.sigmoid(), rows.numel()
    ce = F.binary_cross_entropy_with_logits(logits, one_hot, reduction="none")
    focal = (0.25 * one_hot + 0.75 * (1 - one_hot)) * ce * (p - one_hot) ** 2
    pred = masks[image, rows]
    prob = pred.sigmoid()
    sums = (prob * prob).sum(-1) + (wanted * wanted).sum(-1)
    dice = 1 - 2 * (prob * wanted).sum(-1) / (sums + 1e-4)
    with torch.no_grad():
        hit, want = (prob >= 0.4).float(), (wanted > 0.5).float()
        inter = (hit * want).sum(-1)
        iou = inter / (hit.sum(-1) + want.sum(-1) - inter + 1e-6)
    return (
        2.0 * focal.sum() / count
        + 5.0 * F.binary_cross_entropy_with_logits(pred, wanted)
        + 2.0 * dice.sum() / count
        + F.binary_cross_entropy_with_logits(objectness[image, rows], iou)
    )


WORKS = {"network": network, "with_masks": with_masks, "training": training}


def make(name: str, yardstick: Any, is_dry: bool) -> gpu_rows.Row:
    """Measure a row; its memory is its own."""
    _, mode, work, number, *more = name.split("/")
    batch, is_gpu = int(number), not is_dry
    torch._dynamo.reset()
    gc.collect()
    if is_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    setting = Setting(yardstick, mode, batch, is_dry)
    launch, resident = WORKS[work](setting, *map(int, more))

    def wait(_: Any) -> None:
        if is_gpu:
            torch.cuda.synchronize()

    warmups, iterations = (1, 3) if is_dry else (20, 200) if batch == 1 else (3, 20)
    # With what cuDNN's search takes, as JAX's peak is with what XLA's takes; then without.
    first = gpu_rows.measure(launch, wait, warmups=0, iterations=1)["first_s"]
    peaks = {}
    if is_gpu:
        peaks["peak_mib"] = torch.cuda.max_memory_allocated() / gpu_rows.MIB
        torch.cuda.reset_peak_memory_stats()
    row = gpu_rows.measure(launch, wait, warmups=warmups, iterations=iterations)
    several = {"iterations": 1, "queue": 2} if is_dry else {"iterations": 3, "queue": 10}
    queued = gpu_rows.measure(launch, wait, warmups=0, **several)
    row |= {"first_s": first, "queued_ms": queued["p50_ms"], **peaks}
    if is_gpu:
        row["steady_peak_mib"] = torch.cuda.max_memory_allocated() / gpu_rows.MIB
    if resident:
        found = gpu_rows.measure(resident, wait, warmups=warmups, iterations=iterations)
        row["resident_ms"] = found["p50_ms"]
    return row | {"images": batch, "images_per_s": 1e3 * batch / row["p50_ms"]}


def main() -> int:
    """Measure the rows of a command line."""
    arguments = gpu_rows.arguments()
    if not arguments.dry_run and not torch.cuda.is_available():
        print("PyTorch finds no accelerator", file=sys.stderr)
        return gpu_rows.NO_DEVICE
    torch.set_num_threads(os.cpu_count() or 1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    spec = importlib.util.spec_from_file_location("yardstick", arguments.yardstick)
    assert spec is not None and spec.loader is not None, arguments.yardstick
    yardstick = importlib.util.module_from_spec(spec)
    sys.modules["yardstick"] = yardstick  # torch.compile looks its functions up by name
    spec.loader.exec_module(yardstick)
    gpu_rows.run(arguments, lambda name: make(name, yardstick, arguments.dry_run))
    return 0


if __name__ == "__main__":
    sys.exit(main())
