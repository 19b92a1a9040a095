"""Every configuration builds, its whole training step type-checks, and no option is dead."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseinst_jax import builders, layers
from sparseinst_jax.config import flatten, load_config
from sparseinst_jax.structures import Batch
from sparseinst_jax.training import optimizer
from sparseinst_jax.training.step import TrainState, TrainStep

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")
VARIANTS = [path for path in CONFIGS if path.stem != "base"]
NUM_CLASSES = 3
VARIANT_LINES = 15

by_variant = pytest.mark.parametrize("path", VARIANTS, ids=lambda path: path.stem)


def _batch(size: int = 2, targets: int = 3) -> Batch:
    height, width = 64, 96
    return Batch(
        np.zeros((size, height, width, 3), np.uint8),
        np.full((size, 2), (height, width), np.int32),
        np.zeros((size, targets), np.int32),
        np.zeros((size, targets, height // 4, width // 4), np.uint8),
        np.ones((size, targets), bool),
        None,
    )


@pytest.mark.parametrize(
    ("path", "dtype"),
    [(path, "float32") for path in VARIANTS]  # giam_r50 is base
    + [(path, "bfloat16") for path in VARIANTS if path.stem in ("giam_r50", "shapes")],
    ids=lambda value: getattr(value, "stem", value),
)
def test_the_whole_training_step_keeps_every_shape_and_type(path, dtype, monkeypatch):
    # The weights' values do not matter here, and drawing 33 million takes a second.
    monkeypatch.setattr(np.random, "default_rng", lambda seed: _NoWeights())
    config = load_config(path, {"model.dtype": dtype})
    model = builders.build_model(config.model, NUM_CLASSES, config.seed)
    apply, params, statistics = layers.functional(model)
    train = config.train
    schedule = optimizer.make_schedule(
        train.learning_rate,
        train.warmup_steps,
        train.warmup_factor,
        train.milestones,
        train.lr_decay,
    )
    adamw = optimizer.make_optimizer(params, schedule, train.weight_decay)
    step = TrainStep(builders.build_objective(config, apply), adamw)
    batch = _batch()
    state = TrainState(jnp.int32(0), params, statistics, jax.eval_shape(adamw.init, params))
    seen = {}

    def whole_step(state, batch, query_index, counts):
        """Both halves of the step on one device, the host's matching between them given."""
        outputs, pull_back, statistics, score = step._forward_on_device(
            state.params, state.statistics, batch
        )
        seen["score"], seen["outputs"] = score, outputs
        return step._finish_on_device(
            state, None, outputs, pull_back, statistics, batch, query_index, counts
        )

    # One device: `vmap` over an axis of one gives the collectives their axis without a device.
    mapped = jax.vmap(whole_step, in_axes=(None, 0, 0, 0), axis_name=layers.DEVICE_AXIS)
    one = jax.tree.map(lambda x: np.asarray(x)[None], (batch, np.zeros((2, 3), np.int32)))
    counts = jax.tree.map(lambda x: np.asarray(x)[None], step.objective.count(batch))
    new_state, metrics = jax.eval_shape(mapped, state, *one, counts)

    def kinds(tree, drop):
        return jax.tree.map(lambda x: (tuple(jnp.shape(x))[drop:], jnp.result_type(x).name), tree)

    assert kinds(new_state, 1) == kinds(state, 0)
    assert {value.shape for value in metrics.values()} == {(1,)}
    assert {value.dtype.name for value in metrics.values()} == {"float32"}
    wanted = {"loss/total", "loss/class", "loss/mask", "loss/dice", "loss/objectness"}
    assert metrics.keys() == wanted | {"grad_norm", "num_targets"}
    assert seen["score"].shape == (2, config.model.num_masks, 3)
    # The results are float32 in every compute type: matching and losses are.
    assert {x.dtype.name for x in (*seen["outputs"], seen["score"])} == {"float32"}
    assert seen["outputs"].class_logits.shape == (2, config.model.num_masks, NUM_CLASSES)
    assert seen["outputs"].mask_logits.shape == (2, config.model.num_masks, 16, 24)


class _NoWeights:
    """Draws zeros, at once."""

    def random(self, shape, dtype=np.float32):
        return np.zeros(shape, dtype)

    standard_normal = random


@by_variant
def test_a_variant_is_short_and_says_command_hardware_and_ap(path):
    tree = ast.parse(path.read_text())
    docstring = ast.get_docstring(tree) or ""
    for word in ("Command:", f"configs/{path.name}", "Hardware:", "AP", "Table:"):
        assert word in docstring, f"{path.name}: the docstring lacks {word!r}"
    docstrings = {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    lines = path.read_text().splitlines()
    code = [n for n, line in enumerate(lines, 1) if line.strip() and n not in docstrings]
    assert len(code) <= VARIANT_LINES, f"{path.name}: {len(code)} lines of code"


@pytest.mark.parametrize(
    ("name", "groups", "normalizer"),
    [("iam_r50", 1, "sigmoid"), ("giam_r50", 4, "sigmoid"), ("giam_softmax_r50", 4, "softmax")],
)
def test_a_published_configs_name_says_what_it_holds(name, groups, normalizer):
    model = load_config(ROOT / "configs" / f"{name}.py").model
    assert (model.num_groups, model.normalizer) == (groups, normalizer)
    assert (model.backbone.stage_depths, model.backbone.width) == ((3, 4, 6, 3), 64)


@pytest.mark.parametrize("name", ["base", "iam_r50", "giam_r50", "giam_softmax_r50"])
def test_what_the_published_recipe_does_not_have_is_off_in_it(name):
    config = load_config(ROOT / "configs" / f"{name}.py")
    train = config.train
    off = train.gradient_clip_norm, train.ema_decay, train.frozen_stages, train.early_stopping
    assert off == (0, 0, 0, 0)
    assert train.base_batch_size == train.batch_size == 64


def test_the_base_config_is_the_published_recipe():
    config = load_config(ROOT / "configs/base.py")
    model, train, data = config.model, config.train, config.data
    assert (model.num_masks, model.kernel_dim, model.decoder_convs) == (100, 128, 4)
    assert (train.batch_size, train.num_steps, train.milestones) == (64, 270000, (210000, 250000))
    assert (train.learning_rate, train.weight_decay, train.warmup_steps) == (5e-5, 0.05, 1000)
    assert (data.train_sizes, data.train_max_size) == (tuple(range(416, 641, 32)), 853)
    assert (config.eval.score_threshold, config.eval.mask_threshold) == (0.005, 0.45)
    weights = dataclasses.asdict(
        builders.build_objective(config, apply=None)  # the defaults equal the config's
    )
    assert {key: weights[key] for key in config.objective} == dict(config.objective)


def test_every_key_is_read_somewhere():
    names = set()
    for path in [*(ROOT / "sparseinst_jax").rglob("*.py"), *ROOT.glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                names.add(node.attr)
            elif isinstance(node, ast.arg):  # `**config.model` reaches constructors as arguments
                names.add(node.arg)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)  # fields of a dataclass
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "pop":
                names.update(arg.value for arg in node.args if isinstance(arg, ast.Constant))
    keys = flatten(load_config(ROOT / "configs/base.py"))
    dead = [key for key in keys if not set(key.split(".")) <= names]
    assert dead == [], f"no code reads these options: {dead}"
