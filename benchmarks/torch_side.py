"""PyTorch's side of gpu.py and compare_torch.py: torch/<mode>/<work>/<batch> of a yardstick.

The yardstick is a Python file with `SparseInst(groups)` and, for one image, `postprocess(logits,
masks, objectness, valid, original)`; or with `FastInst(row)`, which takes targets in training,
`postprocess(logits, masks, valid, original)`, `losses(outputs, targets)`, `make_optimizer(model)`.
Tensors are NCHW, of the published sizes. Modes: eager and compiled (bfloat16 under autocast),
graphs (compiled with `reduce-overhead`), bf16 (graphs, and weights that are bfloat16). Data takes
the way of the package's own: uint8 images and masks from the host's pageable memory, normalised
within the step. A step of SparseInst waits for the device once, where the match scores of the whole
batch come to the host; scores and losses are compiled when the network is. Needs torch and SciPy,
and of this package `timing` alone.

With --serve it writes no rows: it answers standard input, see `timing.serve`.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import statistics
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import rows
import timing
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from timing import Workload

CLASSES, MASKS, LEARNING_RATE, WEIGHT_DECAY = 80, 100, 5e-5, 0.05
MEAN, DEVIATION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
Work = Callable[[], Any]


class Setting:
    """A model in one mode, and images on the host."""

    def __init__(self, yardstick: Any, given: argparse.Namespace, mode: str, batch: int):
        torch.manual_seed(0)
        self.yardstick, self.given, self.mode, self.batch = yardstick, given, mode, batch
        self.device = given.device
        self.is_fastinst = hasattr(yardstick, "FastInst")
        make = yardstick.FastInst if self.is_fastinst else yardstick.SparseInst
        self.model = make(given.row if self.is_fastinst else given.groups)
        if given.weights:
            state = torch.load(given.weights, map_location="cpu", weights_only=True)
            # Not strict: a release holds the pixels' mean and deviation too.
            missing = self.model.load_state_dict(state.get("model", state), strict=False)[0]
            assert not missing, f"{given.weights} lacks {missing}"
        layout = torch.channels_last if given.channels_last else torch.contiguous_format
        self.model.to(self.device, memory_format=layout)
        if mode == "bf16":
            self.model.bfloat16()
        self.rng = np.random.default_rng(0)
        self.images = self.rng.integers(0, 256, (batch, *given.size, 3), np.uint8)
        self.mean = torch.tensor(MEAN, device=self.device)[:, None, None]
        self.deviation = torch.tensor(DEVIATION, device=self.device)[:, None, None]
        self.forward = self.compiled(self._forward)

    def compiled(self, function: Callable[..., Any], graphs: bool = True) -> Callable[..., Any]:
        """Compile a function as the mode says."""
        if self.mode == "eager":
            return function
        is_graph = graphs and self.mode in ("graphs", "bf16")
        return torch.compile(function, mode="reduce-overhead" if is_graph else None)

    def send(self, array: np.ndarray) -> torch.Tensor:
        """Copy an array from pageable memory to the device."""
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def begin(self) -> None:
        """Say that the results of the run before are not needed any more."""
        if self.mode in ("graphs", "bf16"):
            torch.compiler.cudagraph_mark_step_begin()

    def _forward(self, images: torch.Tensor, *targets: Any) -> Any:
        x = (images.permute(0, 3, 1, 2).float() - self.mean) / self.deviation
        if self.mode == "bf16":
            return self.model(x.bfloat16(), *targets)
        is_half, kind = self.given.dtype == "bfloat16", self.device.split(":")[0]
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=is_half):
            return self.model(x, *targets)


def network(setting: Setting) -> tuple[Work, Work]:
    """From uint8 images in the host's memory to the network's outputs; and from the device's."""
    setting.model.eval()
    placed = setting.send(setting.images)

    @torch.no_grad()
    def run(images: torch.Tensor | None = None) -> Any:
        setting.begin()
        return setting.forward(setting.send(setting.images) if images is None else images)

    return run, lambda: run(placed)


def with_masks(setting: Setting, kept: int = 0) -> tuple[Work, None]:
    """From uint8 images to the masks at the photo's size, on the host."""
    (run_network, _), given = network(setting), setting.given
    post = setting.compiled(setting.yardstick.postprocess, graphs=False)
    offset = torch.zeros(MASKS, 1, device=setting.device)
    if kept:
        offset[kept:] = -100.0

    @torch.no_grad()
    def run() -> None:
        for logits, masks, *objectness in zip(*run_network(), strict=True):
            score = [logits.float() + offset for logits in objectness]  # of SparseInst
            sizes = tuple(given.valid_size), tuple(given.photo_size)
            post(logits.float(), masks.float(), *score, *sizes)[2].cpu()

    return run, None


def post(setting: Setting) -> tuple[Work, None]:
    """From the network's outputs on the device, all kept, to the masks at the photo's size."""
    given, device = setting.given, setting.device
    sizes = tuple(given.valid_size), tuple(given.photo_size)
    stride = 8 if setting.is_fastinst else 4
    masks = 4 * torch.randn(MASKS, given.size[0] // stride, given.size[1] // stride)
    outputs = [torch.randn(MASKS, CLASSES + setting.is_fastinst), masks]
    outputs = [x.to(device) for x in (*outputs, *[torch.randn(MASKS, 1)] * (stride == 4))]
    function = setting.compiled(setting.yardstick.postprocess, graphs=False)
    return torch.no_grad()(lambda: function(*outputs, *sizes)[2].cpu()), None


def training(setting: Setting) -> tuple[Work, None]:
    """From uint8 images and masks in the host's memory to the new weights."""
    if setting.is_fastinst:
        return _train_fastinst(setting), None
    batch, objects, rng = setting.batch, setting.given.objects, setting.rng
    height, width = setting.given.size[0] // 4, setting.given.size[1] // 4
    labels = rng.integers(0, CLASSES, (batch, objects))
    masks = 4 * rng.integers(0, 2, (batch, objects, height, width), np.uint8)
    score = setting.compiled(match_score, graphs=False)
    loss = setting.compiled(losses, graphs=False)
    options = {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "fused": setting.device != "cpu"}
    optimizer = torch.optim.AdamW(setting.model.parameters(), **options)

    def run() -> Any:
        setting.begin()
        wanted = setting.send(masks).float().flatten(2) / 4
        classes = setting.send(labels)
        outputs = setting.forward(setting.send(setting.images))
        optimizer.zero_grad(set_to_none=True)
        scores = score(*outputs[:2], classes, wanted).cpu().numpy()
        matches = np.stack([_match(image) for image in scores])
        total = loss(*outputs, classes, wanted, setting.send(matches))
        total.backward()
        optimizer.step()
        return total

    return run, None


def _train_fastinst(setting: Setting) -> Work:
    (height, width), batch, objects = setting.given.size, setting.batch, setting.given.objects
    labels = setting.rng.integers(0, CLASSES, (batch, objects))
    masks = np.zeros((batch, objects, height, width), np.uint8)
    for mask in masks.reshape(-1, height, width):
        top, left = setting.rng.integers(0, (height // 2, width // 2))
        rows, columns = setting.rng.integers(8, (height // 2, width // 2))
        mask[top : top + rows, left : left + columns] = 1
    is_half, kind = setting.given.dtype == "bfloat16", setting.device.split(":")[0]
    optimizer = setting.yardstick.make_optimizer(setting.model, fused=setting.device != "cpu")

    def run() -> Any:
        sent = zip(setting.send(labels), setting.send(masks).float(), strict=True)
        targets = [(classes, wanted) for classes, wanted in sent]
        outputs = setting.forward(setting.send(setting.images), targets)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=is_half):
            total = setting.yardstick.losses(outputs, targets)
        total.backward()
        optimizer.step()
        return total

    return run


def _match(score: np.ndarray) -> np.ndarray:
    """The prediction of each target, int64 [M], of scores [N, M]."""
    queries, columns = linear_sum_assignment(score, maximize=True)
    return queries[np.argsort(columns)]


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
    matches: torch.Tensor,
) -> torch.Tensor:
    """The losses of all images at once; `matches` [B, M] are predictions."""
    logits, masks, objectness = logits.float(), masks.float().flatten(2), objectness.float()[..., 0]
    image = torch.arange(len(matches), device=matches.device)[:, None]
    one_hot = torch.zeros_like(logits)
    one_hot[image, matches, labels] = 1
    p, count = logits.sigmoid(), matches.numel()
    ce = F.binary_cross_entropy_with_logits(logits, one_hot, reduction="none")
    focal = (0.25 * one_hot + 0.75 * (1 - one_hot)) * ce * (p - one_hot) ** 2
    pred = masks[image, matches]
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
        + F.binary_cross_entropy_with_logits(objectness[image, matches], iou)
    )


WORKS = {"network": network, "with_masks": with_masks, "post": post, "training": training}
WORKS["fastinst"] = training  # of a yardstick with FastInst, beside SparseInst's rows


def prepare(name: str, yardstick: Any, given: argparse.Namespace) -> tuple[Workload, Any]:
    """Build what a name asks for; and the same with its images in place, or None."""
    _, mode, work, batch, *more = name.split("/")
    setting = Setting(yardstick, given, mode, int(batch))
    launch, resident = WORKS[work](setting, *map(int, more))
    wait = lambda _: torch.cuda.synchronize() if given.device != "cpu" else None  # noqa: E731
    made = Workload(launch, int(batch), {}, wait)
    return made, resident and made._replace(launch=resident)


def make(name: str, yardstick: Any, given: argparse.Namespace) -> rows.Row:
    """Measure a row; its memory is its own."""
    batch, is_gpu = int(name.split("/")[3]), given.device != "cpu"
    torch._dynamo.reset()
    gc.collect()
    if is_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    workload, resident = prepare(name, yardstick, given)
    repeats = (1, 3) if given.dry_run else (20, 200) if batch == 1 else (3, 20)
    repeats = dict(zip(("warmup", "iterations"), repeats, strict=True))
    # With what cuDNN's search takes, as JAX's peak is with what XLA's takes; then without.
    first = rows.measure(workload, warmup=0, iterations=1)["first_s"]
    peaks = {}
    if is_gpu:
        peaks["peak_mib"] = torch.cuda.max_memory_allocated() / rows.MIB
        torch.cuda.reset_peak_memory_stats()
    row = rows.measure(workload, **repeats)
    several = {"iterations": 1, "queue": 2} if given.dry_run else {"iterations": 3, "queue": 10}
    queued = rows.measure(workload, warmup=0, **several)
    row |= {"first_s": first, "queued_ms": queued["p50_ms"], **peaks}
    if is_gpu:
        row["steady_peak_mib"] = torch.cuda.max_memory_allocated() / rows.MIB
    if resident:
        row["resident_ms"] = rows.measure(resident, **repeats)["p50_ms"]
    return row | {"images": batch, "images_per_s": 1e3 * batch / row["p50_ms"]}


def result(samples: list[float]) -> dict[str, Any]:
    """What is answered at the end of `timing.serve`."""
    is_gpu = torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0
    return {
        "p50_ms": statistics.median(samples) if samples else None,
        "peak_device_mib": torch.cuda.max_memory_allocated() / rows.MIB if is_gpu else None,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if is_gpu else "cpu",
    }


def _import(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("yardstick", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules["yardstick"] = module  # torch.compile looks its functions up by name
    spec.loader.exec_module(module)
    return module


def main() -> int:
    """Measure the rows of a command line, or serve one."""
    parser = argparse.ArgumentParser()
    add, pair = parser.add_argument, {"type": int, "nargs": 2}
    add("--yardstick", required=True)
    add("--size", default=(640, 864), **pair, help="padded height, width")
    add("--valid-size", default=(640, 853), **pair)
    add("--photo-size", default=(480, 640), **pair)
    add("--objects", type=int, default=8)
    add("--groups", type=int, default=4)
    add("--row", default="fastinst_r50_x1", help="of FastInst")
    add("--weights", help="state dict, maybe under the key model; else drawn")
    add("--device", default="cuda")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    add("--contiguous", dest="channels_last", action="store_false", help="else channels last")
    add("--threads", type=int, default=os.cpu_count())
    add("--serve", action="store_true")
    add("--warmup", type=int, default=2)
    given = rows.arguments(parser)
    yardstick = _import(given.yardstick)
    if given.dry_run:
        given.device = "cpu"
        # FastInst chooses its hundred queries among a map of stride 16.
        size = (160, 224) if hasattr(yardstick, "FastInst") else (64, 96)
        given.size = given.valid_size = given.photo_size = size
    if given.device != "cpu" and not torch.cuda.is_available():
        print("PyTorch finds no accelerator", file=sys.stderr)
        return rows.NO_DEVICE
    torch.set_num_threads(given.threads)
    is_float = given.dtype == "float32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not is_float
    torch.backends.cudnn.benchmark = True
    if given.serve:
        workload, _ = prepare(given.rows[0], yardstick, given)
        timing.serve(workload, given.warmup, sys.stdin, sys.stdout, result)
    else:
        rows.run(given, lambda name: make(name, yardstick, given))
    return 0


if __name__ == "__main__":
    sys.exit(main())
