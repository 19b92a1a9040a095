"""Configurations that earlier versions stored are continued as they were meant."""

from pathlib import Path

import pytest

from sparseinst_jax.setup import config as configs
from sparseinst_jax.setup import refusals
from sparseinst_jax.setup.config_history import LATER_KEYS, complete

CONFIGS = Path(__file__).parents[2] / "configs"
# The keys of the first version, as its configs/base.py had them.
FIRST_KEYS = """
seed model.family model.backbone.name model.backbone.stage_depths model.backbone.width
model.backbone.norm model.encoder_channels model.decoder_channels model.decoder_convs
model.num_masks model.num_groups model.kernel_dim model.normalizer model.dtype
objective.class_weight objective.mask_weight objective.dice_weight objective.objectness_weight
data.train.images data.train.annotations data.val.images data.val.annotations data.generator
data.keep_empty data.augmentation data.train_sizes data.train_max_size data.eval_size
data.num_workers train.batch_size train.micro_batches train.num_steps train.learning_rate
train.weight_decay train.warmup_steps train.warmup_factor train.milestones train.lr_decay
train.log_every train.checkpoint_every train.eval_every train.tensorboard eval.score_threshold
eval.mask_threshold eval.batch_size
""".split()


def first_version(name="base"):
    """The configuration as the first version would have stored it."""
    config = configs.load_config(CONFIGS / f"{name}.py")
    flat = {k: v for k, v in configs.flatten(config).items() if k in FIRST_KEYS}
    plain = {}
    for key, value in {**flat, "train.init_weights": "r50.npz"}.items():
        *path, name = key.split(".")
        node = plain
        for part in path:
            node = node.setdefault(part, {})
        node[name] = value
    return plain


def test_every_later_key_has_the_value_of_then():
    base = configs.flatten(configs.load_config(CONFIGS / "base.py"))
    assert set(base) - set(FIRST_KEYS) == {*LATER_KEYS, "train.base_batch_size"}
    # What base.py says is off; where it ever says otherwise, this must still say what was done.
    assert {key: base[key] for key in LATER_KEYS} == LATER_KEYS


def test_a_run_of_the_first_version_is_continued_with_one_line_that_says_so():
    stored = first_version()
    config = configs.load_config(CONFIGS / "base.py", {"train.init_from": "r50.npz"})
    assert configs.load_config(stored).to_dict() == config.to_dict()
    assert "crowd" not in stored["data"]  # what was given is not changed
    (line,) = refusals.refuse_changes({"config": stored}, config, Path("run"))
    assert "stored by an earlier version" in line
    assert "data.crowd = 'drop'" in line and "train.init_from = 'r50.npz'" in line
    changed = configs.load_config(stored, {"data.crowd": "ignore"})
    with pytest.raises(ValueError, match=r"data\.crowd: 'drop' in the run, 'ignore' now"):
        refusals.refuse_changes({"config": stored}, changed, Path("run"))


def test_the_schedule_of_then_is_meant_for_the_batch_of_then():
    stored = first_version()
    stored["train"]["batch_size"] = 4
    train = configs.load_config(stored).train
    assert (train.base_batch_size, train.batch_size) == (4, 4)


def test_whole_configurations_and_other_mappings_stay_as_they_are():
    whole = configs.load_config(CONFIGS / "tiny.py").to_dict()
    assert complete(whole) == (whole, [])
    assert complete({"data": {"a": 1}}) == ({"data": {"a": 1}}, [])
    stored = first_version()
    stored["model"]["backbone"] = {"name": "other", "depth": 2}
    assert complete(stored)[0]["model"]["backbone"] == {"name": "other", "depth": 2}
