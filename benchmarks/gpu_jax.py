"""Rows of this package for gpu.py, each named by what it measures, such as training/8.

Networks, masks and training steps are the workloads of `sparseinst benchmark`. Convolutions and
other small pieces are single operations at the sizes of batch 8 and images of 640x864.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rows

from sparseinst_jax import matching
from sparseinst_jax.cli import benchmark
from sparseinst_jax.cli.arguments import parse_command_line
from sparseinst_jax.cli.measuring.timing import Workload
from sparseinst_jax.cli.measuring.workloads import Bench
from sparseinst_jax.data.batch import Batch
from sparseinst_jax.models import cuda, forms, ops
from sparseinst_jax.models.backbones import deformable
from sparseinst_jax.models.complexity import count_macs, trace_macs
from sparseinst_jax.models.forms import Form
from sparseinst_jax.runtime import process
from sparseinst_jax.setup.builders import build_model
from sparseinst_jax.training.step import TrainState, TrainStep, with_changed

DTYPE = jnp.bfloat16


class Sizes(NamedTuple):
    """What the rows are measured at; `scale` divides maps and matrices of single operations."""

    config: str
    fastinst: str
    image: tuple[int, int]
    scale: int
    most: int  # images of a single operation
    latency: tuple[int, int]  # warm-ups, iterations
    steps: tuple[int, int]
    queue: int


REAL = Sizes("giam_r50", "fastinst_r50_x1", (640, 864), 1, 32, (20, 200), (3, 20), 20)
TINY = Sizes("tiny", "shapes_fastinst", (64, 96), 8, 2, (1, 3), (1, 2), 2)
SIZES = REAL
DONE: list[str] = []  # rows of this process


def make(name: str) -> rows.Row:
    """Measure a row."""
    start = time.perf_counter()
    kind, _, rest = name.partition("/")
    case = WORKS[kind](rest)
    built = time.perf_counter() - start
    warmup, iterations = SIZES.latency if case.images == 1 else SIZES.steps
    if not case.images and not rest.startswith("to_"):  # short: dispatch takes as long as the work
        row = rows.measure(case, warmup=1, iterations=5, queue=SIZES.queue)
    else:
        row = rows.measure(case, warmup=warmup, iterations=iterations)
        queued = rows.measure(case, warmup=0, iterations=3, queue=10)
        row["queued_ms"] = queued["p50_ms"]
    if case.images:
        row |= {"images": case.images, "images_per_s": 1e3 * case.images / row["p50_ms"]}
    row |= {"build_s": built, **case.facts}
    # The process's peak never falls: it is the first row's alone.
    stats = jax.local_devices()[0].memory_stats() or {}
    if not DONE and "peak_bytes_in_use" in stats:
        row["peak_mib"] = stats["peak_bytes_in_use"] / rows.MIB
    DONE.append(name)
    if "gflop" in row:
        row["tflops"] = row["gflop"] / row["p50_ms"]
    if "mib" in row:
        row["gb_per_s"] = row["mib"] * rows.MIB / row["p50_ms"] / 1e6
    if resident := row.pop("resident", None):  # the images lie on the device
        resident = case._replace(launch=resident)
        row["resident_ms"] = rows.measure(resident, warmup=warmup, iterations=iterations)["p50_ms"]
    return row | case.details()


def work(launch: Callable[[], Any], images: int = 0, **facts: Any) -> Workload:
    """A workload of JAX; without images it is short, and its launches are queued."""
    return Workload(launch, images, facts, jax.block_until_ready)


def draw(*shape: int, dtype: Any = None, seed: int = 0) -> jax.Array:
    """Noise on the device, the same million of numbers again and again."""
    noise = np.random.default_rng(seed).standard_normal(2**20 + 7, np.float32)
    return jnp.asarray(np.resize(noise.astype(dtype or DTYPE), shape))


def rates(name: str) -> Workload:
    """The rate of a product, a copy on the device, or a transfer of pageable memory."""
    kind, _, number = name.partition("/")
    if kind == "product":
        side = int(number) // SIZES.scale**2
        a, b, product = draw(side, side), draw(side, side, seed=1), jax.jit(jnp.matmul)
        return work(lambda: product(a, b), gflop=2e-9 * side**3)
    mib = -(-int(number) // SIZES.scale**2)
    host = np.resize(np.arange(999_983, dtype=np.float32), mib * rows.MIB // 4)
    if kind == "to_device":
        return work(lambda: jax.device_put(host), mib=mib)
    if kind == "to_host":  # each array once: it keeps what came to the host
        kept = [jax.device_put(host) for _ in range(SIZES.steps[1] + 40)]
        return work(lambda: np.asarray(kept.pop()), mib=mib)
    held, copy = [jax.device_put(host)], jax.jit(jnp.negative, donate_argnums=0)

    def launch() -> jax.Array:
        held[0] = copy(held[0])
        return held[0]

    return work(launch, mib=2 * mib)


# Single operations: forms by name, the plain one first, and what they all are given.
Forms = tuple[dict[str, Form], tuple[Any, ...]]


def _map(stride: int) -> tuple[int, int]:
    """Height and width of a map of the padded image."""
    height, width = (n // (2 * stride * SIZES.scale) for n in REAL.image)
    return max(2, 2 * height), max(2, 2 * width)


def _first_convolutions() -> Forms:
    """The first convolution of both branches: coordinates and 256 channels, to 256."""
    height, width = _map(8)
    grid = jnp.asarray(ops.coordinates(height, width), DTYPE)[None]
    plain, padded = (forms.joined(form) for form in (forms.convolution(1, 1), cuda.aligned(1)))
    given = draw(8, height, width, 256), draw(3, 3, 258, 256), grid
    return {"plain": plain, "padded": padded, "split": cuda.shared_apart(1)}, given


def _activation_maps() -> Forms:
    """256 channels in 4 groups to 4 times 100 maps."""

    def split(x: jax.Array, kernel: jax.Array) -> jax.Array:
        pairs = zip(jnp.split(x, 4, -1), jnp.split(kernel, 4, -1), strict=True)
        return jnp.concatenate([cuda.aligned(1).forward(*pair) for pair in pairs], -1)

    kinds = {"grouped": forms.convolution(1, 4), "split_104": forms.bilinear(split)}
    return kinds | {"dense": cuda.dense(1, 4)}, (draw(8, *_map(8), 256), draw(3, 3, 64, 400))


def _stem() -> Forms:
    """7x7 with stride 2, 3 channels to 64; images have no gradient."""
    kinds = {"padded_8": cuda.aligned(2), "blocks_16": cuda.blocks_of(2)}
    return {"plain": forms.convolution(2, 1), **kinds}, (draw(8, *_map(1), 3), draw(7, 7, 3, 64))


def _pointwise(stride: int, wide: int, narrow: int) -> Forms:
    kinds = {"conv": forms.convolution(1, 1), "product": cuda.product(1)}
    return kinds, (draw(8, *_map(stride), wide), draw(1, 1, wide, narrow))


def _deformable(stride: int, channels: int, batch: int) -> Forms:
    """3x3, ordinary and with offsets and modulation."""
    shape = batch, *_map(stride)
    places = draw(*shape, deformable.MODULATED_CHANNELS, seed=2)

    def moved(x: jax.Array, kernel: jax.Array) -> jax.Array:
        offsets, modulation = deformable.split_places(2 * places)
        return deformable.convolve(x, offsets, kernel, 1, modulation)

    form = Form(moved, lambda cotangent, *given: jax.vjp(moved, *given)[1](cotangent))
    given = draw(*shape, channels), draw(3, 3, channels, channels)
    return {"dense": forms.convolution(1, 1), "deformable": form}, given


OPERATIONS: dict[str, Callable[[], Forms]] = {
    "first": _first_convolutions,
    "maps": _activation_maps,
    "stem": _stem,
    "1x1_res2": lambda: _pointwise(4, 256, 64),
    "1x1_res4": lambda: _pointwise(16, 1024, 256),
    "3x3": lambda: (
        {"plain": forms.convolution(1, 1)},
        (draw(8, *_map(8), 256), draw(3, 3, 256, 256)),
    ),
    "deformable_8": lambda: _deformable(16, 256, min(8, SIZES.most)),
    "deformable_res4": lambda: _deformable(16, 256, SIZES.most),
    "deformable_res5": lambda: _deformable(32, 512, SIZES.most),
}


@functools.lru_cache(1)
def forms_of(kind: str) -> Forms:
    """Make an operation's forms and what they are given, which the next row takes again."""
    return OPERATIONS[kind]()


def operation(name: str) -> Workload:
    """An operation in one form: forward, or its gradients alone."""
    kind, form, way = name.split("/")
    kinds, given = forms_of(kind)
    first = 1 if kind == "stem" else 0
    gflop = 2e-9 * trace_macs(next(iter(kinds.values())).forward, *given)[""]
    if way == "forward":
        run = jax.jit(kinds[form].forward)
        return work(lambda: run(*given), gflop=gflop)
    cotangent = jnp.ones_like(jax.eval_shape(kinds[form].forward, *given))
    backward = jax.jit(lambda *given: kinds[form].backward(*given)[first:2])
    return work(lambda: backward(cotangent, *given), gflop=gflop * (2 - first))


# The network and its training.


@functools.cache
def bench(batch: int, config: str = "") -> Bench:
    """What `sparseinst benchmark` measures, at the sizes of the rows."""
    size = "x".join(map(str, SIZES.image))
    words = ["--config", config or SIZES.config, "--config.model.dtype=bfloat16", "--size", size]
    words += ["--train-size", size, "--train-batch", str(batch)]
    return Bench(parse_command_line(benchmark.parser(), words), Path())


@functools.cache
def gflop(module: str = "") -> float:
    """Operations of a module of the network for one image, in billions."""
    model = build_model(bench(1).config.model, 80, None)
    return 2e-9 * count_macs(model, *SIZES.image).get(module, 0)


def network(name: str) -> Workload:
    """From uint8 images in the host's memory to the network's outputs on the device."""
    batch = int(name.partition("/")[0])
    found = bench(batch).network(batch)
    *weights, images, valid = found.launch.args
    placed = jax.device_put((images, valid))
    resident = functools.partial(found.launch.func, *weights, *placed)
    return found._replace(facts={"gflop": batch * gflop(), "resident": resident})


def with_masks(name: str) -> Workload:
    """From resized photos to the kept masks at their original size in the host's memory.

    All masks are kept, as the weights are drawn, or so many as the name says.
    """
    batch, *most = map(int, name.split("/"))
    predictor = bench(batch).predictor(batch)
    select = predictor._select_outputs

    def limited(outputs: Any) -> Any:
        logits = outputs.objectness_logits
        is_kept = jnp.arange(logits.shape[1]) < (most or logits.shape[1:])[0]
        return select(outputs._replace(objectness_logits=jnp.where(is_kept, logits, -100.0)))

    predictor._select_outputs = limited  # nothing has been traced yet
    return bench(batch).with_masks(batch, predictor)._replace(facts={"gflop": batch * gflop()})


def train(name: str) -> Workload:
    """Steps, from the host's batch to the new state; and each part of one, waited for."""
    batch = int(name.partition("/")[0])
    return bench(batch).train_step()._replace(facts={"gflop": 3 * batch * gflop()})


def fastinst(name: str) -> Workload:
    """Steps of FastInst; its operations are not counted."""
    return bench(int(name), SIZES.fastinst).train_step()._replace(facts={})


def overlapped(step: TrainStep, state: TrainState, batch: Batch) -> tuple[TrainState, Any]:
    """Take a step that hands every part's first half to the device before it matches any."""
    parts = step.split(batch)
    counts, places = step.counts(parts), step.places(parts)
    parts = [part._replace(image_id=None) for part in parts]
    statistics, waiting = state.statistics, []
    for part, where in zip(parts, places, strict=True):
        first = step._forward(state.params, statistics, state.step, where, part)
        statistics = with_changed(statistics, first[2])
        waiting.append((*first, part, where))
    sums, before = None, state._replace(opt_state=None, average=None)
    stops = np.zeros(len(step.devices), np.int32)
    while waiting:
        outputs, pull_back, changed, scores, part, where = waiting.pop(0)
        rest = outputs, pull_back, changed, part, step.match(scores, part), counts, where
        if waiting:
            sums = step._accumulate(before, stops, sums, *rest)
    return step._finish(state, stops, sums, *rest)


def callback_match(score: jax.Array, is_target: jax.Array) -> jax.Array:
    """Match by SciPy from inside a compiled function: [B, N, M] to int32 [B, M]."""
    result = jax.ShapeDtypeStruct(is_target.shape, jnp.int32)
    return jax.pure_callback(
        lambda s, t: matching.match(np.asarray(s), np.asarray(t)), result, score, is_target
    )


def device_match(score: jax.Array, is_target: jax.Array) -> jax.Array:
    """Match on the device: [B, N, M] to int32 [B, M], M at most N.

    A column of padding costs every prediction the same, so that it changes nothing.
    """

    def one(score: jax.Array, is_target: jax.Array) -> jax.Array:
        cost = jnp.where(is_target, -score, 0.0)
        queries, columns = optax.assignment.hungarian_algorithm(cost)
        found = jnp.zeros(is_target.shape, jnp.int32).at[columns].set(queries.astype(jnp.int32))
        return jnp.where(is_target, found, matching.UNMATCHED)

    return jax.vmap(one)(score, is_target)


def no_match(score: jax.Array, is_target: jax.Array) -> jax.Array:
    """Give target i to prediction i: [B, N, M] to int32 [B, M]."""
    index = jnp.broadcast_to(jnp.arange(is_target.shape[1], dtype=jnp.int32), is_target.shape)
    return jnp.where(is_target, index, matching.UNMATCHED)


MATCHES = {"none": no_match, "callback": callback_match, "device": device_match}


def match_form(name: str) -> Workload:
    """A whole step that matches in another place.

    `host` is the package's, `parts` the same in two parts, `overlapped` see there; the others are
    one compiled program: SciPy in a callback, optax's solver on the device, no matching.
    """
    form, _, number = name.partition("/")
    batch, parts = int(number), 2 if form in ("overlapped", "parts") else 1
    step, state, data = bench(batch).training(parts)
    take, states = step, [step.place(state)]
    if form == "overlapped":
        take = functools.partial(overlapped, step)
    elif form in MATCHES:
        take, states = _one_program(step, data, MATCHES[form]), [jax.device_put(state)]

    def launch() -> Any:
        states[0], result = take(states[0], data)
        return states[0], result

    return work(launch, batch, gflop=3 * batch * gflop())


def _one_program(step: TrainStep, batch: Batch, match: Callable[..., jax.Array]) -> Any:
    """A step as one compiled program."""
    objective, counts = step.objective, step.objective.count(batch)

    def whole(state: TrainState, data: Batch) -> tuple[TrainState, jax.Array]:
        keys = jnp.zeros((len(data.images), 2), jnp.uint32)

        def loss(params: Any) -> tuple[jax.Array, Any]:
            outputs, statistics = objective.forward(params, state.statistics, data)
            scores = jax.lax.stop_gradient(objective.match_scores(outputs, data, keys))
            matches = {name: match(s, data.is_target) for name, s in scores.items()}
            return objective.loss(None, None, outputs, data, matches, counts, keys)[0], statistics

        (total, statistics), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
        updates, opt_state = step.optimizer.update(gradients, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, statistics, opt_state), total

    compiled = jax.jit(whole, donate_argnums=0)
    return lambda state, data: compiled(state, data._replace(image_id=None))


def stage(name: str) -> Workload:
    """The network as training runs it up to a named tensor, and with the parameters' gradients.

    `own_gflop` is of the stage alone; its time is what is left of that of the stage before it.
    """
    number, tensor, way = name.split("/")
    batch, images = int(number), draw(int(number), *SIZES.image, 3, dtype=jnp.float32)
    apply, params, statistics, _ = bench(1).make_network()[0]

    def forward(params: Any, statistics: Any, images: jax.Array) -> jax.Array:
        named: dict[str, jax.Array] = {}
        apply(params, statistics, images, train=True, intermediates=named)
        return named[tensor]

    def total(*given: Any) -> jax.Array:
        return forward(*given).astype(jnp.float32).sum()

    run, times = jax.jit(forward), 1
    if way == "grad":
        run, times = jax.jit(jax.grad(total)), 2 if tensor == "stem" else 3
    own = times * batch * gflop(rows.STAGES[tensor][0])
    return work(lambda: run(params, statistics, images), own_gflop=own)


WORKS: dict[str, Callable[[str], Workload]] = {
    **{"rates": rates, "op": operation, "network": network, "with_masks": with_masks},
    **{"training": train, "matching": match_form, "stage": stage, "fastinst": fastinst},
}


def main() -> int:
    """Measure the rows of a command line."""
    global SIZES
    arguments = rows.arguments(argparse.ArgumentParser())
    process.prepare_process()
    if arguments.dry_run:
        SIZES = TINY
    elif jax.default_backend() == "cpu":
        print("JAX finds no accelerator", file=sys.stderr)
        return rows.NO_DEVICE
    rows.run(arguments, make)
    return 0


if __name__ == "__main__":
    sys.exit(main())
