"""How many programs a prediction, an evaluation and a training run compile: counted."""

import io
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

from sparseinst_jax.checkpoints.state import TrainState
from sparseinst_jax.checkpoints.store import Checkpoints
from sparseinst_jax.cli.measuring.machine import watched
from sparseinst_jax.data.batch import Batch
from sparseinst_jax.data.coco import load_coco
from sparseinst_jax.data.plan import TrainPlan
from sparseinst_jax.data.transforms import padded_size, resized_size
from sparseinst_jax.evaluation.evaluator import predict_dataset
from sparseinst_jax.inference.masks import chunk_length
from sparseinst_jax.inference.predictor import Predictor
from sparseinst_jax.models.sparseinst.family import SPARSEINST
from sparseinst_jax.models.sparseinst.model import Outputs
from sparseinst_jax.training.early_stopping import EarlyStopping
from sparseinst_jax.training.progress import Progress
from sparseinst_jax.training.step import TrainStep
from sparseinst_jax.training.trainer import Intervals, Trainer

EVAL_SIZE = (64, 96)
NUM_PHOTOS, NUM_MASKS = 200, 2
KEYS = ("segmentation", "score")


def network(params, statistics, images, train=False):
    """Two masks, always kept."""
    red = images[:, None, ::4, ::4, 0]  # [B, 1, H/4, W/4]
    sure = jnp.full((len(images), NUM_MASKS), params["sure"])
    outputs = Outputs(
        class_logits=sure[..., None],
        mask_logits=jnp.repeat(red, NUM_MASKS, axis=1),
        objectness_logits=sure,
    )
    return outputs, statistics


@pytest.fixture
def predictor():
    return Predictor(
        network,
        {"sure": np.float32(3)},
        {},
        ["cat"],
        [1],
        EVAL_SIZE,
        family=SPARSEINST,
        batch_size=3,
    )


@pytest.fixture
def photos(rng, tmp_path):
    """A data set of 200 photos, no two of one size."""
    sizes = [
        (20 + int(place) // 300, 20 + int(place) % 300)
        for place in rng.choice(300 * 300, NUM_PHOTOS, replace=False)
    ]
    entries = []
    for key, (height, width) in enumerate(sizes):
        Image.new("RGB", (width, height), (key, 0, 0)).save(tmp_path / f"{key}.png")
        entries.append({"id": key, "file_name": f"{key}.png", "height": height, "width": width})
    content = {"images": entries, "categories": [{"id": 1, "name": "cat"}], "annotations": []}
    (tmp_path / "val.json").write_text(json.dumps(content))
    return sizes, load_coco(tmp_path / "val.json", tmp_path, keep_empty=True)


def test_an_evaluation_compiles_by_the_table_of_sizes_and_a_second_one_nothing(photos, predictor):
    sizes, dataset = photos
    programs = set()
    for size in sizes:
        padded = padded_size(resized_size(size, *EVAL_SIZE))
        height, width = (128 * -(-side // 128) for side in size)
        programs |= {("network", padded), ("rows", padded, height)}
        programs.add(("columns", padded[1], height, width))
    with watched() as first:
        results = predict_dataset(predictor, dataset)
    assert len(results) == NUM_PHOTOS * NUM_MASKS
    num_networks = sum(program[0] == "network" for program in programs)
    assert num_networks <= 5 and len(programs) <= 5 + 5 * 3 + 3 * 9
    assert num_networks <= len(first) <= len(programs)
    predictor.set_weights({"sure": np.float32(2)}, {})
    with watched() as second:
        again = predict_dataset(predictor, dataset)
    assert len(second) == 0
    masks, scores = ([[entry[key] for entry in each] for each in (results, again)] for key in KEYS)
    assert masks[0] == masks[1] and sum(scores[0]) > sum(scores[1]) > 0


def test_any_number_of_kept_masks_is_one_of_five_lengths():
    assert {chunk_length((512, 640), number) for number in range(1, 300)} == {1, 2, 4, 8, 16}


def test_every_program_of_a_prediction_is_in_the_cache_of_the_next_process(
    rng, tmp_path, predictor
):
    """The limit on compile times that JAX has by default would leave out the fast ones."""
    before = jax.config.jax_compilation_cache_dir
    image = rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        compilation_cache.reset_cache()
        jax.clear_caches()
        with watched() as compilations:
            predictor(image).plot()
        kept = [path.name for path in tmp_path.iterdir() if path.name.endswith("-cache")]
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()
    assert len(compilations) == len(kept) == 3


class Counts(NamedTuple):
    targets: np.ndarray


class Brightness:
    """Learns to make every target as bright as the images; each shape is a program of its own."""

    minimised, loss_takes_params = (), False

    def forward(self, params, statistics, batch):
        return params["w"] * jnp.asarray(batch.images, jnp.float32).mean((1, 2, 3)), statistics

    def count(self, batch):
        return Counts(np.float32(batch.is_target.sum()))

    def match_scores(self, outputs, batch, keys):
        shape = len(outputs), 3, batch.labels.shape[1]
        return {"one": jnp.broadcast_to(outputs[:, None, None], shape)}

    def loss(self, params, statistics, outputs, batch, matches, counts, keys):
        total = jnp.sum(outputs[:, None] * (matches["one"] >= 0)) / counts.targets
        return total, {"y": total}


def test_a_training_run_compiles_two_halves_for_each_padded_size_and_number_of_targets(
    rng, tmp_path
):
    plan = TrainPlan(
        rng.integers(40, 200, (100, 2)),
        rng.integers(0, 50, 100),
        seed=0,
        batch_size=2,
        train_sizes=(32, 64),
        train_max_size=96,
    )
    steps = [plan.batch(number) for number in range(80)]

    def batches():
        for step in steps:
            (height, width), targets = step.padded_size, step.num_targets
            masks = np.zeros((2, targets, height // 4, width // 4), np.uint8)
            images = np.ones((2, height, width, 3), np.uint8)
            labels, valid = np.zeros((2, targets), np.int32), np.zeros((2, 2), np.int32)
            yield Batch(images, valid, labels, masks, labels == 0, np.arange(2))

    step = TrainStep(Brightness(), optax.sgd(0.1, momentum=0.5))
    params, statistics = {"w": np.float32(1)}, {"mean": np.float32(0)}
    state = TrainState(np.int32(0), params, statistics, step.optimizer.init(params))

    def train(folder):
        with Checkpoints(folder) as checkpoints, watched() as compilations:
            trainer = Trainer(
                step=step,
                checkpoints=checkpoints,
                meta={"config": {}, "class_names": ["a"], "category_ids": [1], "code_version": "0"},
                learning_rate=lambda number: 0.1,
                steps_per_epoch=50,
                intervals=Intervals(len(steps), log_every=1, checkpoint_every=0, eval_every=40),
                evaluate=lambda params, statistics: {"AP": 0.5},
                early_stopping=EarlyStopping(0, ()),
                writers=[],
                progress=Progress(len(steps), 50, 2, 0, io.StringIO()),
            )
            assert trainer.run(state, batches()) == 0
        return len(compilations)

    shapes = {(planned.padded_size, planned.num_targets) for planned in steps}
    assert len(shapes) == 2 * len(plan.buckets) * len(plan.target_levels) == 8
    placing = 1
    assert train(tmp_path / "first") == 2 * len(shapes) + placing
    assert train(tmp_path / "again") == 0
