"""Rows of this package for gpu.py, each named by what it measures, such as training/8.

Training is `TrainStep`, inference with masks is `Predictor`, the network alone is what both call:
uint8 images from the host's memory, normalised within the compiled function. Convolutions and
other small pieces are single operations at the sizes of batch 8 and images of 640x864.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import gpu_figures
import gpu_rows
import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparseinst_jax import matching
from sparseinst_jax.checkpoints.state import TrainState
from sparseinst_jax.cli.measuring import inference as subjects
from sparseinst_jax.cli.measuring import training
from sparseinst_jax.data.batch import Batch
from sparseinst_jax.inference.predictor import Predictor, Prepared
from sparseinst_jax.models import ops
from sparseinst_jax.models.backbones import deformable
from sparseinst_jax.models.complexity import count_macs, trace_macs
from sparseinst_jax.models.family import Selection
from sparseinst_jax.models.sparseinst.family import SPARSEINST
from sparseinst_jax.models.sparseinst.model import Outputs
from sparseinst_jax.models.trees import functional
from sparseinst_jax.runtime import process
from sparseinst_jax.setup.builders import build_model, build_objective
from sparseinst_jax.setup.config import load_config
from sparseinst_jax.training import optimizer
from sparseinst_jax.training.step import TrainStep, with_changed

CLASSES, OBJECTS = 80, 8
DTYPE = jnp.bfloat16
Forms = tuple[dict[str, Callable[..., Any]], tuple[Any, ...]]  # and what they all are given


class Sizes(NamedTuple):
    """What the rows are measured at; `scale` divides maps and matrices of single operations."""

    config: str
    image: tuple[int, int]
    scale: int
    most: int  # images of a single operation
    latency: tuple[int, int]  # warm-ups, iterations
    steps: tuple[int, int]
    queue: int


REAL = Sizes("configs/giam_r50.py", (640, 864), 1, 32, (20, 200), (3, 20), 20)
TINY = Sizes("configs/tiny.py", (64, 96), 8, 2, (1, 3), (1, 2), 2)
SIZES = REAL
DONE: list[str] = []  # rows of this process


class Case(NamedTuple):
    """A piece of work: what does it, its images, billions of operations and MiB moved.

    Where `is_short`, dispatch takes as long as the work: launches are queued, with one wait.
    """

    launch: Callable[[], Any]
    images: int = 0
    gflop: float = 0.0
    mib: float = 0.0
    is_short: bool = False
    more: Callable[[], gpu_rows.Row] = dict


def make(name: str) -> gpu_rows.Row:
    """Measure a row."""
    start = time.perf_counter()
    work, _, rest = name.partition("/")
    case = WORKS[work](rest)
    built = time.perf_counter() - start
    if case.is_short:
        row = _measure(case.launch, warmups=1, iterations=5, queue=SIZES.queue)
    else:
        warmups, iterations = SIZES.latency if case.images == 1 else SIZES.steps
        row = _measure(case.launch, warmups=warmups, iterations=iterations)
        row["queued_ms"] = _measure(case.launch, warmups=0, iterations=3, queue=10)["p50_ms"]
    row["build_s"] = built
    # The process's peak never falls: it is the first row's alone.
    stats = jax.local_devices()[0].memory_stats() or {}
    if not DONE and "peak_bytes_in_use" in stats:
        row["peak_mib"] = stats["peak_bytes_in_use"] / gpu_rows.MIB
    DONE.append(name)
    if case.images:
        row |= {"images": case.images, "images_per_s": 1e3 * case.images / row["p50_ms"]}
    if case.gflop:
        row |= {"gflop": case.gflop, "tflops": case.gflop / row["p50_ms"]}
    if case.mib:
        row |= {"mib": case.mib, "gb_per_s": case.mib * gpu_rows.MIB / row["p50_ms"] / 1e6}
    return row | case.more()


def _measure(launch: Callable[[], Any], **options: Any) -> gpu_rows.Row:
    return gpu_rows.measure(launch, jax.block_until_ready, **options)


def draw(*shape: int, dtype: Any = None, seed: int = 0) -> jax.Array:
    """Noise on the device, the same million of numbers again and again."""
    noise = np.random.default_rng(seed).standard_normal(2**20 + 7, np.float32)
    return jnp.asarray(np.resize(noise.astype(dtype or DTYPE), shape))


def rates(name: str) -> Case:
    """The rate of a product, a copy on the device, or a transfer of pageable memory."""
    kind, _, number = name.partition("/")
    if kind == "product":
        side = int(number) // SIZES.scale**2
        a, b, product = draw(side, side), draw(side, side, seed=1), jax.jit(jnp.matmul)
        return Case(lambda: product(a, b), gflop=2e-9 * side**3, is_short=True)
    mib = -(-int(number) // SIZES.scale**2)
    host = np.resize(np.arange(999_983, dtype=np.float32), mib * gpu_rows.MIB // 4)
    if kind == "to_device":
        return Case(lambda: jax.device_put(host), mib=mib)
    if kind == "to_host":  # each array once: it keeps what came to the host
        kept = [jax.device_put(host) for _ in range(SIZES.steps[1] + 40)]
        return Case(lambda: np.asarray(kept.pop()), mib=mib)
    held, copy = [jax.device_put(host)], jax.jit(jnp.negative, donate_argnums=0)

    def launch() -> jax.Array:
        held[0] = copy(held[0])
        return held[0]

    return Case(launch, mib=2 * mib, is_short=True)


# Single operations, each in several forms; the first is what the package does.


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1, **options: Any) -> jax.Array:
    """Convolve as `layers.Conv` does on an accelerator."""
    border = (kernel.shape[0] - 1) // 2
    options = {"padding": ((border, border), (border, border)), **options}
    numbers = ("NHWC", "HWIO", "NHWC")
    strides = stride, stride
    return jax.lax.conv_general_dilated(x, kernel, strides, dimension_numbers=numbers, **options)


def _wide(x: jax.Array, number: int, axis: int = -1) -> jax.Array:
    """Pad an axis with zeros to so many."""
    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, number - x.shape[axis])
    return jnp.pad(x, pads)


def _map(stride: int) -> tuple[int, int]:
    """Height and width of a map of the padded image."""
    height, width = (n // (2 * stride * SIZES.scale) for n in REAL.image)
    return max(2, 2 * height), max(2, 2 * width)


def _first_convs() -> Forms:
    """The first convolution of both branches: coordinates and 256 channels, to 256."""
    height, width = _map(8)
    grid = jnp.asarray(ops.coordinates(height, width), DTYPE)[None]

    def joined(x: jax.Array, kernel: jax.Array, zeros: int = 0) -> jax.Array:
        parts = [jnp.broadcast_to(grid, (*x.shape[:3], 2)), x, jnp.zeros((*x.shape[:3], zeros))]
        parts = [part.astype(x.dtype) for part in parts if part.size]
        return convolve(jnp.concatenate(parts, -1), _wide(kernel, 258 + zeros, 2))

    def split(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return convolve(x, kernel[:, :, 2:]) + convolve(grid, kernel[:, :, :2])

    forms = {"plain": joined, "padded": functools.partial(joined, zeros=6), "split": split}
    return forms, (draw(8, height, width, 256), draw(3, 3, 258, 256))


def _activation_maps() -> Forms:
    """256 channels in 4 groups to 4 times 100 maps."""
    height, width = _map(8)

    def split(x: jax.Array, kernel: jax.Array, wide: int = 100) -> jax.Array:
        pairs = zip(jnp.split(x, 4, -1), jnp.split(kernel, 4, -1), strict=True)
        return jnp.concatenate([convolve(i, _wide(k, wide))[..., :100] for i, k in pairs], -1)

    def padded(x: jax.Array, kernel: jax.Array) -> jax.Array:
        wide = _wide(kernel.reshape(3, 3, 64, 4, 100), 104).reshape(3, 3, 64, 416)
        y = convolve(x, wide, feature_group_count=4)
        return y.reshape(*y.shape[:3], 4, 104)[..., :100].reshape(*y.shape[:3], 400)

    def dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
        apart = kernel.reshape(3, 3, 1, 64, 4, 100) * jnp.eye(4, dtype=DTYPE)[:, None, :, None]
        return convolve(x, apart.reshape(3, 3, 256, 400))

    forms = {
        **{"grouped": functools.partial(convolve, feature_group_count=4), "grouped_104": padded},
        **{"split": split, "split_104": functools.partial(split, wide=104), "dense": dense},
    }
    return forms, (draw(8, height, width, 256), draw(3, 3, 64, 400))


def _stem() -> Forms:
    """7x7 with stride 2, 3 channels to 64."""

    def stem(x: jax.Array, kernel: jax.Array, number: int = 3) -> jax.Array:
        return convolve(_wide(x, number), _wide(kernel, number, 2), 2)

    def blocks(x: jax.Array, kernel: jax.Array, number: int = 12) -> jax.Array:
        # Blocks of 2x2 pixels become channels, the kernel 4x4 with a row of zeros before.
        batch, height, width = x.shape[0], x.shape[1] // 2, x.shape[2] // 2
        x = x.reshape(batch, height, 2, width, 2, 3).swapaxes(2, 3)
        kernel = jnp.pad(kernel, ((1, 0), (1, 0), (0, 0), (0, 0))).reshape(4, 2, 4, 2, 3, 64)
        kernel = _wide(kernel.swapaxes(1, 2).reshape(4, 4, 12, 64), number, 2)
        x = _wide(x.reshape(batch, height, width, 12), number)
        return convolve(x, kernel, padding=((2, 1), (2, 1)))

    forms = {f"padded_{n}": functools.partial(stem, number=n) for n in (4, 8)}
    forms = {"plain": stem, **forms, "blocks": blocks}
    forms["blocks_16"] = functools.partial(blocks, number=16)
    return forms, (draw(8, *_map(1), 3), draw(7, 7, 3, 64))


def _pointwise(stride: int, wide: int, narrow: int) -> Forms:
    """1x1, as the package's product of matrices, as a convolution, as einsum."""
    einsum = lambda x, kernel: jnp.einsum("bhwc,co->bhwo", x, kernel[0, 0])  # noqa: E731
    forms = {"package": ops.convolve, "conv": convolve, "einsum": einsum}
    return forms, (draw(8, *_map(stride), wide), draw(1, 1, wide, narrow))


def _deformable(stride: int, channels: int, batch: int) -> Forms:
    """3x3, ordinary and with offsets and modulation."""
    shape = batch, *_map(stride)
    places = draw(*shape, deformable.MODULATED_CHANNELS, seed=2)

    def moved(x: jax.Array, kernel: jax.Array) -> jax.Array:
        offsets, modulation = deformable.split_places(2 * places)
        return deformable.convolve(x, offsets, kernel, 1, modulation)

    given = draw(*shape, channels), draw(3, 3, channels, channels)
    return {"dense": convolve, "deformable": moved}, given


def _upsampling() -> Forms:
    """All masks of a batch to twice their size."""
    height, width = _map(8)
    rows, columns = (ops.bilinear_matrix(n, 2 * n) for n in (height, width))

    def products(x: jax.Array, dtype: Any) -> jax.Array:
        matrices = jnp.asarray(rows, dtype), jnp.asarray(columns, dtype)
        return jnp.einsum("bnhw,ph,qw->bnpq", x.astype(dtype), *matrices).astype(jnp.float32)

    forms = {
        "package": lambda x: ops.resize_bilinear(x, (2 * height, 2 * width), axes=(2, 3)),
        "float32_default": functools.partial(products, dtype=jnp.float32),
        "bfloat16": functools.partial(products, dtype=jnp.bfloat16),
    }
    return forms, (draw(8, 100, height, width, dtype=jnp.float32),)


OPERATIONS: dict[str, Callable[[], Forms]] = {
    "first": _first_convs,
    "maps": _activation_maps,
    "stem": _stem,
    "1x1_res2": lambda: _pointwise(4, 256, 64),
    "1x1_res4": lambda: _pointwise(16, 1024, 256),
    "3x3": lambda: ({"plain": convolve}, (draw(8, *_map(8), 256), draw(3, 3, 256, 256))),
    "deformable_8": lambda: _deformable(16, 256, min(8, SIZES.most)),
    "deformable_res4": lambda: _deformable(16, 256, SIZES.most),
    "deformable_res5": lambda: _deformable(32, 512, SIZES.most),
    "upsampling": _upsampling,
}


@functools.lru_cache(1)
def forms_of(kind: str) -> Forms:
    """Make an operation's forms and what they are given, which the next row takes again."""
    return OPERATIONS[kind]()


def operation(name: str) -> Case:
    """An operation in one form: forward, or its gradients alone; images have none."""
    kind, form, way = name.split("/")
    forms, given = forms_of(kind)
    function, first = forms[form], 1 if kind == "stem" else 0
    gflop = 2e-9 * trace_macs(next(iter(forms.values())), *given)[""]  # of the first form
    if way == "forward":
        run = jax.jit(function)
        return Case(lambda: run(*given), gflop=gflop, is_short=True)
    cotangent = jnp.ones_like(jax.eval_shape(function, *given))

    def pull_back(cotangent: jax.Array, *given: jax.Array) -> Any:
        _, vjp = jax.vjp(lambda *x: function(*given[:first], *x), *given[first:])
        return vjp(cotangent)

    backward = jax.jit(pull_back)
    gflop *= len(given) - first
    return Case(lambda: backward(cotangent, *given), gflop=gflop, is_short=True)


# The network and its training.


@functools.cache
def _network() -> tuple[Any, Any, Callable[..., Any], Any, Any]:
    config: Any = load_config(SIZES.config, {"model.dtype": "bfloat16"})
    model: Any = build_model(config.model, CLASSES, config.seed, config.train.frozen_stages)
    return config, model, *functional(model)


@functools.cache
def gflop(module: str = "") -> float:
    """Operations of a module of the network for one image, in billions."""
    return 2e-9 * count_macs(_network()[1], *SIZES.image).get(module, 0)


def network(name: str) -> Case:
    """From uint8 images in the host's memory to the network's outputs on the device.

    Forms: `bf16_weights`, cast before; `folded`, the frozen norms' factors within the kernels. In
    `resident_ms` the images lie on the device.
    """
    number, _, form = name.partition("/")
    batch = int(number)
    _, _, apply, params, statistics = _network()
    images = np.random.default_rng(0).integers(0, 256, (batch, *SIZES.image, 3), np.uint8)
    valid = np.full((batch, 2), SIZES.image, np.int32)
    if form == "bf16_weights":
        params = jax.tree.map(lambda x: x.astype(DTYPE), params)

    @jax.jit
    def forward(params: Any, statistics: Any, images: Any, valid: Any) -> Outputs:
        x = ops.normalize_images(images, valid)
        return apply(params, statistics, x, train=form == "folded")[0]

    weights, placed = jax.device_put(((params, statistics), (images, valid)))

    def resident() -> gpu_rows.Row:
        warmups, iterations = SIZES.latency if batch == 1 else SIZES.steps
        launch = functools.partial(forward, *weights, *placed)
        return {"resident_ms": _measure(launch, warmups=warmups, iterations=iterations)["p50_ms"]}

    launch = functools.partial(forward, *weights, images, valid)
    return Case(launch, batch, batch * gflop(), more=resident)


def with_masks(name: str) -> Case:
    """From resized photos to the kept masks at their original size in the host's memory.

    All masks are kept, as the weights are drawn, or so many as the name says.
    """
    batch, most = map(int, f"{name}/{CLASSES * 1000}".split("/")[:2])
    _, _, apply, params, statistics = _network()
    photo = subjects.usual_photo(SIZES.image)
    valid = subjects.valid_size(photo, SIZES.image)

    def select(outputs: Outputs, **options: Any) -> Selection:
        is_kept = jnp.arange(outputs.objectness_logits.shape[1]) < most
        logits = jnp.where(is_kept, outputs.objectness_logits, -100.0)
        return SPARSEINST.select(outputs._replace(objectness_logits=logits), **options)

    names, sides = [str(n) for n in range(CLASSES)], (min(SIZES.image), max(SIZES.image))
    predictor = Predictor(
        *(apply, params, statistics, names, range(CLASSES), sides),
        family=dataclasses.replace(SPARSEINST, select=select),
        batch_size=batch,
    )
    image = np.random.default_rng(0).integers(0, 256, (*valid, 3), np.uint8)
    items = [Prepared(image, photo, valid) for _ in range(batch)]

    def launch() -> int:
        return sum(len(chunk) for found in predictor.run(items) for chunk, _ in found.chunks)

    return Case(launch, batch, batch * gflop(), more=lambda: {"kept": launch() / batch})


def _training(batch: int, kind: type[TrainStep], parts: int = 1) -> tuple[Any, ...]:
    """A step of the package, its state on the host, a batch, the objective and the optimizer."""
    config, model, apply, params, statistics = _network()
    train = config.train
    adamw = optimizer.make_optimizer(
        params,
        train.learning_rate,
        train.weight_decay,
        train.gradient_clip_norm,
        optimizer.rules_of(model),
    )
    objective = build_objective(config, apply)
    step = kind(objective, adamw, micro_batches=parts, devices=jax.local_devices()[:1])
    opt_state = jax.tree.map(np.asarray, jax.jit(adamw.init)(params))
    state = TrainState(np.int32(0), params, statistics, opt_state)
    data = training.random_batch(batch, SIZES.image, OBJECTS, CLASSES)
    return step, state, data, objective, adamw


def _in_turn(step: Callable[..., Any], state: Any, *given: Any) -> tuple[list[Any], Any]:
    """A list that holds the state, which every step consumes, and a function that takes a step."""
    states = [state]

    def launch() -> Any:
        states[0], result = step(states[0], *given)
        return states[0], result

    return states, launch


def train(name: str) -> Case:
    """Steps, from the host's batch to the new state; and each part of one, waited for."""
    batch = int(name.partition("/")[0])
    step, state, data, *_ = _training(batch, training.PartedStep)
    states, launch = _in_turn(step, step.place(state), data)

    def more() -> gpu_rows.Row:
        found = []
        for _ in range(3):
            states[0], parts = step.parts(states[0], data)
            found.append(parts)
        loss = float(np.asarray(launch()[1]["loss/total"])[0])
        medians = {name: float(np.median([p[name] for p in found])) for name in found[0]}
        return {"parts": medians, "last_loss": loss}

    return Case(launch, batch, 3 * batch * gflop(), more=more)


class OverlappedStep(TrainStep):
    """A step that hands every part's first half to the device before it matches any."""

    def __call__(
        self, state: TrainState, batch: Batch, stop: int = 0
    ) -> tuple[TrainState, dict[str, Any]]:
        """See `TrainStep.__call__`."""
        parts = self.split(batch)
        counts, places = self.counts(parts), self.places(parts)
        parts = [part._replace(image_id=None) for part in parts]
        statistics, waiting = state.statistics, []
        for part, where in zip(parts, places, strict=True):
            outputs, pull_back, changed, scores = self._forward(
                state.params, statistics, state.step, where, part
            )
            statistics = with_changed(statistics, changed)
            waiting.append((outputs, pull_back, changed, scores, part, where))
        sums, before = None, state._replace(opt_state=None, average=None)
        stops = np.full(len(self.devices), stop, np.int32)
        while waiting:
            outputs, pull_back, changed, scores, part, where = waiting.pop(0)
            rest = outputs, pull_back, changed, part, self.match(scores, part), counts, where
            if waiting:
                sums = self._accumulate(before, stops, sums, *rest)
        return self._finish(state, stops, sums, *rest)


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
        rows, columns = optax.assignment.hungarian_algorithm(cost)
        found = jnp.zeros(is_target.shape, jnp.int32).at[columns].set(rows.astype(jnp.int32))
        return jnp.where(is_target, found, matching.UNMATCHED)

    return jax.vmap(one)(score, is_target)


def no_match(score: jax.Array, is_target: jax.Array) -> jax.Array:
    """Give target i to prediction i: [B, N, M] to int32 [B, M]."""
    index = jnp.broadcast_to(jnp.arange(is_target.shape[1], dtype=jnp.int32), is_target.shape)
    return jnp.where(is_target, index, matching.UNMATCHED)


MATCHES = {"none": no_match, "callback": callback_match, "device": device_match}


def match_form(name: str) -> Case:
    """A whole step that matches in another place.

    `host` is the package's, `parts` the same in two parts, `overlapped` see `OverlappedStep`; the
    others are one compiled program: SciPy in a callback, optax's solver on the device, no matching.
    """
    form, _, number = name.partition("/")
    batch = int(number)
    kind = OverlappedStep if form == "overlapped" else TrainStep
    parts = 2 if form in ("overlapped", "parts") else 1
    step, state, data, objective, adamw = _training(batch, kind, parts)
    work = batch, 3 * batch * gflop()
    if form not in MATCHES:
        return Case(_in_turn(step, step.place(state), data)[1], *work)

    def whole(state: TrainState, data: Batch, counts: Any) -> tuple[TrainState, jax.Array]:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            outputs, statistics = objective.forward(params, state.statistics, data)
            scores = jax.lax.stop_gradient(objective.match_scores(outputs, data))
            matches = {name: MATCHES[form](s, data.is_target) for name, s in scores.items()}
            return objective.loss(None, None, outputs, data, matches, counts)[0], statistics

        (total, statistics), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
        updates, opt_state = adamw.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, statistics, opt_state), total

    given = data._replace(image_id=None), objective.count(data)
    compiled = jax.jit(whole, donate_argnums=0)
    return Case(_in_turn(compiled, jax.device_put(state), *given)[1], *work)


def stage(name: str) -> Case:
    """The network as training runs it up to a named tensor, and with the parameters' gradients.

    `own_gflop` is of the stage alone; its time is what is left of that of the stage before it.
    """
    number, tensor, way = name.split("/")
    batch, images = int(number), draw(int(number), *SIZES.image, 3, dtype=jnp.float32)
    _, _, apply, params, statistics = _network()
    given = jax.device_put((params, statistics))

    def forward(params: Any, statistics: Any, images: jax.Array) -> jax.Array:
        named: dict[str, jax.Array] = {}
        apply(params, statistics, images, train=True, intermediates=named)
        return named[tensor]

    def total(*given: Any) -> jax.Array:
        return forward(*given).astype(jnp.float32).sum()

    run, times = jax.jit(forward), 1
    if way == "grad":
        run, times = jax.jit(jax.grad(total)), 2 if tensor == "stem" else 3
    own = times * batch * gflop(gpu_figures.STAGES[tensor][0])
    return Case(lambda: run(*given, images), is_short=True, more=lambda: {"own_gflop": own})


WORKS: dict[str, Callable[[str], Case]] = {
    **{"rates": rates, "op": operation, "network": network, "with_masks": with_masks},
    **{"training": train, "matching": match_form, "stage": stage},
}


def main() -> int:
    """Measure the rows of a command line."""
    global SIZES
    arguments = gpu_rows.arguments()
    process.prepare_process()
    if arguments.dry_run:
        SIZES = TINY
    elif jax.default_backend() == "cpu":
        print("JAX finds no accelerator", file=sys.stderr)
        return gpu_rows.NO_DEVICE
    gpu_rows.run(arguments, make)
    return 0


if __name__ == "__main__":
    sys.exit(main())
