"""What `sparseinst benchmark` can measure, built from a command line only when it is asked for."""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from sparseinst_jax.cli.arguments import open_source, stored_config
from sparseinst_jax.cli.measuring import inference, input_pipeline, photos, scoring, training
from sparseinst_jax.cli.measuring.workloads import Workload
from sparseinst_jax.data import coco
from sparseinst_jax.data.transforms import padded_size, resized_size
from sparseinst_jax.inference.predictor import Predictor
from sparseinst_jax.models import layers
from sparseinst_jax.models.layers import Tree
from sparseinst_jax.runtime import process
from sparseinst_jax.setup import builders, datasets, train_setup
from sparseinst_jax.setup.config import load_config
from sparseinst_jax.setup.datasets import draw_missing_data
from sparseinst_jax.setup.loading import build_predictor
from sparseinst_jax.training import optimizer

Size = tuple[int, int]
Named = Iterator[tuple[str, Callable[[], Workload]]]
NUM_PHOTOS = 32  # drawn for the input pipeline


class Bench:
    """The model and the data of a command line, each made when it is first needed.

    Args:
      arguments: of `sparseinst benchmark`.
      folder: for photos that are drawn.
    """

    def __init__(self, arguments: argparse.Namespace, folder: Path):
        self.arguments, self._folder = arguments, folder

    @functools.cached_property
    def size(self) -> Size | None:
        """(height, width) of the padded image, from --size or --shortest-side; None without."""
        arguments = self.arguments
        if arguments.shortest_side is None:
            return arguments.size
        photo = arguments.photo_size or inference.USUAL_PHOTO
        longest = stored_config(arguments).data.eval_size[1]
        return padded_size(resized_size(photo, arguments.shortest_side, longest))

    @functools.cached_property
    def config(self) -> Any:
        """The configuration; images are resized to fill the padded image that was asked for."""
        config = stored_config(self.arguments)
        if self.size is None:
            return config
        sides = str((min(self.size), max(self.size)))
        return load_config(config.to_dict(), {"data.eval_size": sides})

    @property
    def has_weights(self) -> bool:
        """Whether weights are named; otherwise they are drawn."""
        arguments = self.arguments
        return bool(arguments.weights or arguments.checkpoint or arguments.workdir)

    def _network(self) -> tuple[Callable[..., Any], Tree, Tree, int]:
        """Build the pure function, parameters, statistics; and the number of classes.

        Each time anew: training has its own parameters, and these would be held beside them.
        """
        names = [f"class {i + 1}" for i in range(photos.NUM_CLASSES)]
        params = statistics = None
        if self.has_weights:
            predictor = open_source(self.arguments).predictor
            names, (params, statistics) = predictor.class_names, predictor.weights
        frozen = self.config.train.frozen_stages
        seed = None if self.has_weights else self.config.seed
        model = builders.build_model(self.config.model, len(names), seed, frozen)
        apply, drawn_params, drawn_statistics = layers.functional(model)
        if params is None or statistics is None:
            params, statistics = drawn_params, drawn_statistics
        # One copy for all of inference; on a CPU "the device" is the same memory.
        params, statistics = jax.device_put((params, statistics))
        self.parameter_rules = optimizer.rules_of(model)
        return apply, params, statistics, len(names)

    @functools.cached_property
    def subject(self) -> inference.Subject:
        """What inference is measured on."""
        apply, params, statistics, num_classes = self._network()
        size = self.size or inference.USUAL_SIZE
        photo_size = self.arguments.photo_size or inference.usual_photo(size)
        inference.valid_size(photo_size, size)

        def make_predictor(batch: int) -> Predictor:
            sides = {"data.eval_size": str((min(size), max(size))), "eval.batch_size": str(batch)}
            config = load_config(self.config.to_dict(), sides)
            names = [str(number) for number in range(num_classes)]
            return build_predictor(
                config, apply, params, statistics, names, list(range(num_classes))
            )

        return inference.Subject(
            apply,
            params,
            statistics,
            make_predictor,
            builders.num_masks(self.config.model),
            num_classes,
            size,
            photo_size,
        )

    def photo(self) -> Path:
        """Return a photo of --photo-size."""
        size = self.subject.photo_size
        return next((self._drawn(1, size, 1) / "images").iterdir())

    @functools.cached_property
    def train_data(self) -> coco.CocoDataset:
        """`config.data.train` with --own-data, else drawn photos."""
        if self.arguments.own_data:
            draw_missing_data(self.config)
            return datasets.load_train(self.config)
        size = self.arguments.photo_size or inference.USUAL_PHOTO
        folder = self._drawn(NUM_PHOTOS, size, self.arguments.objects)
        return coco.load_coco(folder / "annotations.json", folder / "images")

    def _drawn(self, number: int, size: Size, num_objects: int) -> Path:
        folder = self._folder / f"{number}-{size[0]}x{size[1]}-{num_objects}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            photos.draw_photos(folder, number, size, num_objects)
        return folder

    def train_step(self) -> Workload:
        """Build the workload of training."""
        process.unmap_freed_blocks()  # as `train` does
        arguments, config = self.arguments, self.config
        apply, params, statistics, num_classes = self._network()
        adamw = optimizer.make_optimizer(
            params,
            config.train.learning_rate,
            config.train.weight_decay,
            config.train.gradient_clip_norm,
            self.parameter_rules,
        )
        batch = training.random_batch(
            arguments.train_batch, arguments.train_size, arguments.objects, num_classes
        )
        objective = builders.build_objective(config, apply)
        return training.step(objective, adamw, params, statistics, batch, arguments.micro_batches)


def latency(bench: Bench) -> Named:
    """Batch 1: the network, with post-processing, from the file."""
    yield "latency/network", lambda: inference.network(bench.subject, 1)
    yield "latency/with_masks", lambda: inference.with_masks(bench.subject, 1)
    yield "latency/end_to_end", lambda: inference.end_to_end(bench.subject, bench.photo())


def throughput(bench: Bench) -> Named:
    """The network alone and with post-processing, for each size of --batch."""
    for batch in bench.arguments.batch:
        yield f"throughput/network/{batch}", lambda b=batch: inference.network(bench.subject, b)
        yield (
            f"throughput/with_masks/{batch}",
            lambda b=batch: inference.with_masks(bench.subject, b),
        )


def train(bench: Bench) -> Named:
    """Whole steps."""
    yield "training/step", bench.train_step


def input_(bench: Bench) -> Named:
    """Photos to batches: the least possible, one core, and each number of --workers."""
    data = functools.cache(lambda: bench.train_data)
    plan = functools.cache(
        lambda: train_setup.make_plan(
            load_config(
                bench.config.to_dict(), {"train.batch_size": str(bench.arguments.train_batch)}
            ),
            data(),
        )
    )
    yield "input/decode_and_resize", lambda: input_pipeline.decode_and_resize(data(), plan())
    yield "input/batches", lambda: input_pipeline.batches(data(), plan())
    for number in bench.arguments.workers:
        yield (
            f"input/workers/{number}",
            lambda n=number: input_pipeline.with_workers(data(), plan(), n),
        )


def post(bench: Bench) -> Named:
    """The network's outputs to masks, every query kept."""
    yield "post/masks", lambda: inference.post_processing(bench.subject)


def score(bench: Bench) -> Named:
    """Masks to run lengths, and COCO's twelve numbers."""
    size = bench.arguments.photo_size or inference.USUAL_PHOTO
    number, objects = bench.arguments.scoring_images, bench.arguments.objects
    yield "scoring/encode", lambda: scoring.encoding(size)
    yield "scoring/evaluate", lambda: scoring.scores(size, number, objects)


PARTS: dict[str, Callable[[Bench], Named]] = {
    "latency": latency,
    "throughput": throughput,
    "training": train,
    "input": input_,
    "post": post,
    "scoring": score,
}


def chosen(bench: Bench, names: list[str]) -> list[tuple[str, Callable[[], Workload]]]:
    """Find the workloads of parts ("latency"), groups ("input/workers") and names.

    Raises:
      ValueError: there is no such part; lists what there is.
    """
    known = [pair for part in PARTS.values() for pair in part(bench)]

    def is_meant(name: str, wanted: str) -> bool:
        return name == wanted or name.startswith(f"{wanted}/")

    wrong = [wanted for wanted in names if not any(is_meant(n, wanted) for n, _ in known)]
    if wrong:
        raise ValueError(
            f"--only: there is nothing named {', '.join(wrong)}; expected some of "
            f"{', '.join(PARTS)}, or one of {', '.join(name for name, _ in known)}"
        )
    return [pair for pair in known if not names or any(is_meant(pair[0], w) for w in names)]
