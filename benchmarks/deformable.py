"""Time and memory of deformable convolution against the ordinary 3x3 convolution of that size.

Every measurement runs all alternatives in turn, again and again, so that what else the machine does
falls on all of them; the ratio is that of the medians. Memory is what XLA reserves besides the
arguments and the results.

    python benchmarks/deformable.py --output deformable.json
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparseinst_jax.cli.measuring import machine
from sparseinst_jax.models.backbones import deformable
from sparseinst_jax.models.functional import functional
from sparseinst_jax.runtime import process
from sparseinst_jax.runtime.files import replace_file
from sparseinst_jax.setup.builders import build_model
from sparseinst_jax.setup.config import load_config

# Height, width and channels of the 3x3 convolutions of ResNet-50 for a padded image of 640x864.
SIZES = {"res4": (40, 54, 256), "res5": (20, 27, 512)}
OFFSET_SPREAD = 2.0  # standard deviation of the offsets in pixels
NETWORKS = {"r50vd": "configs/giam_r50vd.py", "r50vd_dcn": "configs/giam_r50vd_dcn.py"}
NETWORK_SIZE = (320, 448)  # padded height and width in pixels
MIB = 2**20


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=15, help="rounds of the alternation")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--no-network", action="store_true", help="only the convolutions")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--calls", type=int, default=1, help="that are waited for together: many on an accelerator"
    )
    parser.add_argument("--output", help="JSON file")
    arguments = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, load {os.getloadavg()[0]:.2f}")
    print("| what | alternative | time ms | ratio | memory MiB | CPU ms | ratio |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for name, size in SIZES.items():
        for batch in arguments.batch_sizes:
            for kind, functions in convolutions(batch, *size, arguments.dtype).items():
                rows += compare(f"{name}, batch {batch}, {kind}", functions, arguments)
    if not arguments.no_network:
        rows += compare("network, forward", networks(arguments.dtype), arguments)
    if arguments.output:
        settings = {k: v for k, v in vars(arguments).items() if k != "output"}
        report = {"command": machine.command(), "settings": settings}
        report |= {"machine": machine.describe(), "rows": rows}
        replace_file(arguments.output, (json.dumps(report, indent=1) + "\n").encode())


def convolutions(
    batch: int, height: int, width: int, channels: int, dtype: str = "float32"
) -> dict[str, dict[str, Compiled]]:
    """Build the alternatives, forward and with gradients of everything."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

    x, of_y = draw(batch, height, width, channels), draw(batch, height, width, channels)
    kernel = draw(3, 3, channels, channels)
    # Places are float32 in every compute type.
    offsets = OFFSET_SPREAD * draw(batch, height, width, deformable.TAPS, 2).astype(jnp.float32)
    modulation = jax.nn.sigmoid(draw(batch, height, width, deformable.TAPS).astype(jnp.float32))
    offset_kernel = 0.01 * draw(3, 3, channels, deformable.MODULATED_CHANNELS)

    def version_1(x, kernel, offsets):
        return deformable.convolve(x, offsets, kernel)

    def version_2(x, kernel, offsets, modulation):
        return deformable.convolve(x, offsets, kernel, 1, modulation)

    def with_offset_conv(x, kernel, offset_kernel):
        offsets, modulation = deformable.split_places(dense(x, offset_kernel))
        return deformable.convolve(x, offsets, kernel, 1, modulation)

    alternatives = {
        "dense": (dense, (x, kernel)),
        "version 1": (version_1, (x, kernel, offsets)),
        "version 2": (version_2, (x, kernel, offsets, modulation)),
        "version 2 and its offset convolution": (with_offset_conv, (x, kernel, offset_kernel)),
    }

    def with_gradients(function):
        def run(of_y, *given):
            y, vjp = jax.vjp(function, *given)
            return y, vjp(of_y)

        return run

    return {
        "forward": {k: Compiled(f, given) for k, (f, given) in alternatives.items()},
        "with gradients": {
            k: Compiled(with_gradients(f), (of_y, *given)) for k, (f, given) in alternatives.items()
        },
    }


def dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve as `layers.Conv` does."""
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def networks(dtype: str) -> dict[str, Compiled]:
    """Build the whole networks with fresh weights, offsets that are not zero, and one image."""
    alternatives = {}
    images = np.random.default_rng(0).standard_normal((1, *NETWORK_SIZE, 3)).astype(np.float32)
    for name, path in NETWORKS.items():
        config = load_config(path, {"model.dtype": dtype})
        apply, params, statistics = functional(build_model(config.model, 80, 0))
        for stage in ("res4", "res5"):
            for block in params["backbone"][stage].values():
                if "conv2_offset" in block:
                    bias = block["conv2_offset"]["bias"]
                    block["conv2_offset"]["bias"] = bias + np.linspace(
                        -3, 3, bias.size, dtype=bias.dtype
                    )
        forward = lambda p, s, x, apply=apply: apply(p, s, x)[0]  # noqa: E731
        alternatives[name] = Compiled(forward, (params, statistics, images))
    return alternatives


class Compiled:
    """A function compiled for its arguments, to be called without any."""

    def __init__(self, function: Callable, given: tuple[Any, ...]):
        self.given = jax.device_put(given)
        self.executable = jax.jit(function).lower(*self.given).compile()
        analysis: Any = self.executable.memory_analysis()
        self.memory = analysis.temp_size_in_bytes / MIB

    def __call__(self, calls: int = 1) -> None:
        """Run so many times, to the end."""
        jax.block_until_ready([self.executable(*self.given) for _ in range(calls)])


def compare(
    what: str, alternatives: dict[str, Compiled], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Time the alternatives in turn and print a row for each; the first is what they divide by."""
    for run in alternatives.values():
        run()
    wall: dict[str, list[float]] = {name: [] for name in alternatives}
    cpu: dict[str, list[float]] = {name: [] for name in alternatives}
    calls = arguments.calls
    for _ in range(arguments.repeats):
        for name, run in alternatives.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            run(calls)
            cpu[name].append(1e3 * (time.process_time() - start_cpu) / calls)
            wall[name].append(1e3 * (time.perf_counter() - start) / calls)
    base = next(iter(alternatives))
    rows = []
    for name, run in alternatives.items():
        row = {
            "what": what,
            "alternative": name,
            "milliseconds": float(np.median(wall[name])),
            "ratio": float(np.median(wall[name]) / np.median(wall[base])),
            "memory_mib": run.memory,
            "cpu_milliseconds": float(np.median(cpu[name])),
            "cpu_ratio": float(np.median(cpu[name]) / np.median(cpu[base])),
        }
        rows.append(row)
        print(
            f"| {what} | {name} | {row['milliseconds']:.2f} | {row['ratio']:.2f} |"
            f" {run.memory:.1f} | {row['cpu_milliseconds']:.1f} | {row['cpu_ratio']:.2f} |",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    process.prepare_process()
    main()
