"""What `sparseinst benchmark` measures of a network: inference, masks, whole training steps."""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from sparseinst_jax.cli.arguments import open_model, stored_config
from sparseinst_jax.cli.measuring import host_work
from sparseinst_jax.cli.measuring.timing import Workload
from sparseinst_jax.data.batch import Batch
from sparseinst_jax.data.coco import CocoDataset
from sparseinst_jax.data.plan import TrainPlan
from sparseinst_jax.data.target_masks import QUARTER_LEVELS, TargetForm
from sparseinst_jax.data.transforms import padded_size, resized_size
from sparseinst_jax.evaluation.evaluator import predict_dataset
from sparseinst_jax.models.families import FAMILIES
from sparseinst_jax.models.ops import normalize_images
from sparseinst_jax.models.trees import Tree, functional
from sparseinst_jax.runner.predictor import Pending, Prepared
from sparseinst_jax.runtime import process
from sparseinst_jax.setup import builders, datasets
from sparseinst_jax.setup.config import load_config
from sparseinst_jax.setup.loading import build_predictor
from sparseinst_jax.setup.run import first_state, make_plan, make_step
from sparseinst_jax.training.step import TrainState, TrainStep

Size = tuple[int, int]
USUAL_SIZE = (640, 864)  # padded
USUAL_PHOTO = (480, 640)  # of COCO; becomes 640 x 853
NUM_PHOTOS = 32  # drawn for the input pipeline and for whole predictions
BLOCK = 4  # pixels; a drawn object consists of such blocks
STEPS_IN_PARTS = 3


def valid_size(photo_size: Size, size: Size) -> Size:
    """Return what a photo is resized to so that it fills a padded image.

    Raises:
      ValueError: after the resize it would be padded to another size.
    """
    resized = resized_size(photo_size, min(size), max(size))
    if padded_size(resized) != size:
        raise ValueError(
            f"a photo of {photo_size[0]}x{photo_size[1]} is resized to {resized[0]}x{resized[1]}, "
            f"which does not fill --size {size[0]}x{size[1]} (multiples of 32): give --photo-size "
            "HEIGHTxWIDTH of the same shape, or another --size"
        )
    return resized


def usual_photo(size: Size) -> Size:
    """Return the size of COCO's photos where they fill the padded image, else its own size."""
    resized = resized_size(USUAL_PHOTO, min(size), max(size))
    return USUAL_PHOTO if padded_size(resized) == size else size


class Network(NamedTuple):
    """A network as a pure function, see `models.trees.functional`."""

    apply: Any
    params: Tree
    statistics: Tree
    num_classes: int


class Bench:
    """The model and the data of a command line, each made when it is first needed.

    Args:
      arguments: of `sparseinst benchmark`.
      folder: for photos that are drawn.
    """

    def __init__(self, arguments: argparse.Namespace, folder: Path):
        self.arguments, self._folder = arguments, folder
        self._photos: dict[Size, CocoDataset] = {}
        self.size: Size = arguments.size or USUAL_SIZE
        self.photo_size: Size = arguments.photo_size or usual_photo(self.size)

    @functools.cached_property
    def config(self) -> Any:
        """The configuration; images are resized to fill the padded image that was asked for."""
        config, size = stored_config(self.arguments), self.arguments.size
        return config if size is None else _changed(config, {"data.eval_size": sorted(size)})

    @property
    def has_weights(self) -> bool:
        """Whether weights are named; otherwise they are random."""
        arguments = self.arguments
        return bool(arguments.weights or arguments.checkpoint or arguments.workdir)

    @functools.cached_property
    def valid_size(self) -> Size:
        """(height, width) of the resized photo inside the padded image."""
        return valid_size(self.photo_size, self.size)

    @property
    def sizes(self) -> dict[str, Size]:
        """Facts of a result."""
        return {"size": self.size, "photo_size": self.photo_size}

    def photos(self, size: Size) -> CocoDataset:
        """Photos of a size, drawn once."""
        if size not in self._photos:
            folder = self._folder / f"{size[0]}x{size[1]}"
            self._photos[size] = host_work.draw_photos(folder, NUM_PHOTOS, size)
        return self._photos[size]

    @functools.cached_property
    def train_input(self) -> tuple[CocoDataset, TrainPlan]:
        """`config.data.train` with --own-data, else drawn photos; and the plan of their batches."""
        if self.arguments.own_data:
            datasets.draw_missing_data(self.config)
            dataset = datasets.load_train(self.config)
        else:
            dataset = self.photos(self.arguments.photo_size or USUAL_PHOTO)
        size = {"train.batch_size": self.arguments.train_batch}
        return dataset, make_plan(_changed(self.config, size), dataset)

    def make_network(self) -> tuple[Network, Any]:
        """Build the network; returns its module, too, whose first weights live as long as it.

        Each time: training has its own parameters, and these would be kept beside them.
        """
        number, seed, weights = host_work.NUM_CLASSES, self.config.seed, None
        if self.has_weights:
            predictor: Any = open_model(self.arguments).predictor
            number, seed, weights = len(predictor.class_names), None, predictor.weights
        frozen = self.config.train.frozen_stages
        model = builders.build_model(self.config.model, number, seed, frozen)
        apply, *random = functional(model)
        # One copy for all of inference; on a CPU "the device" is the same memory.
        params, statistics = jax.device_put(weights or tuple(random))
        return Network(apply, params, statistics, number), model

    @functools.cached_property
    def _network(self) -> Network:
        return self.make_network()[0]

    def predictor(self, batch: int) -> Any:
        """Make a predictor that sends so many images together."""
        valid_size(self.photo_size, self.size)  # raises where photos do not fill it
        apply, params, statistics, number = self._network
        given = {"data.eval_size": sorted(self.size), "eval.batch_size": batch}
        names = [f"class {i + 1}" for i in range(number)]
        ids = list(range(1, number + 1))
        return build_predictor(_changed(self.config, given), apply, params, statistics, names, ids)

    def network(self, batch: int) -> Workload:
        """From uint8 images on the host to the network's outputs on the device."""
        images = _noise_images(batch, self.size)
        valid = np.full((batch, 2), self.valid_size, np.int32)
        forward, weights = self.compiled_network()
        launch = functools.partial(forward, *weights, images, valid)
        return Workload(
            launch,
            batch,
            {"size": self.size, "batch": batch},
            jax.block_until_ready,
            lambda: {"network": forward.lower(*weights, images, valid).compile()},
        )

    def compiled_network(self) -> tuple[Any, tuple[Tree, Tree]]:
        """Return the network after normalisation as a predictor runs it, and its weights."""
        apply, *weights = self._network[:3]
        if jax.default_backend() != "cpu":
            apply, make = apply.for_inference()
            weights = jax.jit(make)(*weights)

        @jax.jit
        def forward(params: Tree, statistics: Tree, images: jax.Array, valid: jax.Array) -> Any:
            return apply(params, statistics, normalize_images(images, valid), train=False)[0]

        return forward, tuple(weights)

    def items(self, batch: int) -> list[Prepared]:
        """Photos that are resized already."""
        photos, valid = _noise_images(batch, self.valid_size), self.valid_size
        return [Prepared(photo, self.photo_size, valid) for photo in photos]

    def with_masks(self, batch: int, predictor: Any = None) -> Workload:
        """From resized photos on the host to the kept masks at their original size on the host."""
        valid, items = self.valid_size, self.items(batch)
        predictor = predictor or self.predictor(batch)

        def run() -> int:
            return sum(len(chunk) for found in predictor.run(items) for chunk, _ in found.chunks)

        def compiled() -> dict[str, Any]:
            images = np.zeros((batch, *self.size, 3), np.uint8)
            given = *predictor._placed, images, np.full((batch, 2), valid, np.int32)
            return {"network and scores": predictor._forward.lower(*given).compile()}

        facts = {**self.sizes, "batch": batch}
        return Workload(run, batch, facts, compiled=compiled, details=lambda: _kept(run() / batch))

    def end_to_end(self) -> Workload:
        """From an image file to scores, labels and run-length encoded masks."""
        records = self.photos(self.photo_size).records
        sizes = [(record.height, record.width) for record in records]
        path: Any = records[sizes.index(self.photo_size)].path
        predictor = self.predictor(1)
        return Workload(lambda: predictor(path), 1, self.sizes)

    def whole_dataset(self) -> Workload:
        """From the files of a data set to its COCO results: read, computed and packed in turn."""
        predictor, photos = self.predictor(1), self.photos(self.photo_size)
        # The network's classes are not those of the photos; each takes the name of one of theirs.
        names, number = photos.class_names, self._network.num_classes
        predictor.class_names = tuple(names[i % len(names)] for i in range(number))
        return Workload(lambda: predict_dataset(predictor, photos), len(photos.records), self.sizes)

    def post_processing(self) -> Workload:
        """From the network's outputs on the device, all kept, to masks at the original size."""
        apply, *weights = self._network[:3]
        images = np.zeros((1, *self.size, 3), np.float32)
        shapes, _ = jax.eval_shape(functools.partial(apply, train=False), *weights, images)
        # Logits of masks, the arrays of rank 4, are as far from the cut as those of a network.
        outputs = jax.tree.map(lambda x: _normal(*x.shape) * (4 if x.ndim == 4 else 1), shapes)
        predictor = self.predictor(1)
        outputs, select = jax.device_put(outputs), jax.jit(predictor._select_outputs)
        item = Prepared(_noise_images(1, self.valid_size)[0], self.photo_size, self.valid_size)

        def run() -> int:
            (found,) = predictor.finish([Pending([0], [item], select(outputs))])
            return sum(len(chunk) for chunk, _ in found.chunks)

        return Workload(
            run,
            1,
            {**self.sizes, "batch": 1},
            compiled=lambda: {"scores": select.lower(outputs).compile()},
            details=lambda: _kept(run()),
        )

    def training(self, micro_batches: int = 1) -> tuple[TrainStep, TrainState, Batch]:
        """Make a step on one device, its first state, and a batch."""
        given = self.arguments
        config = _changed(self.config, {"train.micro_batches": micro_batches})
        (apply, params, statistics, number), model = self.make_network()
        step, _ = make_step(config, model, apply, params, jax.local_devices()[:1])
        form = FAMILIES[config.model.family].targets
        batch = random_batch(given.train_batch, given.train_size, given.objects, number, form)
        return step, first_state(config, step, params, statistics), batch

    def train_step(self) -> Workload:
        """Build the workload of training."""
        process.unmap_freed_blocks()  # as `train` does
        return train_steps(*self.training())


def _changed(config: Any, values: Mapping[str, Any]) -> Any:
    """A copy of a configuration with other values, checked as those of a command line are."""
    texts = {k: str(tuple(v) if isinstance(v, list) else v) for k, v in values.items()}
    return load_config(config.to_dict(), texts)


def _kept(number: float) -> dict[str, Any]:
    return {"kept_masks_per_image": number, "note": f"{number:g} masks kept an image"}


def _noise_images(number: int, size: Size) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (number, *size, 3), np.uint8)


def _normal(*shape: int) -> Any:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def train_steps(step: TrainStep, state: TrainState, batch: Batch) -> Workload:
    """Whole steps on one batch, from the host's arrays to the new parameters."""
    states = [step.place(state)]  # a list: the state is consumed by every step
    losses = []

    def launch() -> Any:
        states[0], metrics = step(states[0], batch)
        losses.append(metrics["loss/total"])
        return states[0], metrics

    def details() -> dict[str, Any]:
        last, found = float(np.asarray(losses[-1]).mean()), []
        for _ in range(STEPS_IN_PARTS):
            states[0], parts = step_in_parts(step, states[0], batch)
            found.append(parts)
        medians = {name: float(np.median([p[name] for p in found])) for name in found[0]}
        listed = ", ".join(f"{name} {ms:.1f}" for name, ms in medians.items())
        note = f"each part by itself: {listed.replace('_ms', '').replace('_', ' ')} ms"
        return {"last_loss": last, "parts": medians, "note": note}

    def compiled() -> dict[str, Any]:
        part, counts, places = _one_part(step, batch)
        given = states[0].params, states[0].statistics, states[0].step, places, part
        outputs, pull_back, changed, scores = step._forward(*given)
        matches = {name: np.zeros(part.labels.shape, np.int32) for name in scores}
        rest = outputs, pull_back, changed, part, matches, counts, places
        second = step._finish.lower(states[0], np.zeros(1, np.int32), None, *rest)
        first = step._forward.lower(*given)
        return {"first half": first.compile(), "second half": second.compile()}

    number, height, width = batch.images.shape[:3]
    facts = {"size": (height, width), "batch": number, "objects_per_image": batch.labels.shape[1]}
    return Workload(launch, number, facts, jax.block_until_ready, compiled, details)


def _one_part(step: TrainStep, batch: Batch) -> tuple[Batch, Any, np.ndarray]:
    (part,) = step.split(batch)
    return part._replace(image_id=None), step.counts([part]), step.places([part])[0]


def step_in_parts(
    step: TrainStep, state: TrainState, batch: Batch
) -> tuple[TrainState, dict[str, float]]:
    """Take a step without micro-batches and wait after each part; returns milliseconds of each.

    The parts add up to more than a step: nothing overlaps.
    """
    started, found = time.perf_counter(), {}
    part, counts, places = _one_part(step, batch)

    def note(name: str, *computed: Any) -> None:
        nonlocal started
        jax.block_until_ready(computed)
        now = time.perf_counter()
        found[name], started = 1e3 * (now - started), now

    first = step._forward(state.params, state.statistics, state.step, places, part)
    note("first_half_ms", first)
    outputs, pull_back, changed, scores = first
    scores = jax.device_get(scores)
    note("score_to_host_ms")
    matches = step.match(scores, part)
    note("matching_ms")
    del first
    rest = outputs, pull_back, changed, part, matches, counts, places
    state, metrics = step._finish(state, np.zeros(len(step.devices), np.int32), None, *rest)
    note("second_half_ms", state, metrics)
    return state, found


def random_batch(
    number: int, size: Size, num_objects: int, num_classes: int, form: TargetForm = QUARTER_LEVELS
) -> Batch:
    """Draw a batch of noise with boxes as objects.

    Args:
      number: B.
      size: (height, width) of the padded image, multiples of 32.
      num_objects: objects of every image, M.
      num_classes: K.
      form: of their masks.
    """
    rng = np.random.default_rng(0)
    height, width = size[0] // BLOCK, size[1] // BLOCK
    masks = np.zeros((number, num_objects, *form.shape(size)), np.uint8)
    for encoded in masks.reshape(-1, *form.shape(size)):
        mask = np.zeros((height, width), bool)
        top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
        rows, columns = rng.integers(2, height // 2 + 1), rng.integers(2, width // 2 + 1)
        mask[top : top + rows, left : left + columns] = True
        encoded[:] = form.encode(mask.repeat(BLOCK, 0).repeat(BLOCK, 1))
    return Batch(
        images=rng.integers(0, 256, (number, *size, 3), np.uint8),
        valid_size=np.full((number, 2), size, np.int32),
        labels=rng.integers(0, num_classes, (number, num_objects)).astype(np.int32),
        masks=masks,
        is_target=np.ones((number, num_objects), bool),
        image_id=np.arange(number, dtype=np.int64),
    )
