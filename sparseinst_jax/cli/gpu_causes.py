"""Why JAX does not see an NVIDIA GPU that is there, each cause with its cure.

The list is that of docs/gpu.md, in its order.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import subprocess
from collections.abc import Callable, Mapping
from typing import NamedTuple

from sparseinst_jax.runtime import process

# The oldest drivers on Linux that the parts of JAX for a CUDA run with, the newest CUDA first.
DRIVERS = {"cuda13": 580, "cuda12": 525}
_SECONDS = 20  # the driver's program wakes the card


class Finding(NamedTuple):
    """What is wrong, what to do, and the name of the docs' page (`runtime.pages`) or ""."""

    fault: str
    cure: str
    page: str


class NvidiaParts(NamedTuple):
    """What can be known of an NVIDIA GPU without JAX.

    Attributes:
      has_gpu: whether the machine shows one.
      driver: its version; "" where the driver does not answer.
      gpus: their names.
      plugins: JAX's parts for a CUDA that are installed, such as "cuda13", and their versions.
      jaxlib: its version.
      environment: the process's variables.
    """

    has_gpu: bool
    driver: str
    gpus: str
    plugins: Mapping[str, str]
    jaxlib: str
    environment: Mapping[str, str]


def find_nvidia_parts() -> NvidiaParts:
    """Ask the driver, the device files and pip's records; JAX is not started."""
    driver, gpus = "", ""
    ask = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(ask, capture_output=True, text=True, timeout=_SECONDS)
        rows = re.findall(r"^([\d.]+), (.+)$", done.stdout, re.MULTILINE)
        if done.returncode == 0 and rows:
            driver, gpus = rows[0][0], ", ".join(name for _, name in rows)
    versions = {name: process.version(f"jax-{name}-plugin") for name in DRIVERS}
    return NvidiaParts(
        bool(driver or glob.glob("/dev/nvidia[0-9]*")),
        driver,
        gpus,
        {name: version for name, version in versions.items() if version != "not installed"},
        process.version("jaxlib"),
        dict(os.environ),
    )


def why_not_seen(parts: NvidiaParts, ask: Callable[[], str] = lambda: "") -> list[Finding]:
    """The causes that keep JAX from an NVIDIA GPU; none where there is no GPU or nothing is known.

    Args:
      parts: of the machine.
      ask: asked where no other cause is found: what JAX says when it must use the GPU.
    """
    if not parts.has_gpu:
        return []
    causes = []
    major = int(parts.driver.partition(".")[0] or 0)
    fitting = next((name for name, oldest in DRIVERS.items() if major >= oldest), "")
    install = f'pip install -U "sparseinst_jax[{fitting or "cuda12"}]"'
    if not parts.driver:
        causes.append(
            (
                "there is a GPU, but nvidia-smi does not answer",
                "install NVIDIA's driver; in a container, start it with --gpus all",
            )
        )
    elif not fitting:
        causes.append(
            (
                f"the driver {parts.driver} is older than any that JAX runs with",
                f"install {DRIVERS['cuda12']} or newer, best {DRIVERS['cuda13']}",
            )
        )
    if not parts.plugins:
        causes.append(("JAX's parts for a GPU are not installed", install))
    elif len(parts.plugins) > 1:
        other = next(name for name in parts.plugins if name != (fitting or "cuda12"))
        remove = f"pip uninstall -y jax-{other}-plugin jax-{other}-pjrt"
        causes.append(
            ("the parts for two versions of CUDA are installed", f"{remove} && {install}")
        )
    for name, version in parts.plugins.items() if len(parts.plugins) == 1 else ():
        if parts.driver and major < DRIVERS[name]:
            cure = f"pip uninstall -y jax-{name}-plugin jax-{name}-pjrt && {install}"
            text = f"{name} needs driver {DRIVERS[name]} or newer, this one is {parts.driver}"
            causes.append((text, cure if fitting else "install a newer driver"))
        elif version != parts.jaxlib:
            text = f"jax-{name}-plugin {version} and jaxlib {parts.jaxlib} do not belong together"
            causes.append((text, install))
    platforms = parts.environment.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        text = f"JAX_PLATFORMS={platforms} tells JAX to leave the GPU alone"
        causes.append((text, "unset JAX_PLATFORMS"))
    visible = parts.environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not re.match(r"\d|GPU|MIG", visible):
        text = f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU"
        causes.append((text, "unset CUDA_VISIBLE_DEVICES"))
    if libraries := parts.environment.get("LD_LIBRARY_PATH"):
        text = f"LD_LIBRARY_PATH={libraries} may lead JAX to another CUDA than that of pip"
        causes.append((text, "unset LD_LIBRARY_PATH"))
    if not causes and (said := ask()):
        causes.append((f"asked for the GPU, JAX says: {said}", "see the docs for what it means"))
    title = "the GPU is not used: "
    return [Finding(title + text, cure, "gpu-not-seen") for text, cure in causes]
