"""The command to train with, of those that make a data set: one that this machine can run."""

import glob
import importlib.util
import os
from collections.abc import Sequence

# NVIDIA's, under Windows, AMD's, Google's.
_DEVICES = ("/dev/nvidia[0-9]*", "/dev/dxg", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*")


def train_command(keys: Sequence[str]) -> str:
    """The command that trains on the data that `keys` name, such as this machine can run it."""
    if may_have_accelerator():
        start = "  sparseinst train --config finetune --init-from WEIGHTS"
        note = "# WEIGHTS: a published file, `sparseinst zoo` says where they are"
    else:
        start = "  sparseinst train --config finetune_small"
        note = (
            "# a small network from random weights, as there is no accelerator; with one: "
            "--config finetune --init-from WEIGHTS (see `sparseinst zoo`)"
        )
    return " \\\n    ".join([start, *keys]) + f"\n  {note}"


def may_have_accelerator() -> bool:
    """Whether JAX will probably find an accelerator: asked at once, without starting JAX."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms.split(",")[0] != "cpu"
    has_plugin = any(map(importlib.util.find_spec, ("jax_plugins", "libtpu")))
    return has_plugin and any(map(glob.glob, _DEVICES))
