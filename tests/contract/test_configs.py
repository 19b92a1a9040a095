"""Every configuration builds, its whole training step type-checks, and no option is dead."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from sparseinst_jax.checkpoints.state import TrainState
from sparseinst_jax.data.batch import DEVICE_AXIS, Batch
from sparseinst_jax.data.target_masks import TargetForm
from sparseinst_jax.models.families import FAMILIES
from sparseinst_jax.models.trees import functional
from sparseinst_jax.setup import builders, refusals
from sparseinst_jax.setup.config import flatten, load_config
from sparseinst_jax.setup.run import make_plan, make_step
from sparseinst_jax.training.step import STOP
from sparseinst_jax.weights import zoo
from tests.shallow import shallow

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")
BASES = ("base", "fastinst_base")  # of each family: what its configurations start from
VARIANTS = [path for path in CONFIGS if path.stem not in BASES]
NUM_CLASSES = 3
VARIANT_LINES = 15

ROWS = {row.config: row for row in reversed(zoo.ROWS)}  # the first row of each configuration

by_variant = pytest.mark.parametrize("path", VARIANTS, ids=lambda path: path.stem)


SIZES = {"width", "ffn_width", "kernel_dim", "embed_dims", "num_masks", "num_queries", "num_heads"}


def _parts(config: ConfigDict) -> set[str]:
    """What a training step is made of, sizes left out: backbone, heads, rules of the optimizer."""
    model, train = config.model, config.train
    options = {key: value for key, value in flatten(model).items() if "channels" not in key}
    options = {k: v for k, v in options.items() if k.rpartition(".")[2] not in SIZES}
    backbone = {key: value for key, value in options.items() if "backbone" in key}
    heads = {key: value for key, value in options.items() if "backbone." not in key}
    rules = train.backbone_rate, train.class_rate, train.ema_decay > 0, train.gradient_clip_norm > 0
    return {
        repr((backbone, model.family, model.dtype, train.frozen_stages)),
        repr(heads),
        repr((rules, model.family)),
    }


def _steps() -> dict[str, ConfigDict]:
    """Configurations with a part that no one before them has; they meet in arrays alone."""
    configs = {path.stem: shallow(load_config(path)) for path in VARIANTS}
    configs["shapes-bfloat16"] = shallow(load_config("shapes", {"model.dtype": "bfloat16"}))
    chosen, seen = {}, set()
    for name, config in configs.items():
        if not (parts := _parts(config)) <= seen:
            chosen[name] = config
            seen |= parts
    return chosen


STEPS = _steps()


def _batch(form: TargetForm, size: int = 2, targets: int = 3) -> Batch:
    height, width = 64, 96
    return Batch(
        np.zeros((size, height, width, 3), np.uint8),
        np.full((size, 2), (height, width), np.int32),
        np.zeros((size, targets), np.int32),
        np.zeros((size, targets, *form.shape((height, width))), np.uint8),
        np.ones((size, targets), bool),
        None,
    )


@pytest.mark.parametrize("name", STEPS)
def test_the_whole_training_step_keeps_every_shape_and_type(name):
    config = STEPS[name]
    model = builders.build_model(config.model, NUM_CLASSES, None, config.train.frozen_stages)
    apply, params, statistics = functional(model)
    step, _ = make_step(config, model, apply, params)
    family = FAMILIES[config.model.family]
    batch = _batch(family.targets)
    opt_state = jax.eval_shape(step.optimizer.init, params)
    average = (params, statistics) if config.train.ema_decay else None
    state = TrainState(jnp.int32(0), params, statistics, opt_state, average)
    seen = {}

    def whole_step(state, batch, matches, counts, places):
        """Both halves of the step on one device, the host's matching between them given."""
        outputs, pull_back, statistics, scores = step._first_half(
            state.params, state.statistics, state.step, places, batch
        )
        seen["scores"], seen["outputs"] = scores, outputs
        rest = outputs, pull_back, statistics, batch, matches, counts, places
        return step._second_half(state, 0, None, *rest, is_last=True)

    # A mesh of one gives the collectives their axis without a device.
    mesh = jax.sharding.AbstractMesh((1,), (DEVICE_AXIS,))
    mapped = jax.shard_map(whole_step, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    matches = {key: np.zeros((2, 3), np.int32) for key in MATCHINGS[config.model.family](config)}
    counts = np.float32(6), step.objective.count(batch)
    given = batch, matches, counts, np.arange(2, dtype=np.int32)
    new_state, metrics = jax.eval_shape(mapped, state, *given)

    def kinds(tree):
        return jax.tree.map(lambda x: (tuple(jnp.shape(x)), jnp.result_type(x).name), tree)

    assert kinds(new_state) == kinds(state)
    assert {value.shape for value in metrics.values()} == {()}
    assert metrics.pop(STOP).dtype == np.int32
    assert {value.dtype.name for value in metrics.values()} == {"float32"}
    wanted = {"total", *TERMS[config.model.family](config)}
    wanted = {f"loss/{term}" for term in wanted} | {"grad_norm", "num_targets"}
    assert metrics.keys() == wanted
    assert seen["scores"].keys() == matches.keys()
    # The results are float32 in every compute type: matching and losses are.
    most = min(family.num_masks(builders.model_options(config.model)), 64 * 96 // 16**2)
    for key, score in seen["scores"].items():
        number = config.model.num_masks if key == "masks" else 24 if key == "proposal" else most
        assert (score.shape, score.dtype.name) == ((2, number, 3), "float32")
    selection = jax.eval_shape(family.select, _for_inference(apply, state))
    stride = family.mask_stride
    assert selection.scores.dtype.name == selection.masks.dtype.name == "float32"
    assert selection.masks.shape[2:] == (64 // stride, 96 // stride)


def _layers(config):
    return range(config.model.num_layers)


MATCHINGS = {
    "sparseinst": lambda config: ("masks",),
    "fastinst": lambda config: (
        *("guided", "proposal"),
        *(f"head_{i}" for i in range(config.model.num_layers + 1)),
    ),
}
TERMS = {
    "sparseinst": lambda config: ("class", "mask", "dice", "objectness"),
    "fastinst": lambda config: (
        "proposal",
        *(
            f"{kind}{part}"
            for kind in ("class", "mask", "dice")
            for part in (
                "",
                *(f"_{pass_}_{i}" for pass_ in ("guided", "head") for i in _layers(config)),
            )
        ),
    ),
}


def _for_inference(apply, state):
    images = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)
    return jax.eval_shape(lambda p, s, x: apply(p, s, x)[0], state.params, state.statistics, images)


@by_variant
def test_a_run_would_accept_every_configuration(path):
    config = load_config(path)
    refusals.refuse_values(config)
    builders.check_model(config.model)
    sizes = np.tile([(320, 640), (640, 427)], (64, 1))  # the first as wide as Cityscapes'
    boxes = np.tile(np.float32([10, 20, 110, 220]), (128, 1, 1))
    dataset = SimpleNamespace(
        image_sizes=sizes, num_targets=np.ones(128, int), class_names=("a",), boxes_xyxy=list(boxes)
    )
    plan = make_plan(config, dataset)
    longest = max(max(bucket) for bucket in plan.buckets)
    assert config.data.train_max_size <= longest < config.data.train_max_size + 32


@by_variant
def test_a_variant_is_short_and_says_command_hardware_and_ap(path):
    tree = ast.parse(path.read_text())
    docstring = ast.get_docstring(tree) or ""
    for word in ("Command:", f"--config {path.stem}", "Hardware:", "AP", "Table:"):
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


def test_every_published_row_has_a_configuration_and_no_other_has_a_row():
    own = {"finetune", "finetune_small", "shapes", "shapes_fastinst", "tiny"}
    own |= {"fastinst_r50_x1_cityscapes", "fastinst_r50_x1_ade20k"}
    own |= {"giam_lite0", "giam_lite0_large", "fastinst_lite0", "finetune_lite"}
    assert {path.stem for path in VARIANTS} - own == ROWS.keys()


@pytest.mark.parametrize("name", ROWS)
def test_a_published_configs_name_says_what_it_holds(name):
    config = load_config(ROOT / "configs" / f"{name}.py")
    model, words = config.model, name.split("_")
    is_softmax = "softmax" in words or "cspdarknet53" in words
    is_fastinst = model.family == "fastinst"
    assert is_fastinst == ("fastinst" in words)
    if is_fastinst:
        assert model.num_layers == int(words[-1].removeprefix("x"))
    else:
        assert model.num_groups == (1 if "iam" in words else 4)
        assert model.normalizer == ("softmax" if is_softmax else "sigmoid")
    assert model.dtype == ("bfloat16" if "bf16" in words else "float32")
    has_crop = config.data.augmentation == "flip_resize_crop"
    assert has_crop == ("aug" in words or is_fastinst)
    assert has_crop or config.data.augmentation == "flip_resize"
    if {"r50", "r50vd", "r101"} & set(words):
        assert _resnet(model.backbone) == _wanted_resnet(words)
    else:
        assert dict(model.backbone) == OTHER_BACKBONES[name]


def _resnet(backbone: ConfigDict) -> tuple:
    assert (backbone.name, backbone.width, backbone.norm) == ("resnet", 64, "frozen_batch_norm")
    kind = backbone.variant, backbone.deformable_stages, backbone.modulated
    return (backbone.stage_depths, *kind)


def _wanted_resnet(words: list[str]) -> tuple:
    depths = (3, 4, 23, 3) if "r101" in words else (3, 4, 6, 3)
    stages, is_paddle = (), "paddle" in words
    if "dcn" in words:
        stages = ("res3", "res4", "res5") if is_paddle else ("res4", "res5")
    return depths, "d" if "r50vd" in words else "b", stages, bool(stages) and is_paddle


_DARKNET = dict(name="cspdarknet", stage_depths=(1, 2, 8, 8, 4), width=32, norm="batch_norm")
_PVT = dict(name="pvt", embed_dims=(64, 128, 320, 512), drop_path=0.1)
OTHER_BACKBONES = {
    "giam_cspdarknet53": dict(_DARKNET, cross_stage=True),
    "giam_darknet53": dict(_DARKNET, cross_stage=False),
    "giam_pvt_b1": dict(_PVT, stage_depths=(2, 2, 2, 2), linear=False),
    "giam_pvt_b2_linear": dict(_PVT, stage_depths=(3, 4, 6, 3), linear=True),
}


@pytest.mark.parametrize("name", [*BASES, *ROWS])
def test_what_no_published_recipe_has_is_off_in_all_of_them(name):
    config = load_config(ROOT / "configs" / f"{name}.py")
    train, data = config.train, config.data
    assert (train.gradient_clip_norm, train.early_stopping, train.lr_decay) == (0, 0, 0.1)
    is_fastinst = config.model.family == "fastinst"
    assert train.base_batch_size == train.batch_size == (16 if is_fastinst else 64)
    assert (train.learning_rate, train.weight_decay) == (1e-4 if is_fastinst else 5e-5, 0.05)
    assert (data.copy_paste, data.keep_empty, data.crowd) == (0, False, "drop")
    assert (data.train_sizes, data.train_max_size) == (tuple(range(416, 641, 32)), 853)
    assert config.eval.protocol == "original"
    base = load_config(ROOT / "configs" / f"{BASES[is_fastinst]}.py")
    assert dict(config.objective) == dict(base.objective)
    if name in ROWS:
        side = ROWS[name].short_side
        assert data.eval_size == (side, 777 if side == 576 else 853)


PADDLE_STEPS = 117_266 // 64  # of an epoch, the last incomplete batch left out
RECIPES = {
    "SparseInst": ("detectron2", "detectron2", 0, 1000, 270_000),
    "PaddleDetection": ("paddledetection", "paddledetection", 2, 1000, 150 * PADDLE_STEPS),
    "mmdetection": ("mmdetection", "mmdetection", 1, 0, 270_000),
    "FastInst": ("detectron2", "detectron2", 0, 0, 368_750),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_trained_as_its_implementation_trains_it(name):
    config, source = load_config(ROOT / "configs" / f"{name}.py"), ROWS[name].source
    train, data = config.train, config.data
    rules = data.resize_rule, data.annotation_filter
    recipe = train.frozen_stages, train.warmup_steps, train.num_steps
    assert (*rules, *recipe) == RECIPES[source]
    assert train.ema_decay == (0.9998 if "ssld" in name else 0)
    epochs = (114, 137) if name == "paddle_giam_r50vd_ssld_aug" else (115, 136)
    paddle = tuple(epoch * PADDLE_STEPS for epoch in epochs)
    others = {"PaddleDetection": paddle, "FastInst": (327_778, 355_092)}
    assert train.milestones == others.get(source, (210_000, 250_000))


@pytest.mark.parametrize("name", ROWS)
def test_a_docstring_gives_the_published_scores_and_the_file_to_start_from(name):
    row = ROWS[name]
    text = " ".join(ast.get_docstring(ast.parse(_source(name))).split())
    for score in (row.ap_val, row.ap_test, row.fps):
        assert score is None or f"{score:.1f}" in text
    assert f"input {row.short_side}" in text or row.ap_val is None
    command = f"Command: python train.py --config {name}"
    if row.backbone:
        command += f" --init-from {zoo.BACKBONES[row.backbone].file}"
    assert command in text


def _source(name: str) -> str:
    return (ROOT / "configs" / f"{name}.py").read_text()


def test_the_base_config_is_the_published_recipe():
    config = load_config(ROOT / "configs/base.py")
    model, train, data = config.model, config.train, config.data
    assert (model.num_masks, model.kernel_dim, model.decoder_convs) == (100, 128, 4)
    assert (train.batch_size, train.num_steps, train.milestones) == (64, 270000, (210000, 250000))
    assert (train.learning_rate, train.weight_decay, train.warmup_steps) == (5e-5, 0.05, 1000)
    assert (data.train_sizes, data.train_max_size) == (tuple(range(416, 641, 32)), 853)
    assert (config.eval.score_threshold, config.eval.mask_threshold) == (0.005, 0.45)


@pytest.mark.parametrize("name", BASES)
def test_what_a_base_config_says_are_the_defaults(name):
    config = load_config(ROOT / "configs" / f"{name}.py")
    family = FAMILIES[config.model.family]
    weights = vars(builders.build_objective(config, apply=None))
    empty = family.objective(None, builders.model_options(config.model))
    assert {key: weights[key] for key in config.objective} == dict(config.objective)
    assert {key: vars(empty)[key] for key in config.objective} == dict(config.objective)
    defaults = inspect.signature(family.select).parameters
    for key in set(config.eval) - {"batch_size", "protocol", "zoom"}:
        assert defaults[key].default == config.eval[key], key


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
    keys = [key for name in BASES for key in flatten(load_config(ROOT / f"configs/{name}.py"))]
    dead = [key for key in keys if not set(key.split(".")) <= names]
    assert dead == [], f"no code reads these options: {dead}"
