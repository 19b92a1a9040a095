"""The command `summary`: parameters, operations and memory of a network."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from sparseinst_jax.cli.arguments import (
    add_config_arguments,
    parse_command_line,
    parse_size,
    size_fault,
)
from sparseinst_jax.cli.measuring import inference, network, timing
from sparseinst_jax.setup import builders
from sparseinst_jax.setup.config import load_config

NUM_CLASSES = 80
DESCRIPTION = """\
Parameters, multiply-accumulates and memory of a configuration's network, part by part. No weights
and no data are needed.

  sparseinst summary --config giam_r50
  sparseinst summary --config giam_r50 --size 320x448 --batch 8 --json
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="sparseinst summary",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(parser)
    size = inference.USUAL_SIZE
    parser.add_argument("--size", metavar="HxW", type=parse_size, default=size, help="640x864")
    parser.add_argument("--batch", metavar="N", type=int, default=1, help="images, default 1")
    parser.add_argument("--classes", metavar="K", type=int, default=NUM_CLASSES, help="default 80")
    parser.add_argument("--json", action="store_true", help="all facts as JSON")
    arguments = parse_command_line(parser, argv)
    _check(arguments)
    config: Any = load_config(arguments.config, arguments.overrides)
    model = builders.build_model(config.model, arguments.classes, seed=None)
    facts = {
        "config": arguments.config,
        "dtype": config.model.dtype,
        "num_classes": arguments.classes,
        **network.describe(model, arguments.size, arguments.batch),
    }
    print(json.dumps(facts, indent=1) if arguments.json else text(facts))
    return 0


def _check(arguments: argparse.Namespace) -> None:
    faults = [size_fault("--size", arguments.size)]
    if not arguments.config:
        faults.append("--config NAME is needed, such as --config giam_r50")
    for name in ("batch", "classes"):
        if getattr(arguments, name) < 1:
            faults.append(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    if any(faults):
        raise ValueError("\n".join(filter(None, faults)))


def text(facts: Mapping[str, Any]) -> str:
    """The facts for a terminal."""
    height, width = facts["size"]
    whole, xla = facts["parts"][-1], facts["xla"]
    flops = facts["gflops_analytic"]
    counted = "unknown" if xla["gflops"] is None else f"{xla['gflops']:.3f}"
    rows = [
        (
            part["name"],
            f"{part['trained'] / 1e6:.3f}",
            f"{part['frozen_affine'] + part['statistics']:d}",
            f"{part['gmacs']:.3f}",
            f"{100 * part['gmacs'] / max(whole['gmacs'], 1e-12):.1f}",
        )
        for part in facts["parts"]
    ]
    tensors = [
        (tensor["name"], "x".join(map(str, tensor["shape"])), f"{tensor['mib']:.2f}")
        for tensor in facts["activations"]
    ]
    lines = [
        timing.table([("part", "params M", "not trained", "GMAC", "%"), *rows]),
        "",
        f"GMAC: billions of multiply-accumulates of one image of {height} x {width}. Not trained: "
        "numbers of norms.",
        f"Batch {facts['batch']}: {flops:.3f} GFLOPs, two to each multiply-accumulate; XLA counts "
        f"{counted}.",
        "",
        timing.table([("tensor", "shape", "MiB"), *tensors]),
        "",
        f"Forward pass ({facts['dtype']}), XLA's plan: "
        + ", ".join(f"{name.removesuffix('_mib')} {mib:.0f} MiB" for name, mib in _memory(xla)),
        f"Training keeps about {facts['training_residual_mib']:.0f} MiB between its two halves, "
        "besides parameters.",
    ]
    return "\n".join(lines)


def _memory(xla: Mapping[str, Any]) -> list[tuple[str, float]]:
    return [(name, value) for name, value in xla.items() if name.endswith("_mib")]
