"""`sparseinst doctor`: what this machine has, whether it computes, and what to do where not."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparseinst_jax.cli import command_parser
from sparseinst_jax.cli.gpu_causes import Finding, NvidiaParts, find_nvidia_parts, why_not_seen
from sparseinst_jax.runtime import process
from sparseinst_jax.runtime.files import cache_folder
from sparseinst_jax.runtime.messages import columns, printable
from sparseinst_jax.runtime.pages import page

DESCRIPTION = """\
Say what this machine has and whether it computes, in a form to paste into a report: devices,
versions, caches, memory, a test of two seconds, and a cure for each fault. Nothing is downloaded.

  sparseinst doctor
"""
PACKAGES = (
    *("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu", "flax", "optax"),
    *("orbax-checkpoint", "grain", "numpy", "scipy", "pillow", "pycocotools", "av", "supervision"),
)
# What changes how JAX starts or where files are kept; values of no other variable are shown.
VARIABLES = (
    *("JAX_", "XLA_", "PJRT_", "NPROC", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "SPARSEINST_"),
    *("XDG_CACHE_HOME", "MALLOC_"),
)
GIB = 2**30
LITTLE_MEMORY, LITTLE_DISK = 2 * GIB, 2 * GIB
SECONDS_FOR_CUDA = 60  # of a process that starts JAX on a GPU


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code, 1 where there is something to cure."""
    parser = command_parser("doctor", DESCRIPTION)
    parser.parse_args(argv)
    lines, findings = examine()
    print(printable(_without_home("\n".join(lines))))
    for number, (fault, cure, name) in enumerate(findings, 1):
        text = f"\n{number}. {fault}\n   Cure: {cure} {page(name) if name else ''}"
        print(printable(_without_home(text.rstrip())))
    print("\n" + ("see the cures above" if findings else "no fault found"))
    return 1 if findings else 0


def examine() -> tuple[list[str], list[Finding]]:
    """Look at everything; returns lines to print and what is to be cured."""
    parts = find_nvidia_parts()
    found: list[Finding] = []
    sections = {
        "versions": _versions(),
        "devices": _devices(parts, found),
        "memory": _memory(found),
        "caches": _caches(found),
        "environment": _environment(),
    }
    lines = []
    for title, rows in sections.items():
        lines += [title, *(f"  {line}" for line in columns(rows or [["none", ""]], 2)), ""]
    return lines[:-1], found


def _versions() -> list[list[str]]:
    known = {name: process.version(name) for name in PACKAGES}
    return [
        ["sparseinst_jax", process.version()],
        ["Python", f"{platform.python_version()}, {platform.platform()}"],
        *([name, text] for name, text in known.items() if text != "not installed"),
    ]


def _devices(parts: NvidiaParts, found: list[Finding]) -> list[list[str]]:
    """Start JAX, and compute on its first device; a machine without JAX's parts is described."""
    cores = os.cpu_count()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    rows = [["processor", f"{process.processor()}, {usable} of {cores} cores usable"]]
    rows += [["NVIDIA's driver", f"{parts.driver}: {parts.gpus}"]] if parts.driver else []
    with _logged("jax._src.xla_bridge") as said:
        try:
            import jax

            devices = jax.local_devices()
        except Exception as error:
            text = process.explain_jax_error(error) or f"JAX does not start: {error}"
            fault, _, cure = text.partition(". Cure: ")
            found += why_not_seen(parts) or [
                Finding(fault, cure or "install it again", "gpu-not-seen")
            ]
            return [*rows, ["JAX", f"does not start: {fault}"]]
    kinds = [f"{each.platform}:{each.id} {each.device_kind}" for each in devices]
    rows.append(["JAX sees", ", ".join(kinds)])
    if devices[0].platform == "cpu" and parts.has_gpu:
        found += why_not_seen(parts, ask=_cuda_says) or [
            Finding(
                "there is an NVIDIA GPU that JAX does not use" + "".join(f": {s}" for s in said),
                "follow the list in the docs",
                "gpu-not-seen",
            )
        ]
    for each in devices[:1] if devices[0].platform != "cpu" else ():
        stats = each.memory_stats() or {}
        if limit := stats.get("bytes_limit"):
            used = stats.get("bytes_in_use", 0)
            rows.append(["its memory", f"{limit / GIB:.1f} GiB for JAX, {used / GIB:.1f} in use"])
    try:
        rows += _computed()
    except Exception as error:
        text = process.explain_jax_error(error) or f"{type(error).__name__}: {error}"
        fault, _, cure = text.partition(". Cure: ")
        cure = cure or "please report it with all of this"
        found.append(Finding(f"the test on {kinds[0]} failed: {fault}", cure, "gpu-not-seen"))
    return rows


def _computed() -> list[list[str]]:
    """Compile a convolution and match some scores; both are compared with what they must give."""
    import jax
    import jax.numpy as jnp
    from scipy.optimize import linear_sum_assignment

    random = np.random.default_rng(0)
    image = random.normal(size=(1, 66, 66, 16)).astype(np.float32)
    kernel = random.normal(size=(3, 3, 16, 16)).astype(np.float32)
    places = ("NHWC", "HWIO", "NHWC")

    def loss(kernel: Any, image: Any) -> tuple[Any, Any]:
        maps = jax.lax.conv_general_dilated(
            image, kernel, (1, 1), "VALID", dimension_numbers=places
        )
        return jnp.mean(maps**2), maps

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    start = time.perf_counter()
    compiled = step.lower(kernel, image).compile()
    compiling = time.perf_counter() - start
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        (_, maps), _ = jax.block_until_ready(compiled(kernel, image))
        seconds.append(time.perf_counter() - start)
    windows = np.lib.stride_tricks.sliding_window_view(image, (3, 3), axis=(1, 2))
    wanted = np.einsum("bhwcyx,yxcd->bhwd", windows, kernel, optimize=True)
    # A GPU multiplies in TensorFloat-32, of 10 bits.
    if not np.allclose(maps, wanted, atol=0.05 * float(np.std(wanted))):
        raise ValueError(f"a convolution is off by {np.abs(maps - wanted).max():.3g}")
    order = random.permutation(100)[:40]
    scores = random.uniform(size=(40, 100)).astype(np.float32)
    scores[np.arange(40), order] += 1
    start = time.perf_counter()
    _, matched = linear_sum_assignment(scores, maximize=True)
    matching = time.perf_counter() - start
    if not np.array_equal(matched, order):
        raise ValueError("the matching of 100 predictions with 40 objects is not the best one")
    return [
        ["compiles", f"a convolution with its gradient in {compiling:.2f} s; equals NumPy's"],
        ["computes", f"it in {1e3 * min(seconds):.2f} ms"],
        ["matches", f"100 predictions with 40 objects in {1e3 * matching:.2f} ms, on the host"],
    ]


def _memory(found: list[Finding]) -> list[list[str]]:
    """What the machine has; a container's limit counts where it is lower."""
    sizes = {}
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, value = line.partition(":")
            sizes[name] = int(value.split()[0]) * 1024
    total, free = sizes.get("MemTotal", 0), sizes.get("MemAvailable", 0)
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        if limit < total:
            total, free = limit, min(free, limit - used)
    rows = [["memory", f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"]] if total else []
    if 0 < free < LITTLE_MEMORY:
        fault = f"only {free / GIB:.1f} GiB of memory are free; training giam_r50 takes about 2"
        found.append(Finding(fault, "end other programs, or use a machine with more", "memory"))
    for title, folder in (("this folder's disk", "."), ("shared memory", "/dev/shm")):
        with contextlib.suppress(OSError):
            usage = shutil.disk_usage(folder)
            rows.append([title, f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free"])
            if folder == "." and usage.free < LITTLE_DISK:
                fault = f"only {usage.free / GIB:.1f} GiB are free where runs would be written"
                found.append(Finding(fault, "free some, or give --workdir on another disk", ""))
    return rows


def _caches(found: list[Finding]) -> list[list[str]]:
    """Folders of what can be made or fetched again: size, and the variable that moves each."""
    rows = []
    for title, name, variable in (
        ("compiled programs", "xla", "JAX_COMPILATION_CACHE_DIR"),
        ("indices of jsons", "index", "SPARSEINST_INDEX_CACHE"),
        ("published weights", "weights", "SPARSEINST_WEIGHTS"),
    ):
        given = os.environ.get(variable)
        folder = Path(given).expanduser() if given else cache_folder(name)
        if given in ("off", "0"):
            rows.append([title, f"none kept ({variable}={given})"])
            continue
        if folder is None:
            fault = f"there is no folder for {title}: no home that can be written"
            found.append(Finding(fault, f"set {variable} or XDG_CACHE_HOME to a folder", "caches"))
            continue
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        rows.append([title, f"{folder}, {size / 1e6:.0f} MB ({variable} moves it)"])
        if name == "xla" and folder.is_dir() and folder.stat().st_mode & 0o002:
            fault = f"everybody can write to {folder}, and what lies there is run"
            found.append(Finding(fault, f"chmod o-w {folder}, and empty it", "caches"))
    return rows


def _environment() -> list[list[str]]:
    """The variables that matter, as the command has them: threads and cache it sets itself."""
    return [
        [name, value] for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)
    ]


def _cuda_says() -> str:
    """What JAX says when it must use the GPU, in a process of its own; "" where it can."""
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    environment = {**os.environ, "JAX_PLATFORMS": "cuda"}
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=SECONDS_FOR_CUDA
        )
        return (done.stderr.strip().splitlines() or [""])[-1] if done.returncode else ""
    return ""


@contextlib.contextmanager
def _logged(name: str) -> Iterator[list[str]]:
    """Collect the warnings of a logger while open."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage().splitlines()[0])
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


def _without_home(text: str) -> str:
    home = os.path.expanduser("~")
    return text.replace(f"{home}/", "~/") if len(home) > 1 else text
