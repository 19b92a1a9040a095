"""The learning rate of the original (detectron2's WarmupMultiStepLR) at recorded iterations."""

import json
from pathlib import Path

import jax
import numpy as np

from sparseinst_jax.models.fastinst.model import FastInst
from sparseinst_jax.setup.config import load_config
from sparseinst_jax.training.optimizer import make_schedule

GOLDEN_FOLDER = Path(__file__).parent / "golden"
GOLDEN = json.loads((GOLDEN_FOLDER / "lr_schedule.json").read_text())


def test_learning_rate_equals_the_originals_at_every_recorded_iteration():
    schedule = jax.jit(
        make_schedule(
            GOLDEN["base_lr"],
            GOLDEN["warmup_iters"],
            GOLDEN["warmup_factor"],
            tuple(GOLDEN["steps"]),
            GOLDEN["gamma"],
        )
    )
    recorded = {int(step): rate for step, rate in GOLDEN["lr_used_at_iteration"].items()}
    rates = [float(schedule(step)) for step in recorded]
    # float32 against float64: a few roundings of 6e-8.
    np.testing.assert_allclose(rates, list(recorded.values()), rtol=1e-6)


def test_base_configuration_holds_the_originals_schedule():
    train = load_config(Path(__file__).parents[2] / "configs" / "base.py").train
    assert train.learning_rate == GOLDEN["base_lr"]
    assert train.milestones == tuple(GOLDEN["steps"])
    assert train.lr_decay == GOLDEN["gamma"]
    assert train.warmup_steps == GOLDEN["warmup_iters"]
    assert train.warmup_factor == GOLDEN["warmup_factor"]
    assert train.num_steps == GOLDEN["max_iter"]
    assert train.batch_size == GOLDEN["ims_per_batch"]


def test_fastinsts_configurations_hold_the_originals_schedule():
    golden = json.loads((GOLDEN_FOLDER / "lr_schedule_fastinst.json").read_text())
    config = load_config("fastinst_r50_x1")
    train = config.train
    assert train.num_steps == golden["max_iter"]
    schedule = jax.jit(
        make_schedule(
            train.learning_rate,
            train.warmup_steps,
            train.warmup_factor,
            train.milestones,
            train.lr_decay,
        )
    )
    rates = [float(schedule(step)) for step, _, _ in golden["rows"]]
    np.testing.assert_allclose(rates, [head for _, head, _ in golden["rows"]], rtol=1e-6)
    ((part, factor),) = FastInst.learning_rate_factors
    assert part == "backbone"
    backbone = [rate * factor for rate in rates]
    np.testing.assert_allclose(backbone, [rate for _, _, rate in golden["rows"]], rtol=1e-6)
