"""What each stage takes, beside the least that this machine could take for it.

The floor of a stage is the larger of its operations over the rate of a matrix product, and the
bytes that it must move (inputs, weights, results, each once) over the rate of a copy; both rates
are measured again before every stage, and the best counts, so that a moment's other work on the
machine does not lower the floors. A convolution can still beat a product. Each stage is compiled by
itself and runs on what the stage before it gives. With gradients the operations are three times as
many (twice in the stem: images have none), and inputs, weights and results move twice.

    python benchmarks/roofline.py --config configs/giam_r50.py --gradients --output roofline.json
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import time
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from sparseinst_jax import matching
from sparseinst_jax.cli.measuring import inference as benchmark_inference
from sparseinst_jax.cli.measuring import machine, training
from sparseinst_jax.cli.measuring.timing import table, times
from sparseinst_jax.models import ops
from sparseinst_jax.models.complexity import trace_macs
from sparseinst_jax.models.functional import functional
from sparseinst_jax.models.sparseinst import inference
from sparseinst_jax.models.sparseinst.model import Outputs
from sparseinst_jax.runtime import process
from sparseinst_jax.runtime.files import replace_file
from sparseinst_jax.setup.builders import build_model, build_objective
from sparseinst_jax.setup.config import load_config
from sparseinst_jax.training import optimizer

CLASSES = 80
BACKBONE = ("stem", "res2", "res3", "res4", "res5")


# Of what gradients are taken, and how many times the forward pass's operations it then is: of
# nothing; of the first stage's weights; of weights and inputs; of all weights of the whole network,
# whose stages but one have gradients of their inputs.
GRADIENTS = {"none": 0, "weights": 2, "inputs": 3, "whole": 3}


class Stage(NamedTuple):
    """A part of the network.

    Attributes:
      name: of the row.
      function: takes `train`, the weights, the fixed arrays and the inputs.
      weights: what is trained, a tree of arrays, may be empty.
      fixed: what is not trained, such as frozen norms.
      inputs: trees of arrays.
      gradients: a key of GRADIENTS: of what it is measured too.
      without: whether it is measured without gradients.
    """

    name: str
    function: Callable[..., Any]
    weights: Any
    fixed: Any
    inputs: tuple[Any, ...]
    gradients: str = "inputs"
    without: bool = True


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
    reached = Reached(arguments.product, arguments.copy_mib, config.model.dtype)
    rows = []
    for stage in stages(model, config, tuple(arguments.size), arguments.batch, arguments.objects):
        wanted = [False] * stage.without
        wanted += [True] * (arguments.gradients and stage.gradients != "none")
        for with_gradients in wanted:
            reached.measure()
            rows.append(measure(stage, arguments.repeats, with_gradients))
            print(f"{rows[-1]['name']}: {rows[-1]['p50_ms']:.1f} ms", flush=True)
    rows += host_rows(config, tuple(arguments.size), arguments)
    rates = reached.rates
    rows = [with_floor(row, rates) for row in rows]
    print(f"{rates.flops / 1e9:.0f} GFLOP/s in a product, {rates.bytes / 1e9:.1f} GB/s in a copy")
    report = {
        "command": machine.command(),
        "config": os.path.basename(arguments.config),
        "settings": {k: v for k, v in vars(arguments).items() if k not in ("output", "config")},
        "machine": facts,
        "rates": rates._asdict(),
        "stages": rows,
    }
    print(text(rows))
    if arguments.output:
        replace_file(arguments.output, (json.dumps(report, indent=1) + "\n").encode())


class Reached:
    """The best that a square matrix product and a copy have reached so far.

    Of noise: some devices are faster with numbers that are all alike. The copy writes where it
    reads: new memory would be paged in first.
    """

    def __init__(self, side: int, copy_mib: int, dtype: str):
        rng = np.random.default_rng(0)
        self.rates = Rates(0.0, 0.0)
        self._a = jnp.asarray(rng.standard_normal((side, side), np.float32), dtype)
        self._product = jax.jit(lambda a: a @ a)
        self._x = jnp.asarray(rng.random(copy_mib * machine.MIB // 4, np.float32))
        self._copy = jax.jit(lambda x: x + 1, donate_argnums=0)

    def measure(self, repeats: int = 3) -> None:
        """Measure both again."""
        product = min(_milliseconds(self._product, (self._a,), repeats))
        copy = min(_timed(self._copy_once, repeats))
        flops, moved = 2e3 * self._a.shape[0] ** 3 / product, 2e3 * self._x.nbytes / copy
        self.rates = Rates(max(self.rates.flops, flops), max(self.rates.bytes, moved))

    def _copy_once(self) -> None:
        self._x = jax.block_until_ready(self._copy(self._x))


def stages(
    model: Any, config: Any, size: tuple[int, int], batch: int, num_objects: int
) -> Iterator[Stage]:
    """Cut the network into stages, each with the inputs that it has in a forward pass."""
    rng = np.random.default_rng(0)
    images = x = jnp.asarray(rng.standard_normal((batch, *size, 3), np.float32))
    features = {}
    if all(hasattr(model.backbone, name) for name in BACKBONE):
        for name in BACKBONE:
            stage = _module(f"backbone {name}", getattr(model.backbone, name), _in_turn, x)
            yield stage._replace(gradients="weights" if name == "stem" else "inputs")
            x = features[name] = _run(stage)
    else:
        stage = _module("backbone", model.backbone, lambda m, train, x: m(x, train), x)
        yield stage._replace(gradients="weights")
        features = dict(zip(("res3", "res4", "res5"), _run(stage), strict=True))
    levels = features["res3"], features["res4"], features["res5"]
    stage = _module("encoder", model.encoder, lambda m, _, *xs: m(*xs, {}), *levels)
    yield stage
    encoded = _run(stage)
    _, height, width, _ = encoded.shape
    grid = jnp.asarray(ops.coordinates(height, width), encoded.dtype)
    grid = jnp.broadcast_to(grid, (batch, height, width, 2))
    given = jnp.concatenate([grid, encoded], axis=-1)
    stage = _module("instance branch", model.decoder.inst_branch, lambda m, _, x: m(x, {}), given)
    yield stage
    class_logits, kernels, objectness = _run(stage)
    stage = _module("mask branch", model.decoder.mask_branch, lambda m, _, x: m(x), given)
    yield stage
    stage = Stage("masks: product, x2", _masks, {}, {}, (kernels, _run(stage)))
    yield stage
    outputs = Outputs(class_logits, _run(stage), objectness)
    outputs = Outputs(*(array.astype(jnp.float32) for array in outputs))
    yield from _around(model, config, outputs, size, num_objects)
    yield _module("whole network", model, lambda m, train, x: m(x, train), images)._replace(
        gradients="whole"
    )


def _around(
    model: Any, config: Any, outputs: Outputs, size: tuple[int, int], num_objects: int
) -> Iterator[Stage]:
    """What is computed of the network's outputs, and the optimizer."""
    targets = training.random_batch(len(outputs[0]), size, num_objects, CLASSES)
    objective: Any = build_objective(config, lambda *_: None)
    counts, targets = objective.count(targets), targets._replace(image_id=None)
    scores = jax.jit(objective.match_scores)(outputs, targets)
    matches = {"masks": matching.match(np.asarray(scores["masks"]), targets.is_target)}

    def match_scores(train: bool, weights: Any, fixed: Any, outputs: Any, targets: Any) -> Any:
        return objective.match_scores(outputs, targets)

    def losses(train: bool, weights: Any, fixed: Any, outputs: Any) -> Any:
        return objective.loss(None, None, outputs, *fixed)[0]

    def scores(train: bool, weights: Any, fixed: Any, outputs: Any) -> Any:
        return inference.select(outputs)

    yield Stage("match scores", match_scores, {}, {}, (outputs, targets), "none")
    fixed = targets, matches, counts
    yield Stage("losses", losses, {}, fixed, (outputs,), "inputs", without=False)
    yield Stage("scores", scores, {}, {}, (outputs,), "none")
    _, params, _ = functional(model)
    adamw = optimizer.make_optimizer(params, config.train.learning_rate, config.train.weight_decay)

    def update(train: bool, weights: Any, fixed: Any, params: Any, gradients: Any) -> Any:
        updates, state = adamw.update(gradients, fixed, params)
        return optax.apply_updates(params, updates), state

    yield Stage("optimizer", update, {}, adamw.init(params), (params, params), "none")


def _run(stage: Stage) -> Any:
    return jax.jit(functools.partial(stage.function, False))(
        stage.weights, stage.fixed, *stage.inputs
    )


def _module(name: str, module: Any, call: Callable[..., Any], *inputs: Any) -> Stage:
    graphdef, weights, fixed = nnx.split(module, nnx.Param, ...)

    def function(train: bool, weights: Any, fixed: Any, *inputs: Any) -> Any:
        # Copies of the structure: running statistics are changed under the gradient's trace.
        states = [jax.tree.map(lambda leaf: leaf, state) for state in (weights, fixed)]
        return call(nnx.merge(graphdef, *states), train, *inputs)

    return Stage(name, function, weights, fixed, inputs)


def _in_turn(module: Any, train: bool, x: jax.Array) -> jax.Array:
    if not isinstance(module, nnx.List):
        return module(x, train)
    for block in module:
        x = block(x, train, {})
    return x


def _masks(
    train: bool, weights: Any, fixed: Any, kernels: jax.Array, features: jax.Array
) -> jax.Array:
    """As at the end of `IAMDecoder`."""
    logits = jnp.einsum("bnd,bhwd->bnhw", kernels, features, preferred_element_type=jnp.float32)
    height, width = features.shape[1:3]
    return ops.resize_bilinear(logits, (2 * height, 2 * width), axes=(2, 3))


def measure(stage: Stage, repeats: int, with_gradients: bool) -> dict[str, Any]:
    """Measure a stage and count what it must do; plain values."""
    given = jax.device_put((stage.weights, stage.fixed, *stage.inputs))
    function = functools.partial(stage.function, with_gradients)
    results = jax.eval_shape(function, *given)
    flops = 2 * trace_macs(function, *given)[""]
    num_bytes = _bytes(given) + _bytes(results)
    name = stage.name
    if with_gradients:
        function, name = _with_gradients(function, stage.gradients), f"{name}, with gradients"
        flops *= GRADIENTS[stage.gradients]
        num_bytes *= 2
    samples = times(_milliseconds(jax.jit(function), given, repeats))
    counted = {"gflops": flops / 1e9, "mib": num_bytes / machine.MIB}
    return {"name": name, **counted, "p50_ms": samples.p50, "p90_ms": samples.p90}


def with_floor(row: dict[str, Any], rates: Rates) -> dict[str, Any]:
    """Add the floor to a row; one that counts no bytes has none."""
    if "mib" not in row:
        return row
    floor, bound = floor_ms(1e9 * row.get("gflops", 0.0), row["mib"] * machine.MIB, rates)
    return {**row, "floor_ms": floor, "bound": bound, "times_the_floor": row["p50_ms"] / floor}


def _with_gradients(function: Callable[..., Any], of_what: str) -> Callable[..., Any]:
    def run(weights: Any, fixed: Any, *inputs: Any) -> Any:
        if of_what == "inputs":
            results, vjp = jax.vjp(lambda w, *x: function(w, fixed, *x), weights, *inputs)
        else:
            results, vjp = jax.vjp(lambda w: function(w, fixed, *inputs), weights)
        return vjp(jax.tree.map(jnp.ones_like, results))

    return run


def host_rows(
    config: Any, size: tuple[int, int], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Time what the host takes part in: the assignment, and the masks of one image."""
    rng = np.random.default_rng(0)
    number, repeats = config.model.num_masks, arguments.repeats
    score = rng.random((arguments.batch, number, arguments.objects), np.float32)
    is_target = np.ones((arguments.batch, arguments.objects), bool)
    photo = benchmark_inference.usual_photo(size)
    subject: Any = types.SimpleNamespace(
        num_masks=number,
        num_classes=CLASSES,
        size=size,
        photo_size=photo,
        valid_size=benchmark_inference.valid_size(photo, size),
    )
    post = benchmark_inference.post_processing(subject)
    works = {
        "matching on the host": lambda: matching.match(score, is_target),
        f"post-processing: scores, {number} masks to {photo[0]}x{photo[1]}, one image": post.run,
    }
    rows = []
    for name, run in works.items():
        samples = times(_timed(run, repeats))
        rows.append({"name": name, "p50_ms": samples.p50, "p90_ms": samples.p90})
    # At least the logits are read, and a byte written for each pixel of a mask.
    moved = 4 * number * (size[0] // 4) * (size[1] // 4) + number * photo[0] * photo[1]
    rows[-1]["mib"] = moved / machine.MIB
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
    process.prepare_process()
    main()
