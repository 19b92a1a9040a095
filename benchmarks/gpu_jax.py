"""Rows of this package for gpu.py, each named by what it measures, such as training/8.

Training is `TrainStep`, inference with masks is `Predictor`, the network alone is what both call:
uint8 images from the host's memory, normalised within the compiled function. Convolutions and
other small pieces are single operations at the sizes of batch 8 and images of 640x864.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import gpu_rows
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from sparseinst_jax import layers, matching, ops, runtime
from sparseinst_jax.backbones import deformable
from sparseinst_jax.benchmark import inference as subjects
from sparseinst_jax.benchmark import training
from sparseinst_jax.builders import build_model, build_objective
from sparseinst_jax.complexity import count_macs, trace_macs
from sparseinst_jax.config import load_config
from sparseinst_jax.predictor import Predictor, Prepared
from sparseinst_jax.sparseinst import inference
from sparseinst_jax.structures import Batch, Outputs
from sparseinst_jax.training import optimizer
from sparseinst_jax.training.step import TrainState, TrainStep

CLASSES, OBJECTS = 80, 8
DTYPE = jnp.bfloat16
MIB = 2**20


class Sizes(NamedTuple):
    """What the rows are measured at; `scale` divides maps and matrices of single operations."""

    config: str
    image: tuple[int, int]
    scale: int
    latency: tuple[int, int]  # warm-ups, iterations
    steps: tuple[int, int]
    queue: int


REAL = Sizes("configs/giam_r50.py", (640, 864), 1, (20, 200), (3, 20), 20)
TINY = Sizes("configs/tiny.py", (64, 96), 8, (1, 3), (1, 2), 2)
SIZES = REAL


class Case(NamedTuple):
    """A piece of work.

    Attributes:
      launch: does it, see `gpu_rows.measure`.
      images: that it takes.
      gflop: operations of one launch, in billions.
      mib: bytes that it must read and write, in MiB.
      queue: whether launches wait together, as where one is shorter than its dispatch.
      more: further values of the row.
    """

    launch: Callable[[], Any]
    images: int = 0
    gflop: float = 0.0
    mib: float = 0.0
    queue: bool = False
    more: Callable[[], gpu_rows.Row] = dict


def make(name: str) -> gpu_rows.Row:
    """Measure a row."""
    start = time.perf_counter()
    work, _, rest = name.partition("/")
    case = WORKS[work](rest)
    built = time.perf_counter() - start
    warmups, iterations = SIZES.latency if case.images == 1 else SIZES.steps
    wait = jax.block_until_ready
    if case.queue:
        row = gpu_rows.measure(case.launch, wait, warmups=1, iterations=5, queue=SIZES.queue)
    else:
        row = gpu_rows.measure(case.launch, wait, warmups=warmups, iterations=iterations)
        more = gpu_rows.measure(case.launch, wait, warmups=0, iterations=3, queue=10)
        row["queued_ms"] = more["p50_ms"]
    # Of the whole process until here: it never falls.
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    row |= {"build_s": built, "process_peak_mib": peak and peak / MIB}
    row["is_first_of_process"] = not _DONE
    _DONE.append(name)
    if case.images:
        row |= {"images": case.images, "images_per_s": 1e3 * case.images / row["p50_ms"]}
    if case.gflop:
        row |= {"gflop": case.gflop, "tflops": case.gflop / row["p50_ms"]}
    if case.mib:
        row |= {"mib": case.mib, "gb_per_s": case.mib * MIB / row["p50_ms"] / 1e6}
    return row | case.more()


_DONE: list[str] = []


def draw(*shape: int, dtype: Any = DTYPE, seed: int = 0) -> jax.Array:
    """Noise on the device, the same million of numbers again and again."""
    noise = np.random.default_rng(seed).standard_normal(2**20 + 7, np.float32)
    return jnp.asarray(np.resize(noise.astype(dtype), shape))


# The machine.


def rates(name: str) -> Case:
    """The rate of a product, a copy on the device, or a transfer of pageable memory."""
    kind, _, number = name.partition("/")
    size = int(number)
    if kind == "product":
        size //= 8 * SIZES.scale if SIZES.scale > 1 else 1
        a, b = draw(size, size), draw(size, size, seed=1)
        product = jax.jit(jnp.matmul)
        return Case(lambda: product(a, b), gflop=2e-9 * size**3, queue=True)
    mib = max(1, size // (16 * SIZES.scale)) if SIZES.scale > 1 else size
    host = np.random.default_rng(0).integers(0, 256, mib * MIB, np.uint8)
    if kind == "to_device":
        return Case(lambda: jax.device_put(host), mib=mib)
    if kind == "to_host":
        kept = [jax.device_put(host) for _ in range(SIZES.steps[1] + 40)]
        return Case(lambda: np.asarray(kept.pop()), mib=mib)
    held = [jax.device_put(host.view(np.float32))]
    copy = jax.jit(lambda x: -x, donate_argnums=0)

    def launch() -> jax.Array:
        held[0] = copy(held[0])
        return held[0]

    return Case(launch, mib=2 * mib, queue=True)


# Single operations.


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1, groups: int = 1) -> jax.Array:
    """Convolve as `layers.Conv` does on an accelerator."""
    border = (kernel.shape[0] - 1) // 2
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((border, border), (border, border)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _channels(x: jax.Array, number: int, axis: int = -1) -> jax.Array:
    """Pad an axis with zeros to so many."""
    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, number - x.shape[axis])
    return jnp.pad(x, pads)


def _first_convs() -> tuple[dict[str, Callable[..., Any]], tuple[jax.Array, ...]]:
    """The first convolution of both branches: coordinates and 256 channels, to 256."""
    height, width = _map(8)
    grid = jnp.asarray(ops.coordinates(height, width), DTYPE)[None]

    def joined(x: jax.Array, *more: jax.Array) -> jax.Array:
        return jnp.concatenate([jnp.broadcast_to(grid, (*x.shape[:3], 2)), x, *more], -1)

    def padded(x: jax.Array, kernel: jax.Array) -> jax.Array:
        zeros = jnp.zeros((*x.shape[:3], 6), x.dtype)
        return convolve(joined(x, zeros), _channels(kernel, 264, 2))

    def split(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return convolve(x, kernel[:, :, 2:]) + convolve(grid, kernel[:, :, :2])

    forms = {"plain": lambda x, k: convolve(joined(x), k), "padded": padded, "split": split}
    return forms, (draw(8, height, width, 256), draw(3, 3, 258, 256))


def _activation_maps() -> tuple[dict[str, Callable[..., Any]], tuple[jax.Array, ...]]:
    """256 channels in 4 groups to 4 times 100 maps."""
    height, width = _map(8)

    def parts(x: jax.Array, kernel: jax.Array, wide: int) -> jax.Array:
        pairs = zip(jnp.split(x, 4, -1), jnp.split(kernel, 4, -1), strict=True)
        return jnp.concatenate([convolve(i, _channels(k, wide))[..., :100] for i, k in pairs], -1)

    def padded(x: jax.Array, kernel: jax.Array) -> jax.Array:
        wide = _channels(kernel.reshape(3, 3, 64, 4, 100), 104).reshape(3, 3, 64, 416)
        y = convolve(x, wide, groups=4)
        return y.reshape(*y.shape[:3], 4, 104)[..., :100].reshape(*y.shape[:3], 400)

    def dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
        apart = kernel.reshape(3, 3, 1, 64, 4, 100) * jnp.eye(4, dtype=DTYPE)[:, None, :, None]
        return convolve(x, apart.reshape(3, 3, 256, 400))

    forms = {
        "grouped": lambda x, k: convolve(x, k, groups=4),
        "grouped_104": padded,
        "split": lambda x, k: parts(x, k, 100),
        "split_104": lambda x, k: parts(x, k, 104),
        "dense": dense,
    }
    return forms, (draw(8, height, width, 256), draw(3, 3, 64, 400))


def _stem() -> tuple[dict[str, Callable[..., Any]], tuple[jax.Array, ...]]:
    """7x7 with stride 2, 3 channels to 64."""

    def padded(number: int) -> Callable[..., jax.Array]:
        return lambda x, k: convolve(_channels(x, number), _channels(k, number, 2), 2)

    def folded(x: jax.Array, kernel: jax.Array) -> jax.Array:
        # Blocks of 2x2 pixels become channels, the kernel 4x4 with a row of zeros before.
        batch, height, width, _ = x.shape
        x = x.reshape(batch, height // 2, 2, width // 2, 2, 3).swapaxes(2, 3)
        x = x.reshape(batch, height // 2, width // 2, 12)
        kernel = jnp.pad(kernel, ((1, 0), (1, 0), (0, 0), (0, 0)))
        kernel = kernel.reshape(4, 2, 4, 2, 3, 64).swapaxes(1, 2).reshape(4, 4, 12, 64)
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), ((2, 1), (2, 1)), dimension_numbers=numbers
        )

    forms = {"plain": lambda x, k: convolve(x, k, 2), "padded_4": padded(4), "padded_8": padded(8)}
    return forms | {"blocks": folded}, (draw(8, *_map(1), 3), draw(7, 7, 3, 64))


def _pointwise(stride: int, wide: int, narrow: int) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """1x1, as a convolution, as the package's product of matrices, as einsum."""
    forms = {
        "conv": convolve,
        "product": layers._multiply_pixels,
        "einsum": lambda x, k: jnp.einsum("bhwc,co->bhwo", x, k[0, 0]),
    }
    return forms, (draw(8, *_map(stride), wide), draw(1, 1, wide, narrow))


def _deformable(
    stride: int, channels: int, batch: int
) -> tuple[dict[str, Callable[..., Any]], tuple[jax.Array, ...]]:
    """3x3, ordinary and with offsets and modulation."""
    height, width = _map(stride)
    places = draw(batch, height, width, deformable.MODULATED_CHANNELS, seed=2)

    def moved(x: jax.Array, kernel: jax.Array) -> jax.Array:
        offsets, modulation = deformable.split_places(2 * places)
        return deformable.convolve(x, offsets, kernel, 1, modulation)

    given = draw(batch, height, width, channels), draw(3, 3, channels, channels)
    return {"dense": convolve, "deformable": moved}, given


def _upsampling() -> tuple[dict[str, Callable[..., Any]], tuple[jax.Array, ...]]:
    """All masks of a batch to twice their size; the gradient is two products for each axis."""
    height, width = _map(8)
    size = 2 * height, 2 * width
    rows, columns = (ops.bilinear_matrix(n, 2 * n) for n in (height, width))

    def products(precision: str, dtype: Any) -> Callable[[jax.Array], jax.Array]:
        def run(x: jax.Array) -> jax.Array:
            matrices = jnp.asarray(rows, dtype), jnp.asarray(columns, dtype)
            y = jnp.einsum("bnhw,ph,qw->bnpq", x.astype(dtype), *matrices, precision=precision)
            return y.astype(jnp.float32)

        return run

    forms = {
        "package": lambda x: ops.resize_bilinear(x, size, axes=(2, 3)),
        "float32_default": products("default", jnp.float32),
        "bfloat16": products("default", DTYPE),
    }
    return forms, (draw(8, 100, height, width, dtype=jnp.float32),)


def _map(stride: int) -> tuple[int, int]:
    """Height and width of a map of the padded image."""
    height, width = 640 // (stride * SIZES.scale), 864 // (stride * SIZES.scale)
    return max(2, height // 2 * 2), max(2, width // 2 * 2)


OPERATIONS: dict[str, Callable[[], tuple[dict[str, Any], tuple[Any, ...]]]] = {
    "first": _first_convs,
    "maps": _activation_maps,
    "stem": _stem,
    "1x1_res2": lambda: _pointwise(4, 256, 64),
    "1x1_res4": lambda: _pointwise(16, 1024, 256),
    "3x3": lambda: ({"plain": convolve}, (draw(8, *_map(8), 256), draw(3, 3, 256, 256))),
    "deformable_8": lambda: _deformable(16, 256, 8),
    "deformable_res4": lambda: _deformable(16, 256, 32 if SIZES is REAL else 2),
    "deformable_res5": lambda: _deformable(32, 512, 32 if SIZES is REAL else 2),
    "upsampling": _upsampling,
}


@functools.lru_cache(1)
def _forms(kind: str) -> tuple[dict[str, Any], tuple[Any, ...]]:
    return OPERATIONS[kind]()


def operation(name: str) -> Case:
    """An operation in one form: forward, or its gradients alone; images have none."""
    kind, form, direction = name.split("/")
    forms, given = _forms(kind)
    function, plain = forms[form], next(iter(forms.values()))
    gflop = 2e-9 * trace_macs(plain, *given)[""]  # what is asked for, whatever the form computes
    if direction == "forward":
        run = jax.jit(function)
        return Case(lambda: run(*given), gflop=gflop, queue=True)
    cotangent = jnp.ones_like(jax.eval_shape(function, *given))

    def pull_back(cotangent: jax.Array, *given: jax.Array) -> Any:
        if kind == "stem":
            return jax.vjp(lambda k: function(given[0], k), given[1])[1](cotangent)
        return jax.vjp(function, *given)[1](cotangent)

    backward = jax.jit(pull_back)
    times = 1 if kind in ("stem", "upsampling") else 2
    return Case(lambda: backward(cotangent, *given), gflop=times * gflop, queue=True)


# The network and its training.


@functools.cache
def _network() -> tuple[Any, Any, Callable[..., Any], Any, Any]:
    config: Any = load_config(SIZES.config, {"model.dtype": "bfloat16"})
    model: Any = build_model(config.model, CLASSES, config.seed, config.train.frozen_stages)
    return config, model, *layers.functional(model)


@functools.cache
def _gflop() -> float:
    """Operations of the network on one image, in billions."""
    return 2e-9 * count_macs(_network()[1], *SIZES.image)[""]


def network(name: str) -> Case:
    """From uint8 images in the host's memory to the network's outputs on the device.

    Forms: `bf16_weights`, cast once before; `folded`, the frozen norms' factors within the kernels;
    `resident` is of every row: the images lie on the device.
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

    given = jax.device_put((params, statistics))
    placed = jax.device_put((images, valid))

    def resident() -> gpu_rows.Row:
        warmups, iterations = SIZES.latency if batch == 1 else SIZES.steps
        found = gpu_rows.measure(
            lambda: forward(*given, *placed),
            jax.block_until_ready,
            warmups=warmups,
            iterations=iterations,
        )
        return {"resident_ms": found["p50_ms"]}

    return Case(lambda: forward(*given, images, valid), batch, batch * _gflop(), 0.0, more=resident)


def with_masks(name: str) -> Case:
    """From resized photos to the kept masks at their original size in the host's memory."""
    number, _, kept = name.partition("/")
    batch, most = int(number), int(kept or 0)
    config, _, apply, params, statistics = _network()
    photo = subjects.usual_photo(SIZES.image)
    valid = subjects.valid_size(photo, SIZES.image)

    def select(outputs: Outputs) -> inference.Selection:
        if most:  # so many of its masks
            is_kept = jnp.arange(outputs.objectness_logits.shape[1]) < most
            logits = jnp.where(is_kept, outputs.objectness_logits, -100.0)
            outputs = outputs._replace(objectness_logits=logits)
        return inference.select(outputs)

    predictor = Predictor(
        apply,
        params,
        statistics,
        [str(n) for n in range(CLASSES)],
        list(range(CLASSES)),
        (min(SIZES.image), max(SIZES.image)),
        select=select,
        batch_size=batch,
    )
    image = np.random.default_rng(0).integers(0, 256, (*valid, 3), np.uint8)
    items = [Prepared(image, photo, valid) for _ in range(batch)]

    def launch() -> int:
        return sum(len(chunk) for kept in predictor.run(items) for chunk in kept.masks)

    return Case(launch, batch, more=lambda: {"kept": launch() / batch})


def _training(batch: int, parts: int = 1, kind: type[TrainStep] = TrainStep) -> tuple[Any, ...]:
    """A step of the package, its state on the device, its batch and its objective."""
    config, model, apply, params, statistics = _network()
    frozen = [f"backbone/{name}" for name in model.backbone.frozen_names]
    adamw = optimizer.make_optimizer(
        params,
        config.train.learning_rate,
        config.train.weight_decay,
        config.train.gradient_clip_norm,
        frozen,
    )
    objective = build_objective(config, apply)
    step = kind(objective, adamw, micro_batches=parts, devices=jax.local_devices()[:1])
    opt_state = jax.tree.map(np.asarray, jax.jit(adamw.init)(params))
    state = TrainState(np.int32(0), params, statistics, opt_state)
    data = training.random_batch(batch, SIZES.image, OBJECTS, CLASSES)
    return step, state, data, objective, adamw


def train(name: str) -> Case:
    """Steps, from the host's batch to the new state; and each part of one, waited for."""
    batch = int(name.partition("/")[0])
    step, state, data, *_ = _training(batch, kind=training.PartedStep)
    states, losses = [step.place(state)], []

    def launch() -> Any:
        states[0], metrics = step(states[0], data)
        losses.append(metrics["loss/total"])
        return states[0], losses[-1]

    def more() -> gpu_rows.Row:
        found = []
        for _ in range(3):
            states[0], parts = step.parts(states[0], data)
            found.append(parts)
        parts = {name: float(np.median([p[name] for p in found])) for name in found[0]}
        return {"parts": parts, "last_loss": float(np.asarray(losses[-1])[0])}

    return Case(launch, batch, 3 * batch * _gflop(), more=more)


class OverlappedStep(TrainStep):
    """A step that hands every part's first half to the device before it matches any."""

    def __call__(
        self, state: TrainState, batch: Batch, stop: int = 0
    ) -> tuple[TrainState, dict[str, Any]]:
        """See `TrainStep.__call__`."""
        parts = [part._replace(image_id=None) for part in self.split(batch)]
        counts, statistics, waiting = self.counts(parts), state.statistics, []
        for part in parts:
            outputs, pull_back, statistics, score = self._forward(state.params, statistics, part)
            waiting.append((outputs, pull_back, score, part))
        sums = None
        while waiting:
            outputs, pull_back, score, part = waiting.pop(0)
            query_index = matching.match(np.asarray(score), part.is_target)
            rest = part, query_index, counts
            if waiting:
                sums = self._accumulate(sums, state.params, outputs, pull_back, *rest)
        stops = np.full(len(self.devices), stop, np.int32)
        return self._finish(state, stops, sums, outputs, pull_back, statistics, *rest)


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


def match_form(name: str) -> Case:
    """A whole step that matches in another place.

    `host` is the package's; `overlapped` in two parts, `parts` the package's in two; the others
    are one compiled program: SciPy in a callback, optax's solver on the device, nothing matched.
    """
    form, _, number = name.partition("/")
    batch = int(number)
    parts = 2 if form in ("overlapped", "parts") else 1
    kind = OverlappedStep if form == "overlapped" else TrainStep
    step, state, data, objective, adamw = _training(batch, parts, kind)
    if form in ("host", "overlapped", "parts"):
        states = [step.place(state)]

        def launch() -> Any:
            states[0], metrics = step(states[0], data)
            return states[0], metrics["loss/total"]

        return Case(launch, batch, 3 * batch * _gflop())
    match = {"none": no_match, "callback": callback_match, "device": device_match}[form]

    def whole(state: TrainState, data: Batch, counts: Any) -> tuple[TrainState, jax.Array]:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            outputs, statistics = objective.forward(params, state.statistics, data)
            score = jax.lax.stop_gradient(objective.match_score(outputs, data))
            index = match(score, data.is_target)
            return objective.loss(outputs, data, index, counts)[0], statistics

        (total, statistics), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
        updates, opt_state = adamw.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, statistics, opt_state), total

    compiled = jax.jit(whole, donate_argnums=0)
    states, counts = [jax.device_put(state)], objective.count(data)
    data = data._replace(image_id=None)

    def launch_whole() -> Any:
        states[0], total = compiled(states[0], data, counts)
        return states[0], total

    return Case(launch_whole, batch, 3 * batch * _gflop())


@functools.cache
def _stages(batch: int) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """The network in stages as training runs it, each a function of weights and inputs."""
    config, model, apply, params, _ = _network()
    found: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {}

    def add(name: str, module: Any, call: Callable[..., Any], *inputs: Any) -> Any:
        graphdef, *states = nnx.split(module, nnx.Param, ...)
        weights, rest = jax.device_put(states)  # NumPy arrays would be written to under a trace

        def function(weights: Any, *inputs: Any) -> Any:
            # Copies of the structure: running statistics are changed under a trace.
            copies = [jax.tree.map(lambda leaf: leaf, state) for state in (weights, rest)]
            return call(nnx.merge(graphdef, *copies), *inputs)

        found[name] = function, (weights, *inputs)
        return noise(jax.eval_shape(function, weights, *inputs))

    def noise(shapes: Any) -> Any:
        return jax.tree.map(lambda s: draw(*s.shape, dtype=s.dtype), shapes)

    def in_turn(blocks: Any, x: jax.Array) -> jax.Array:
        if not isinstance(blocks, nnx.List):
            return blocks(x, True)
        return functools.reduce(lambda x, block: block(x, True, {}), blocks, x)

    x, levels = draw(batch, *SIZES.image, 3, dtype=jnp.float32), []
    for name in ("stem", "res2", "res3", "res4", "res5"):
        x = add(name, getattr(model.backbone, name), in_turn, x)
        levels.append(x)
    encoded = add("encoder", model.encoder, lambda m, *xs: m(*xs, {}), *levels[2:])
    given = jnp.concatenate([encoded[..., :2], encoded], axis=-1)
    branch, masks = model.decoder.inst_branch, model.decoder.mask_branch
    logits, kernels, objectness = add("inst_branch", branch, lambda m, x: m(x, {}), given)
    features = add("mask_branch", masks, lambda m, x: m(x), given)

    def product(_: Any, kernels: jax.Array, features: jax.Array) -> jax.Array:
        y = jnp.einsum("bnd,bhwd->bnhw", kernels, features, preferred_element_type=jnp.float32)
        return ops.resize_bilinear(y, [2 * n for n in y.shape[2:]], axes=(2, 3))

    found["masks"] = product, ({}, kernels, features)
    wide = [t.astype(jnp.float32) for t in (logits, objectness)]
    outputs = Outputs(
        class_logits=wide[0],
        mask_logits=noise(jax.eval_shape(product, {}, kernels, features)),
        objectness_logits=wide[1],
    )
    objective = build_objective(config, apply)
    data = training.random_batch(batch, SIZES.image, OBJECTS, CLASSES)
    counts, data = objective.count(data), jax.device_put(data._replace(image_id=None))
    index = no_match(jnp.zeros(()), data.is_target)
    found["match_score"] = lambda _, o: objective.match_score(o, data), ({}, outputs)
    found["losses"] = lambda _, o: objective.loss(o, data, index, counts)[0], ({}, outputs)
    adamw = optimizer.make_optimizer(params, 5e-5, 0.05)

    def update(state: Any, params: Any, gradients: Any) -> Any:
        updates, state = adamw.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    found["optimizer"] = update, (jax.jit(adamw.init)(params), params, params)
    return found


def stage(name: str) -> Case:
    """A stage of a training step by itself, forward or forward and backward together.

    The bytes are those of inputs, weights and results, each once, and twice with gradients.
    """
    number, kind, direction = name.split("/")
    function, given = _stages(int(number))[kind]
    given = jax.device_put(given)
    results = jax.eval_shape(function, *given)
    gflop = 2e-9 * trace_macs(function, *given)[""]
    leaves = jax.tree.leaves((given, results))
    mib = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / MIB
    if direction == "forward":
        run = jax.jit(function)
        return Case(lambda: run(*given), gflop=gflop, mib=mib, queue=True)

    def both(weights: Any, *inputs: Any) -> Any:
        if kind == "stem":  # images have no gradient
            results, vjp = jax.vjp(lambda w: function(w, *inputs), weights)
        else:
            results, vjp = jax.vjp(function, weights, *inputs)
        return vjp(jax.tree.map(jnp.ones_like, results))

    backward = jax.jit(both)
    times = 2 if kind == "stem" else 3
    return Case(lambda: backward(*given), gflop=times * gflop, mib=2 * mib, queue=True)


WORKS: dict[str, Callable[[str], Case]] = {
    "rates": rates,
    "op": operation,
    "network": network,
    "with_masks": with_masks,
    "training": train,
    "matching": match_form,
    "stage": stage,
}


def main() -> int:
    """Measure the rows of a command line."""
    global SIZES
    arguments = gpu_rows.parser(__doc__).parse_args()
    runtime.prepare()
    if arguments.dry_run:
        SIZES = TINY
    elif jax.default_backend() == "cpu":
        print("JAX finds no accelerator", file=sys.stderr)
        return gpu_rows.NO_DEVICE
    gpu_rows.run(arguments, make)
    return 0


if __name__ == "__main__":
    sys.exit(main())
