"""The PyTorch side of compare_torch.py: times a reference network on request.

Run by compare_torch.py in an environment with torch; needs nothing of this package. The yardstick
is a Python file with `SparseInst(groups)`, `losses(outputs, targets)` and, for one image,
`postprocess(logits, masks, objectness, valid, original)`; tensors are NCHW, of the published sizes.

After the warm-up it writes `{"ready": true}`; each line N on standard input makes N runs, answered
by `{"ms": [...]}`; after the last line the peak memory and the versions are written.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

CLASSES, MASKS, LEARNING_RATE, WEIGHT_DECAY = 80, 100, 5e-5, 0.05


def main() -> None:
    """Answer what standard input asks for."""
    arguments = _arguments()
    once = prepare(arguments)
    is_gpu = arguments.device != "cpu"
    for _ in range(max(arguments.warmup, 1)):
        once()
    with_compilation = _peak_mib()
    is_own = _forget_peak()
    if is_gpu:
        torch.cuda.reset_peak_memory_stats()
    _answer({"ready": True})
    samples = []
    for line in sys.stdin:
        block = [once() for _ in range(int(line))]
        samples += block
        _answer({"ms": block})
    _answer(
        {
            "p50_ms": statistics.median(samples) if samples else None,
            "peak_process_mib": _peak_mib(),
            "peak_device_mib": torch.cuda.max_memory_allocated() / 2**20 if is_gpu else None,
            "peak_with_compilation_mib": with_compilation,
            "peak_is_of_this_part": is_own,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if is_gpu else "cpu",
        }
    )


def prepare(arguments: argparse.Namespace) -> Callable[[], float]:
    """Build what is asked for; the function that comes back runs it once and gives milliseconds."""
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    torch.backends.cuda.matmul.allow_tf32 = arguments.dtype != "float32"
    torch.backends.cudnn.allow_tf32 = arguments.dtype != "float32"
    torch.backends.cudnn.benchmark = True
    run = WORKS[arguments.work](_import(arguments.yardstick), arguments)

    def once() -> float:
        start = time.perf_counter()
        run()
        if arguments.device != "cpu":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)

    return once


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--yardstick", required=True)
    parser.add_argument("--work", choices=tuple(WORKS), required=True)
    parser.add_argument("--size", type=int, nargs=2, required=True, help="padded height, width")
    parser.add_argument("--valid-size", type=int, nargs=2, required=True)
    parser.add_argument("--photo-size", type=int, nargs=2, required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--objects", type=int, default=8)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--weights", help="state dict, maybe under the key model; else drawn")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--warmup", type=int, default=2)
    return parser.parse_args()


def _import(path: str):
    spec = importlib.util.spec_from_file_location("yardstick", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules["yardstick"] = module  # torch.compile looks its functions up by name
    spec.loader.exec_module(module)
    return module


class _Setting:
    """The model, its images and how its functions are called."""

    def __init__(self, yardstick, a: argparse.Namespace):
        layout = torch.channels_last if a.channels_last else torch.contiguous_format
        self.model = yardstick.SparseInst(a.groups)
        if a.weights:
            state = torch.load(a.weights, map_location="cpu", weights_only=True)
            # Not strict: a release holds the pixels' mean and deviation too.
            missing = self.model.load_state_dict(state.get("model", state), strict=False)[0]
            assert not missing, f"{a.weights} lacks {missing}"
        self.model.to(a.device, memory_format=layout)
        images = torch.randn(a.batch, 3, *a.size, device=a.device)
        self.images = images.to(memory_format=layout)
        self.forward = torch.compile(self.model) if a.compile else self.model
        post = yardstick.postprocess
        self.post = torch.compile(post) if a.compile else post
        self.autocast = torch.autocast(
            a.device.split(":")[0], dtype=torch.bfloat16, enabled=a.dtype == "bfloat16"
        )


def _network(yardstick, a: argparse.Namespace):
    setting = _Setting(yardstick, a)
    setting.model.eval()

    @torch.no_grad()
    def run():
        with setting.autocast:
            return setting.forward(setting.images)

    return run


def _inference(yardstick, a: argparse.Namespace):
    setting = _Setting(yardstick, a)
    setting.model.eval()
    sizes = tuple(a.valid_size), tuple(a.photo_size)

    @torch.no_grad()
    def run():
        with setting.autocast:
            outputs = setting.forward(setting.images)
        for logits, masks, objectness in zip(*outputs, strict=True):
            found = setting.post(logits.float(), masks, objectness.float(), *sizes)
            found[2].cpu()  # where the masks are used; on a CPU they are there

    return run


def _post(yardstick, a: argparse.Namespace):
    sizes = tuple(a.valid_size), tuple(a.photo_size)
    height, width = a.size[0] // 4, a.size[1] // 4
    logits = torch.randn(MASKS, CLASSES, device=a.device)
    masks = 4 * torch.randn(MASKS, height, width, device=a.device)
    objectness = torch.randn(MASKS, 1, device=a.device)
    post = torch.compile(yardstick.postprocess) if a.compile else yardstick.postprocess

    @torch.no_grad()
    def run():
        return post(logits, masks, objectness, *sizes)[2].cpu()

    return run


def _training(yardstick, a: argparse.Namespace):
    setting = _Setting(yardstick, a)
    height, width = a.size[0] // 4, a.size[1] // 4
    targets = [
        (
            torch.randint(0, CLASSES, (a.objects,), device=a.device),
            (torch.rand(a.objects, height, width, device=a.device) > 0.5).float(),
        )
        for _ in range(a.batch)
    ]
    optimizer = torch.optim.AdamW(
        setting.model.parameters(),
        lr=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        fused=a.device != "cpu",
    )

    def run():
        with setting.autocast:
            outputs = setting.forward(setting.images)
        optimizer.zero_grad(set_to_none=True)
        yardstick.losses(outputs, targets).backward()
        optimizer.step()

    return run


WORKS = {
    "inference": _inference,
    "network": _network,
    "post-processing": _post,
    "training": _training,
}


def _answer(value) -> None:
    print(json.dumps(value), flush=True)


def _forget_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_mib() -> float | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    main()
