"""The command `summary`: parameters, operations and memory of a network."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sparseinst_jax.cli import command_parser
from sparseinst_jax.cli.arguments import (
    add_config_arguments,
    parse_command_line,
    parse_size,
    size_fault,
    stored_config,
    words_of_overrides,
)
from sparseinst_jax.cli.measuring import machine, timing
from sparseinst_jax.models.complexity import Parameters, count_macs, count_parameters
from sparseinst_jax.models.trees import functional
from sparseinst_jax.runtime.messages import columns, next_commands
from sparseinst_jax.setup import builders
from sparseinst_jax.setup.loading import stored_meta

NUM_CLASSES = 80
DESCRIPTION = """\
Parameters, multiply-accumulates and memory of a configuration's network, part by part. No weights
and no data are needed.

  sparseinst summary --config giam_r50
  sparseinst summary --workdir RUN
  sparseinst summary --config giam_r50 --size 320x448 --batch 8 --json
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = command_parser("summary", DESCRIPTION)
    add = parser.add_argument
    add_config_arguments(parser)
    add("--size", metavar="HxW", type=parse_size, default=(640, 864), help="640x864")
    add("--batch", metavar="N", type=int, default=1, help="images, default 1")
    add("--classes", metavar="K", type=int, help="default: the run's, or 80")
    add("--json", action="store_true", help="all facts as JSON")
    arguments = parse_command_line(parser, argv)
    _check(arguments)
    config: Any = stored_config(arguments)
    classes = arguments.classes or _classes_of(arguments.workdir) or NUM_CLASSES
    model = builders.build_model(config.model, classes, seed=None)
    facts = {
        "config": arguments.config or arguments.workdir,
        "dtype": config.model.dtype,
        "num_classes": classes,
        **describe(model, arguments.size, arguments.batch),
    }
    print(json.dumps(facts, indent=1) if arguments.json else text(facts))
    if not arguments.json:
        source = "config" if arguments.config else "workdir"
        words = [f"--{source}={getattr(arguments, source)}", *words_of_overrides(arguments)]
        print(next_commands(["sparseinst", "benchmark", *words, "--only", "latency"]))
    return 0


def _check(arguments: argparse.Namespace) -> None:
    faults = [size_fault("--size", arguments.size)]
    if bool(arguments.config) == bool(arguments.workdir):
        faults.append("give --config NAME, such as --config giam_r50, or --workdir RUN")
    for name in ("batch", "classes"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            faults.append(f"--{name} must be at least 1, got {value}")
    if any(faults):
        raise ValueError("\n".join(filter(None, faults)))


def _classes_of(workdir: str | None) -> int | None:
    """The number of classes of a run; None without a run, or before it has saved."""
    if workdir is None or not (Path(workdir) / "checkpoints").is_dir():
        return None
    return len(stored_meta(workdir)["class_names"])


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
        *columns([("part", "params M", "not trained", "GMAC", "%"), *rows]),
        "",
        f"GMAC: billions of multiply-accumulates of one image of {height} x {width}. Not trained: "
        "numbers of norms.",
        f"Batch {facts['batch']}: {flops:.3f} GFLOPs, two to each multiply-accumulate; XLA counts "
        f"{counted}.",
        "",
        *columns([("tensor", "shape", "MiB"), *tensors]),
        "",
        f"Forward pass ({facts['dtype']}), XLA's plan: "
        + ", ".join(f"{name.removesuffix('_mib')} {mib:.0f} MiB" for name, mib in _memory(xla)),
        f"Training keeps about {facts['training_residual_mib']:.0f} MiB between its two halves, "
        "besides parameters.",
    ]
    return "\n".join(lines)


def _memory(xla: Mapping[str, Any]) -> list[tuple[str, float]]:
    return [(name, value) for name, value in xla.items() if name.endswith("_mib")]


def describe(model: nnx.Module, size: tuple[int, int], batch: int) -> dict[str, Any]:
    """Everything about a network at one size, as plain values.

    Args:
      model: of any family; its arrays need no numbers.
      size: (height, width) of the padded image, multiples of 32.
      batch: images that go through together.
    """
    apply, params, statistics = functional(model)
    images = jax.ShapeDtypeStruct((batch, *size, 3), jnp.float32)
    given = params, statistics, images
    forward = jax.jit(lambda p, s, x: apply(p, s, x, train=False)[0])
    executable = forward.lower(*given).compile()
    flops = (executable.cost_analysis() or {}).get("flops")
    counted = {"gflops": None if flops is None else flops / 1e9}
    listed = parts(model, size)
    return {
        "size": size,
        "batch": batch,
        "parts": listed,
        "gflops_analytic": 2 * listed[-1]["gmacs"] * batch,
        "xla": counted | machine.compiled_memory(executable),
        "activations": activations(apply, *given),
        "training_residual_mib": residual_mib(apply, *given),
    }


def parts(model: nnx.Module, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Count what each part holds and computes: stages of the backbone, branches, the whole.

    Returns:
      For each `name` ("all" is the whole and comes last), the numbers of `complexity.Parameters`
      and `gmacs`, billions of multiply-accumulates of one image.
    """
    macs = count_macs(model, *size)
    names = []
    for part in (path for path in macs if path and "/" not in path):
        if part in ("backbone", "decoder"):
            names += [path for path in macs if path.rpartition("/")[0] == part]
        names.append(part)
    listed = []
    for name in (*names, ""):
        node: Any = model
        for step in filter(None, name.split("/")):
            node = getattr(node, step)
        blocks = [node] if isinstance(node, nnx.Module) else list(node)  # a stage is a list
        counts = zip(*map(count_parameters, blocks), strict=True)
        held = Parameters(*map(sum, counts))._asdict()
        listed.append({"name": name or "all", **held, "gmacs": macs[name] / 1e9})
    return listed


def activations(apply: Any, params: Any, statistics: Any, images: Any) -> list[dict[str, Any]]:
    """List the named tensors of a forward pass in its order, then its outputs, with their sizes.

    Args:
      apply: the network's pure function, from `models.trees.functional`.
      params: its parameters, or their shapes.
      statistics: the same.
      images: shape and type of the normalised images [B, H, W, 3].
    """
    found: dict[str, Any] = {}

    def forward(params: Any, statistics: Any, x: jax.Array) -> None:
        outputs, _ = apply(params, statistics, x, train=False, intermediates=found)
        for path, leaf in jax.tree_util.tree_leaves_with_path(outputs):
            found[jax.tree_util.keystr(path, simple=True, separator="/")] = leaf

    jax.eval_shape(forward, params, statistics, images)  # tracing fills `found`
    return [{"name": name, "shape": leaf.shape, "mib": _mib(leaf)} for name, leaf in found.items()]


def residual_mib(apply: Any, params: Any, statistics: Any, images: Any) -> float:
    """Return what training keeps between its two halves, without the parameters, in MiB."""

    def first_half(params: Any, statistics: Any, x: jax.Array) -> Any:
        return jax.vjp(lambda p: apply(p, statistics, x, train=True)[0], params)[1]

    kept = jax.eval_shape(first_half, params, statistics, images)
    own = sum(map(_mib, jax.tree.leaves((params, statistics))))
    return max(sum(map(_mib, jax.tree.leaves(kept))) - own, 0.0)


def _mib(leaf: Any) -> float:
    return math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize / timing.MIB
