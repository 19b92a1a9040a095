"""Draw pictures full of instances, and learn from them to tell instances apart.

  python -m benchmarks.drawn_instances things.safetensors      docs/weights.md: as it was shipped
  python -m benchmarks.drawn_instances drawn.jpg --sheet

Pictures for a network that knows photos (an ImageNet backbone) and has not seen instances: one
thing, a few, piles of equal ones that overlap, and up to sixty small ones, touching, dark on light
and light on dark. Nothing in them comes from a photo. Their classes are outline, colour and
pattern, so that what tells classes apart is not unlearned; some are "thing", the one class whose
layer is kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from PIL import Image, ImageFilter

from sparseinst_jax.data.batch import Batch
from sparseinst_jax.data.target_masks import TargetForm
from sparseinst_jax.models import ops
from sparseinst_jax.models.backbones.efficientnet_lite import FREEZABLE
from sparseinst_jax.models.families import FAMILIES
from sparseinst_jax.models.sparseinst.objective import SparseInstObjective
from sparseinst_jax.models.trees import Tree, functional
from sparseinst_jax.runtime import process
from sparseinst_jax.runtime.progress import map_ahead
from sparseinst_jax.setup import builders
from sparseinst_jax.setup.config import load_config
from sparseinst_jax.setup.published import local_sources
from sparseinst_jax.setup.run import first_state
from sparseinst_jax.training import optimizer
from sparseinst_jax.training.step import TrainStep
from sparseinst_jax.weights.initial_weights import ANY_CLASS, load_initial_weights
from sparseinst_jax.weights.network_files import write_arrays

LEAST_PIXELS, LEAST_RADIUS, PATTERN = 24, 4.5, 7.5  # of a thing; levels of contrast
MOST_THINGS = 50  # of a picture
RATE = 1e-3
AHEAD = 30  # steps that may be drawn before their turn
NUM_ANGLES = 128
OUTLINES = ("blob", "ellipse", "polygon", "box", "bean", "star", "parts")
# "thing"; then outline, which of red, green and blue are bright, and whether it has a pattern.
NUM_CLASSES = 1 + 16 * len(OUTLINES)
# kind of picture: how likely; numbers of things; radii as a share of the short side; share of a
# thing that another may cover; how likely a thing is put beside one that is there
SCENES: dict[str, tuple[float, tuple[int, int], tuple[float, float], float, float]] = {
    "one": (0.15, (1, 1), (0.12, 0.48), 0.0, 0.0),
    "few": (0.3, (2, 9), (0.05, 0.3), 0.35, 0.4),
    "pile": (0.25, (6, 30), (0.06, 0.16), 0.4, 0.8),
    "many": (0.3, (12, 60), (0.02, 0.07), 0.15, 0.6),
}


class Kind(NamedTuple):
    """How the things of one kind look.

    Attributes:
      family: of outlines, one of `OUTLINES`.
      color: the mean of its surface, levels.
      has_pattern: whether the surface is of more than one shade.
      length: the longer axis over the shorter one.
      roughness: of the outline.
      surface: float32 [H, W, 3], levels; each thing shows another part of it.
      color_spread: levels by which the colours of two things differ.
      roundness: how strongly light shades a thing, 0 is flat.
      edge: levels added near the outline.
      hole: radius of the hole as a share of the thing's; 0 is none.
    """

    family: str
    color: np.ndarray
    has_pattern: bool
    length: float
    roughness: float
    surface: np.ndarray
    color_spread: float
    roundness: float
    edge: float
    hole: float


def smooth_noise(rng: np.random.Generator, size: tuple[int, int], cells: float) -> np.ndarray:
    """Noise with about so many bumps along the short side, float32 [H, W], mean 0, spread 1."""
    rows, columns = (max(2, round(cells * n / min(size)) + 1) for n in size)
    coarse = Image.fromarray(rng.standard_normal((rows, columns)).astype(np.float32))
    field = np.asarray(coarse.resize(size[::-1], Image.Resampling.BICUBIC))
    return (field - field.mean()) / max(float(field.std()), 1e-6)


def texture(
    rng: np.random.Generator, size: tuple[int, int], color: np.ndarray, contrast: float
) -> np.ndarray:
    """A surface round a colour: noise of several scales, stripes or waves, float32 [H, W, 3]."""
    image = np.zeros((*size, 3), np.float32) + color.astype(np.float32)
    for _ in range(rng.integers(1, 4)):
        cells = 2 * 40 ** rng.random()
        field = smooth_noise(rng, size, cells)
        if rng.random() < 0.25:
            field = np.sign(field) * np.abs(field) ** 0.3  # patches in place of clouds
        image += field[..., None] * _tint(rng, contrast)
    if rng.random() < 0.25:
        rows, columns = np.mgrid[: size[0], : size[1]].astype(np.float32)
        angle, period = math.pi * rng.random(), min(size) / 2 / 20 ** rng.random()
        along = rows * math.sin(angle) + columns * math.cos(angle)
        along += smooth_noise(rng, size, 4) * period * rng.random()
        image += np.sin(along * (2 * math.pi / period))[..., None] * _tint(rng, contrast)
    return image


def _tint(rng: np.random.Generator, contrast: float) -> np.ndarray:
    """A direction of colour, mostly of brightness."""
    grey = rng.normal() * np.ones(3)
    return ((grey + rng.normal(size=3) * 0.5) * contrast).astype(np.float32)


def _color(rng: np.random.Generator) -> np.ndarray:
    return 20 + 215 * (0.75 * rng.random() + 0.25 * rng.random(3)) * (0.75 + 0.25 * rng.random(3))


def _kind(rng: np.random.Generator, size: tuple[int, int], background: np.ndarray) -> Kind:
    """A kind of things whose mean colour is not the background's, though its shade may be."""
    for _ in range(20):
        color = _color(rng)
        if np.abs(color - background).mean() > 18:
            break
    contrast = 30 * rng.random() ** 2
    return Kind(
        family=str(rng.choice(OUTLINES)),
        color=color,
        has_pattern=contrast > PATTERN,
        length=1 + 3 * rng.random() ** 2.5,
        roughness=0.02 + 0.3 * rng.random() ** 2,
        surface=texture(rng, size, color, contrast),
        color_spread=20 * rng.random() ** 2,
        roundness=(rng.random() < 0.75) * rng.random() * 90,
        edge=(rng.random() < 0.6) * rng.normal() * 35,
        hole=(rng.random() < 0.06) * (0.2 + 0.35 * rng.random()),
    )


def _radii(rng: np.random.Generator, kind: Kind) -> np.ndarray:
    """The outline: radius in each of `NUM_ANGLES` directions, 1 on the average or so."""
    angle = np.linspace(0, 2 * math.pi, NUM_ANGLES, endpoint=False)
    radius = np.ones(NUM_ANGLES)
    if kind.family == "polygon":
        corners = rng.integers(3, 9)
        turns = np.sort((np.arange(corners) + rng.random(corners) * 0.6) * 2 * math.pi / corners)
        gaps = (np.roll(turns, -1) - turns) % (2 * math.pi)
        normals, reach = turns + gaps / 2, np.cos(gaps / 2)
        cosines = np.cos(angle[:, None] - normals)
        radius = np.where(cosines > 1e-3, reach / np.maximum(cosines, 1e-3), 9).min(-1)
    elif kind.family == "box":
        power = 2.5 + 6 * rng.random()
        radius = (abs(np.cos(angle)) ** power + abs(np.sin(angle)) ** power) ** (-1 / power)
    elif kind.family == "star":
        arms = rng.integers(3, 7)
        radius = 1 + (0.15 + 0.3 * rng.random()) * np.cos(arms * angle + 6.3 * rng.random())
    elif kind.family == "parts":  # a body with one or two limbs
        for _ in range(rng.integers(1, 3)):
            turn = (angle - 6.3 * rng.random() + math.pi) % (2 * math.pi) - math.pi
            radius += (0.4 + 0.8 * rng.random()) * np.exp(
                -((turn / (0.12 + 0.2 * rng.random())) ** 2)
            )
    if kind.family != "ellipse":
        for k in range(2, 7):
            share = kind.roughness * rng.normal() / (k - 1)
            radius = radius * (1 + share * np.cos(k * angle + 6.3 * rng.random()))
    return np.clip(radius, 0.25, 2.2)


class _Thing(NamedTuple):
    kind: Kind
    center: np.ndarray
    window: tuple[slice, slice]
    mask: np.ndarray  # bool, of the window
    depth: np.ndarray  # float32, of the window: 0 at the outline, 1 in the middle
    normal: np.ndarray  # float32 [h, w, 2]: outwards, (row, column)


def _thing(
    rng: np.random.Generator, kind: Kind, size: tuple[int, int], center: np.ndarray, radius: float
) -> _Thing | None:
    """The outline of one thing at a place; None where it is outside."""
    table = _radii(rng, kind)
    length = max(1.0, kind.length * (1 + 0.15 * rng.normal()))
    long, short = radius * math.sqrt(length), radius / math.sqrt(length)
    reach = 1.05 * (table.max() * long)
    low = np.maximum(np.floor(center - reach), 0).astype(int)
    high = np.minimum(np.ceil(center + reach) + 1, size).astype(int)
    if (high - low < 2).any():
        return None
    window = (slice(low[0], high[0]), slice(low[1], high[1]))
    rows = (np.arange(low[0], high[0], dtype=np.float32) - center[0])[:, None]
    columns = (np.arange(low[1], high[1], dtype=np.float32) - center[1])[None]
    turn = 2 * math.pi * rng.random()
    cos, sin = math.cos(turn), math.sin(turn)
    u, v = (columns * cos + rows * sin) / long, (rows * cos - columns * sin) / short
    if kind.family == "bean":
        v = v + (0.25 + 0.5 * rng.random()) * (u * u - 0.4)
    place = np.arctan2(v, u) * (NUM_ANGLES / (2 * math.pi)) % NUM_ANGLES
    below = place.astype(int)
    share = place - below
    outline = table[below % NUM_ANGLES] * (1 - share) + table[(below + 1) % NUM_ANGLES] * share
    relative = np.hypot(u, v) / outline
    mask = relative < 1
    if kind.hole:
        mask &= relative > kind.hole
    if mask.sum() < LEAST_PIXELS:
        return None
    depth = np.sqrt(np.clip(1 - relative**2, 0, 1)).astype(np.float32)
    distance = np.maximum(np.hypot(rows, columns), 1e-3)
    steep = np.clip(relative, 0, 1) ** 2 / distance
    normal = np.stack([rows * steep, columns * steep], -1).astype(np.float32)
    return _Thing(kind, center, window, mask, depth, normal)


def _place(
    rng: np.random.Generator,
    size: tuple[int, int],
    there: list[tuple[np.ndarray, float]],
    radius: float,
    beside: float,
) -> np.ndarray:
    """A place for the middle of a thing, often where it touches another one."""
    if there and rng.random() < beside:
        center, other = there[rng.integers(len(there))]
        turn, gap = 2 * math.pi * rng.random(), (radius + other) * (0.75 + 0.35 * rng.random())
        return center + gap * np.array([math.sin(turn), math.cos(turn)])
    return rng.random(2) * size


def _arrange(
    rng: np.random.Generator, size: tuple[int, int], scene: str, kinds: list[Kind]
) -> tuple[list[_Thing], np.ndarray]:
    """Things, and the number of the one that is seen in each pixel, int [H, W], -1 for none."""
    _, (fewest, most), (least, largest), cover, beside = SCENES[scene]
    number = int(fewest * (most / fewest) ** rng.random() + 0.5)
    typical = least * (largest / least) ** rng.random()
    spread = 0.45 * rng.random() if scene in ("pile", "many") else 0.6 * rng.random()
    things: list[_Thing] = []
    owner = np.full(size, -1)
    areas: list[int] = []
    there: list[tuple[np.ndarray, float]] = []
    for _ in range(3 * number):
        share = np.clip(typical * math.exp(spread * rng.normal()), least / 1.5, largest)
        radius = max(float(share * min(size)), LEAST_RADIUS)
        center = _place(rng, size, there, radius, beside)
        if scene == "one":
            center = (0.5 + (rng.random(2) - 0.5) * 0.6) * size
        if not ((center > -0.2 * radius) & (center < np.array(size) + 0.2 * radius)).all():
            continue
        kind = kinds[min(rng.integers(len(kinds) + 1), len(kinds) - 1)]
        thing = _thing(rng, kind, size, center, radius)
        if thing is None:
            continue
        part = owner[thing.window]
        hidden = np.bincount(part[thing.mask] + 1, minlength=len(things) + 1)[1:]
        seen = np.bincount(owner[owner >= 0], minlength=len(things)) if hidden.any() else None
        if seen is not None:
            left = seen - hidden
            touched = hidden > 0
            allowed = np.maximum((1 - cover) * np.array(areas), LEAST_PIXELS)
            if (left[touched] < allowed[touched]).any():
                continue
        part[thing.mask] = len(things)
        things.append(thing)
        areas.append(int(thing.mask.sum()))
        there.append((center, radius))
        if len(things) == number:
            break
    return things, owner


def _mirrored(first: int, number: int, length: int) -> np.ndarray:
    """So many indices from one on, that turn round at the ends."""
    place = np.arange(first, first + number) % (2 * length - 1)
    return np.minimum(place, 2 * length - 2 - place)


def draw(
    seed: int, index: int, short: int = 320
) -> tuple[np.ndarray, list[tuple[np.ndarray, int]]]:
    """Draw one picture: uint8 [H, W, 3], and its things: what is seen, bool [H, W], and class."""
    rng = np.random.default_rng([seed, index])
    long = round(short * rng.choice([4 / 3, 4 / 3, 1.15, 1]))
    size = (short, long)
    names = list(SCENES)
    scene = str(rng.choice(names, p=[SCENES[name][0] for name in names]))
    ground = _color(rng)
    contrast = 35 * rng.random() ** 2
    image = texture(rng, size, ground, contrast)
    several = {"one": 1, "few": 4, "pile": 2, "many": 2}[scene]
    kinds = [_kind(rng, size, ground) for _ in range(rng.integers(1, several + 1))]
    things, owner = _arrange(rng, size, scene, kinds)
    if rng.random() < 0.4 and things:  # shadows on the ground
        shade = Image.fromarray(((owner >= 0) * 255).astype(np.uint8))
        soft = shade.filter(ImageFilter.GaussianBlur(2 + 8 * rng.random()))
        moved = np.roll(np.asarray(soft, np.float32), rng.integers(-6, 7, 2), (0, 1)) / 255
        image *= 1 - (0.2 + 0.5 * rng.random()) * moved[..., None]
    turn = 2 * math.pi * rng.random()
    light = np.array([math.sin(turn), math.cos(turn)], np.float32)
    gloss = (rng.random() < 0.3) * 80 * rng.random()
    rim = (rng.random() < 0.5) * (0.1 + 0.4 * rng.random())  # darker where things touch
    for number, thing in enumerate(things):
        kind, seen = thing.kind, owner[thing.window] == number
        rows, columns = (rng.integers(0, n) for n in size)
        height, width = seen.shape
        surface = kind.surface[_mirrored(rows, height, size[0])]
        surface = surface[:, _mirrored(columns, width, size[1])]
        slope = thing.normal @ light
        shading = kind.roundness * (slope + 0.6 * (thing.depth - 0.7))
        shading += kind.edge * np.exp(-((thing.depth / 0.35) ** 2))
        if gloss:
            shading = shading + gloss * np.clip((slope * 0.6 + thing.depth - 0.95) * 4, 0, 1)
        surface = surface + shading[..., None] + kind.color_spread * _tint(rng, 1.0)
        if rim:
            surface *= (1 - rim * np.exp(-((thing.depth / 0.25) ** 2)))[..., None]
        image[thing.window][seen] = surface[seen]
    tilt = smooth_noise(rng, size, 1.5) * 25 * rng.random() ** 2
    image += tilt[..., None]
    is_grey, is_negative = rng.random() < 0.25, rng.random() < 0.1
    if is_grey:
        image[:] = image.mean(-1, keepdims=True)
    if is_negative:
        image = 255 - image
    picture = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
    picture = picture.filter(ImageFilter.GaussianBlur(0.4 + 1.4 * rng.random() ** 2))
    noise = rng.standard_normal(size).astype(np.float32)[..., None] * 12 * rng.random() ** 2
    image = np.clip(np.asarray(picture, np.float32) + noise, 0, 255).astype(np.uint8)
    found = []
    for number, thing in enumerate(things):
        color = np.full(3, thing.kind.color.mean()) if is_grey else thing.kind.color
        is_bright = (color > 128) != is_negative
        look = 2 * int(is_bright @ (4, 2, 1)) + thing.kind.has_pattern
        label = 1 + 16 * OUTLINES.index(thing.kind.family) + look
        mask = owner == number
        if mask.sum() >= LEAST_PIXELS:
            found.append((mask, 0 if rng.random() < 0.3 else label))
    return image, found


def make_batch(job: tuple[int, int, int, TargetForm]) -> Batch:
    """Draw the pictures of one step: `job` has its number, short side, pictures, form of masks."""
    step, short, number, form = job
    height, width = -(-short // 32) * 32, -(-short * 4 // 3 // 32) * 32
    images = np.zeros((number, height, width, 3), np.uint8)
    valid = np.zeros((number, 2), np.int32)
    masks = np.zeros((number, MOST_THINGS, *form.shape((height, width))), np.uint8)
    is_target = np.zeros((number, MOST_THINGS), bool)
    labels = np.zeros((number, MOST_THINGS), np.int32)
    for place in range(number):
        image, things = draw(0, step * 64 + place, short)
        rows, columns = valid[place] = image.shape[:2]
        images[place, :rows, :columns] = image
        for index, (mask, label) in enumerate(things[:MOST_THINGS]):
            levels = form.encode(mask)
            masks[place, index, : len(levels), : levels.shape[1]] = levels
            is_target[place, index], labels[place, index] = levels.any(), label
    return Batch(images, valid, labels, masks, is_target, np.arange(number))


@dataclasses.dataclass(frozen=True)
class Retaining(SparseInstObjective):
    """SparseInst's objective, and a term for what would be lost on the way: what tells kinds apart.

    A decoder that learns where things are has no use for what the backbone knows of them, and
    drops it. So what is pooled of its features in each thing, and what the matched query got of
    it, must resemble each other from thing to thing as the backbone's features do.
    """

    retained: float = 2.0
    levels: ClassVar = ("blocks2", "blocks4", "blocks6")  # of the backbone, strides 8, 16, 32

    def forward(self, params: Tree, statistics: Tree, batch: Batch) -> tuple[Any, Tree]:
        """Return outputs, instance features [B, N, C], and features pooled in the targets."""
        inside: dict[str, jax.Array] = {}
        images = ops.normalize_images(batch.images, batch.valid_size)
        found = self.apply(params, statistics, images, train=True, intermediates=inside)
        pooled = [_pooled(inside[name], batch.masks) for name in ("inst_convs", *self.levels)]
        return (found[0], inside["instance_features"], pooled), found[1]

    def match_scores(self, outputs: Any, batch: Batch, keys: Any = None) -> dict[str, jax.Array]:
        """As SparseInst's."""
        return super().match_scores(outputs[0], batch)

    def loss(self, params, statistics, outputs, batch, matches, counts, keys=None):
        """SparseInst's loss, and the term `retained`."""
        outputs, queries, (own, *levels) = outputs
        total, terms = super().loss(params, statistics, outputs, batch, matches, counts)
        index = matches["masks"]
        matched = jnp.take_along_axis(queries, jnp.maximum(index, 0)[..., None], 1)
        pairs = [(features, level) for features in (own, matched) for level in levels]
        alike = [_alikeness(*pair, index >= 0) for pair in pairs]
        terms["retained"] = self.retained * (1 - sum(alike) / len(alike))
        return total + terms["retained"], terms


def _pooled(features: jax.Array, masks: jax.Array) -> jax.Array:
    """Means [B, M, C] of features [B, h, w, C] in masks [B, M, H/4, W/4]."""
    (height, width), (rows, columns) = features.shape[1:3], masks.shape[2:]
    blocks = (height, rows // height, width, columns // width)
    weight = masks.reshape(*masks.shape[:2], *blocks).astype(jnp.float32).mean((3, 5))
    total = jnp.maximum(weight.sum((2, 3)), 1e-6)[..., None]
    return jnp.einsum("bmhw,bhwc->bmc", weight, features) / total


def _alikeness(first: jax.Array, second: jax.Array, counts: jax.Array) -> jax.Array:
    """How alike things resemble each other by two descriptions [B, M, C]: at most 1.

    The linear CKA of Kornblith et al., arXiv:1905.00414, over pairs of different things.
    """
    share = counts.reshape(-1, 1) / jnp.maximum(counts.sum(), 1)
    pairs = (counts.reshape(-1, 1) * counts.reshape(1, -1)) * (1 - jnp.eye(counts.size))
    grams = []
    for x in (first, second):
        x = x.reshape(counts.size, -1)
        x = x - (share * x).sum(0)
        x = x / jnp.sqrt((share * x**2).sum(0) + 1e-3 * (share * x**2).sum(0).mean() + 1e-12)
        grams.append((x @ x.T) * pairs)
    a, b = grams
    return (a * b).sum() / jnp.sqrt((a * a).sum() * (b * b).sum() + 1e-12)


def learn(
    output: Path,
    name: str,
    weights: str,
    stages: list[tuple[int, int, int]],
    retained: float,
    workers: int,
) -> None:
    """Train encoder and decoder on drawn pictures; the backbone stays as it is.

    Args:
      output: a `.safetensors` file of encoder and decoder, float16.
      name: of the configuration.
      weights: of the backbone.
      stages: short side of the pictures, pictures a step, number of steps; one after the other.
      retained: weight of `Retaining`'s own term.
      workers: processes that draw.
    """
    config = load_config(name)
    model = builders.build_model(config.model, NUM_CLASSES, 0, len(FREEZABLE))
    apply, params, statistics = functional(model)
    family = FAMILIES[config.model.family]
    sources = local_sources(weights)
    names = [str(label) for label in range(NUM_CLASSES)]
    found = load_initial_weights(sources, params, statistics, names, family.weights)
    params, statistics = jax.tree.map(np.array, (found.params, found.statistics))
    total = sum(number for *_, number in stages)
    rate = optax.warmup_cosine_decay_schedule(1e-6, RATE, min(200, total // 10), total, 1e-6)
    adamw = optimizer.make_optimizer(params, rate, 0.05, 5.0, optimizer.rules_of(model))
    objective = Retaining(apply, config.model.num_masks, **config.objective, retained=retained)
    step = TrainStep(objective, adamw, devices=jax.local_devices()[:1])
    state = step.place(first_state(config, step, params, statistics))
    shapes = (stage[:2] for stage in stages for _ in range(stage[2]))
    jobs = ((index, *shape, family.targets) for index, shape in enumerate(shapes))
    start, rows = time.process_time(), []
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for done, batch in enumerate(map_ahead(pool, make_batch, jobs, AHEAD * workers), 1):
            state, metrics = step(state, batch)
            rows.append({key: float(x[0]) for key, x in metrics.items() if "loss/" in key})
            if done % 100 == 0 or done == total:
                used = time.process_time() - start
                means = (
                    f"{key} {np.mean([row[key] for row in rows[-100:]]):.3f}" for key in rows[0]
                )
                print(f"step {done} of {total}, {used:.0f} s: {', '.join(means)}", flush=True)
    arrays = flatten_dict({"params": step.fetch(state).params}, sep="/")
    kept = {
        # Of the class layer the first class, "thing".
        key: (array[..., :1] if "/cls_score/" in key else array).astype(np.float16)
        for key, array in arrays.items()
        if not key.startswith("params/backbone/")
    }
    output.unlink(missing_ok=True)
    write_arrays(output, kept, {"config": name, "class_names": ANY_CLASS})


def write_sheet(output: Path) -> None:
    """Draw twelve pictures, and their outlines beside them."""
    tiles = []
    for index in range(12):
        image, things = draw(0, index, 213)
        image = image[:213, :213]
        owner = np.full(image.shape[:2], -1)
        for number, (mask, _) in enumerate(things):
            owner[mask[:213, :213]] = number
        edges = (owner != np.roll(owner, 1, 0)) | (owner != np.roll(owner, 1, 1))
        tiles.append(np.concatenate([image, np.where(edges[..., None], (255, 0, 0), image)], 1))
    rows = [np.concatenate(tiles[start : start + 3], 1) for start in range(0, 12, 3)]
    Image.fromarray(np.concatenate(rows).astype(np.uint8)).save(output, quality=80)


def main() -> None:
    """Learn, or show what is drawn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="weights, or with --sheet a picture")
    parser.add_argument("--sheet", action="store_true", help="draw twelve pictures, learn nothing")
    parser.add_argument("--config", default="giam_lite0")
    parser.add_argument("--weights", default="lite0", help="what --init-from takes")
    parser.add_argument("--retained", type=float, default=2.0, help="weight of that term; 0: none")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw")
    parser.add_argument(
        "--stages", nargs="+", default=["160:8:3400", "320:4:600"], metavar="SIDE:PICTURES:STEPS"
    )
    given = parser.parse_args()
    if given.sheet:
        return write_sheet(given.output)
    stages = [(int(a), int(b), int(c)) for a, b, c in (x.split(":") for x in given.stages)]
    learn(given.output, given.config, given.weights, stages, given.retained, given.workers)


if __name__ == "__main__":
    process.set_environment()
    main()
