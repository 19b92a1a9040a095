"""What each stage takes, beside the least that this machine could take for it.

The floor of a stage is the larger of its operations over the rate of a matrix product, and the
bytes that it must move (inputs, weights, results, each once) over the rate of a copy; both rates
are measured in the same run. Each stage is compiled by itself and runs on what the stage before it
gives. With gradients the operations are three times as many, and inputs, weights and results move
twice.

    python benchmarks/roofline.py --config configs/giam_r50.py --gradients --output roofline.json
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparseinst_jax import masks, matching, ops, runtime
from sparseinst_jax.benchmark import inference as benchmark_inference
from sparseinst_jax.benchmark import machine, training
from sparseinst_jax.benchmark.statistics import table, times
from sparseinst_jax.builders import build_model, build_objective
from sparseinst_jax.complexity import trace_macs
from sparseinst_jax.config import load_config
from sparseinst_jax.files import replace_file
from sparseinst_jax.sparseinst import inference
from sparseinst_jax.structures import Outputs

CLASSES = 80
BACKBONE = ("stem", "res2", "res3", "res4", "res5")


class Stage(NamedTuple):
    """A part of the network.

    Attributes:
      name: of the row.
      function: takes its weights and its inputs.
      weights: a tree of arrays, may be empty.
      inputs: arrays.
      is_trained: whether its gradients are measured too.
    """

    name: str
    function: Callable[..., Any]
    weights: Any
    inputs: tuple[Any, ...]
    is_trained: bool = True


class Rates(NamedTuple):
    """What the machine reaches: operations and bytes per second."""

    flops: float
    bytes: float


def floor_ms(flops: float, num_bytes: float, rates: Rates) -> tuple[float, str]:
    """Return the least time in milliseconds, and what it is due to."""
    compute, memory = 1e3 * flops / rates.flops, 1e3 * num_bytes / rates.bytes
    return (compute, "operations") if compute >= memory else (memory, "bytes")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description="Floor and time of each stage.")
    add = parser.add_argument
    add("--config", default="configs/giam_r50.py")
    add("--size", type=int, nargs=2, default=(640, 864), help="padded height, width")
    add("--batch", type=int, default=1)
    add("--objects", type=int, default=8, help="on each image, for the matching")
    add("--gradients", action="store_true", help="also forward and backward together")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--repeats", type=int, default=5)
    add("--product", type=int, default=2048, help="side of the matrices of the measured product")
    add("--copy-mib", type=int, default=256, help="size of the measured copy")
    add("--output", metavar="FILE")
    arguments = parser.parse_args(argv)
    facts = machine.describe()
    config: Any = load_config(arguments.config, {"model.dtype": arguments.dtype})
    model: Any = build_model(config.model, CLASSES, config.seed)
    rates = measure_rates(arguments.product, arguments.copy_mib, config.model.dtype, 5)
    print(f"{rates.flops / 1e9:.0f} GFLOP/s in a product, {rates.bytes / 1e9:.1f} GB/s in a copy")
    rows = []
    for stage in stages(model, config, tuple(arguments.size), arguments.batch, arguments.objects):
        rows.append(measure(stage, rates, arguments.repeats, False))
        if arguments.gradients and stage.is_trained:
            rows.append(measure(stage, rates, arguments.repeats, True))
        print(f"{rows[-1]['name']}: {rows[-1]['p50_ms']:.1f} ms", flush=True)
    rows += host_rows(config, tuple(arguments.size), arguments, rates)
    report = {
        "config": os.path.basename(arguments.config),
        "settings": {k: v for k, v in vars(arguments).items() if k not in ("output", "config")},
        "machine": facts,
        "rates": rates._asdict(),
        "stages": rows,
    }
    print(text(rows))
    if arguments.output:
        replace_file(arguments.output, (json.dumps(report, indent=1) + "\n").encode())


def measure_rates(side: int, copy_mib: int, dtype: str, repeats: int) -> Rates:
    """Measure a square matrix product and a copy; the best of several."""
    a = jnp.ones((side, side), dtype)
    product = _milliseconds(jax.jit(lambda a: a @ a), (a,), repeats)
    x = jnp.ones((copy_mib * 2**20 // 4,), jnp.float32)
    copy = _milliseconds(jax.jit(lambda x: x + 1), (x,), repeats)
    return Rates(2e3 * side**3 / min(product), 2e3 * x.nbytes / min(copy))


def stages(
    model: Any, config: Any, size: tuple[int, int], batch: int, num_objects: int
) -> Iterator[Stage]:
    """Cut the network into stages, each with the inputs that it has in a forward pass."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((batch, *size, 3), np.float32))
    features = {}
    if all(hasattr(model.backbone, name) for name in BACKBONE):
        for name in BACKBONE:
            stage = _module(f"backbone {name}", getattr(model.backbone, name), _in_turn, x)
            yield stage
            x = features[name] = jax.jit(stage.function)(stage.weights, x)
    else:
        stage = _module("backbone", model.backbone, lambda module, x: module(x), x)
        yield stage
        names = "res3", "res4", "res5"
        features = dict(zip(names, jax.jit(stage.function)(stage.weights, x), strict=True))
    levels = features["res3"], features["res4"], features["res5"]
    stage = _module("encoder", model.encoder, lambda module, *xs: module(*xs, {}), *levels)
    yield stage
    encoded = jax.jit(stage.function)(stage.weights, *levels)
    _, height, width, _ = encoded.shape
    grid = jnp.asarray(ops.coordinates(height, width), encoded.dtype)
    grid = jnp.broadcast_to(grid, (batch, height, width, 2))
    given = jnp.concatenate([grid, encoded], axis=-1)
    instances = _module(
        "instance branch", model.decoder.inst_branch, lambda module, x: module(x, {}), given
    )
    yield instances
    class_logits, kernels, objectness = jax.jit(instances.function)(instances.weights, given)
    branch = _module("mask branch", model.decoder.mask_branch, lambda module, x: module(x), given)
    yield branch
    mask_features = jax.jit(branch.function)(branch.weights, given)
    product = Stage("masks: product, x2", _masks, {}, (kernels, mask_features))
    yield product
    mask_logits = jax.jit(_masks)({}, *product.inputs)
    outputs = Outputs(class_logits, mask_logits, objectness)
    outputs = Outputs(*(array.astype(jnp.float32) for array in outputs))
    targets = training.random_batch(batch, size, num_objects, CLASSES)._replace(image_id=None)
    objective = build_objective(config, None)
    yield Stage(
        "match scores", lambda _, o, b: objective.match_score(o, b), {}, (outputs, targets), False
    )
    yield Stage("scores", lambda _, o: inference.select(o), {}, (outputs,), False)


def _module(name: str, module: Any, call: Callable[..., Any], *inputs: Any) -> Stage:
    graphdef, state = nnx.split(module)

    def function(state: Any, *inputs: Any) -> Any:
        return call(nnx.merge(graphdef, state), *inputs)

    return Stage(name, function, state, inputs)


def _in_turn(module: Any, x: jax.Array) -> jax.Array:
    if not isinstance(module, nnx.List):
        return module(x, False)
    for block in module:
        x = block(x, False, {})
    return x


def _masks(_: Any, kernels: jax.Array, features: jax.Array) -> jax.Array:
    """As at the end of `IAMDecoder`."""
    logits = jnp.einsum("bnd,bhwd->bnhw", kernels, features, preferred_element_type=jnp.float32)
    height, width = features.shape[1:3]
    return ops.resize_bilinear(logits, (2 * height, 2 * width), axes=(2, 3))


def measure(stage: Stage, rates: Rates, repeats: int, with_gradients: bool) -> dict[str, Any]:
    """Measure a stage and compute its floor; plain values."""
    given = jax.device_put((stage.weights, *stage.inputs))
    results = jax.eval_shape(stage.function, *given)
    flops = 2 * trace_macs(stage.function, *given)[""]
    num_bytes = _bytes(given) + _bytes(results)
    function, name = stage.function, stage.name
    if with_gradients:
        function, name = _with_gradients(stage.function), f"{stage.name}, with gradients"
        flops, num_bytes = 3 * flops, 2 * num_bytes
    samples = times(_milliseconds(jax.jit(function), given, repeats))
    floor, bound = floor_ms(flops, num_bytes, rates)
    return {
        "name": name,
        "gflops": flops / 1e9,
        "mib": num_bytes / machine.MIB,
        "floor_ms": floor,
        "bound": bound,
        "p50_ms": samples.p50,
        "p90_ms": samples.p90,
        "times_the_floor": samples.p50 / floor,
    }


def _with_gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*given: Any) -> Any:
        results, vjp = jax.vjp(function, *given)
        return vjp(jax.tree.map(jnp.ones_like, results))

    return run


def host_rows(
    config: Any, size: tuple[int, int], arguments: argparse.Namespace, rates: Rates
) -> list[dict[str, Any]]:
    """Time what the host does: the assignment, and the masks to the photo's size."""
    rng = np.random.default_rng(0)
    number, repeats = config.model.num_masks, arguments.repeats
    score = rng.random((arguments.batch, number, arguments.objects), np.float32)
    is_target = np.ones((arguments.batch, arguments.objects), bool)
    photo = benchmark_inference.usual_photo(size)
    valid = benchmark_inference.valid_size(photo, size)
    probs = jnp.asarray(rng.random((1, number, size[0] // 4, size[1] // 4), np.float32))

    def upsample() -> int:
        chunks = masks.upsample_masks(probs, 0, np.arange(number), valid, photo, 0.45)
        return sum(len(chunk) for chunk in chunks)

    works = {
        "matching on the host": lambda: matching.match(score, is_target),
        f"{number} masks to {photo[0]}x{photo[1]}, one image": upsample,
    }
    rows = []
    for name, run in works.items():
        samples = times(_timed(run, repeats))
        rows.append({"name": name, "p50_ms": samples.p50, "p90_ms": samples.p90})
    # The masks are read once and written once; the host then copies them out of their padding.
    written = 3 * number * photo[0] * photo[1] + probs.nbytes
    floor, bound = floor_ms(0.0, written, rates)
    rows[-1] |= {"mib": written / machine.MIB, "floor_ms": floor, "bound": bound}
    rows[-1]["times_the_floor"] = rows[-1]["p50_ms"] / floor
    return rows


def _milliseconds(function: Any, given: tuple[Any, ...], repeats: int) -> list[float]:
    return _timed(lambda: jax.block_until_ready(function(*given)), repeats)


def _timed(run: Callable[[], Any], repeats: int) -> list[float]:
    run()
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        samples.append(1e3 * (time.perf_counter() - start))
    return samples


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def text(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table; what has no floor shows none."""

    def cells(row: dict[str, Any]) -> tuple[str, ...]:
        def number(key: str, digits: int = 1) -> str:
            return f"{row[key]:.{digits}f}" if key in row else "-"

        return (
            row["name"],
            row.get("bound", "-"),
            number("gflops", 2),
            number("mib"),
            number("floor_ms", 2),
            number("p50_ms", 2),
            number("times_the_floor"),
        )

    heading = ("stage", "bound by", "GFLOP", "MiB", "floor ms", "measured ms", "times")
    return table([heading, *map(cells, rows)], texts=2)


if __name__ == "__main__":
    runtime.prepare()
    main()
