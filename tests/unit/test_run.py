"""What a command line comes to, before the first step."""

import contextlib
import gc
import re
import types
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest

from sparseinst_jax.cli import train as train_command
from sparseinst_jax.data.shapes import draw_shapes_dataset
from sparseinst_jax.setup import refusals, train
from sparseinst_jax.setup.config import diff, load_config
from sparseinst_jax.setup.run import make_run, resolve_schedule
from sparseinst_jax.training.optimizer import ParameterRules, decay_mask

pytestmark = pytest.mark.usefixtures("quick_compilation")

TESTS = Path(__file__).parents[1]
CONFIGS = TESTS.parent / "configs"


def test_what_was_resolved_resolves_to_itself_and_says_what_it_is_written_for():
    loaded = load_config(CONFIGS / "base.py", {"train.batch_size": "8"})
    before = loaded.to_json()
    resolved, _ = resolve_schedule(loaded)
    assert loaded.to_json() == before
    changed = {key.removeprefix("train."): new for key, (_, new) in diff(loaded, resolved).items()}
    assert changed == {
        "base_batch_size": 8,
        "learning_rate": 6.25e-6,
        "warmup_steps": 8000,
        "milestones": (1_680_000, 2_000_000),
        "num_steps": 2_160_000,
    }
    again, lines = resolve_schedule(resolved)
    assert diff(resolved, again) == {} and lines == []


@pytest.mark.parametrize("name", ["base", "finetune", "finetune_small", "shapes", "tiny"])
def test_a_config_as_it_stands_is_not_scaled(name):
    loaded = load_config(CONFIGS / f"{name}.py")
    resolved, lines = resolve_schedule(loaded)
    assert diff(loaded, resolved) == {} and lines == []


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    return draw_shapes_dataset(folder, num_train=4, num_val=1, seed=3, image_size=(64, 64))


def start(data: Path, workdir: Path, monkeypatch, *words: str):
    """The configuration, run and first state that a command line comes to, without training."""
    seen, states = [], []

    @contextlib.contextmanager
    def nothing(*arguments):
        seen.append(arguments)
        yield types.SimpleNamespace(run=lambda state, _: states.append(state) or 0)

    monkeypatch.setattr(train, "_open_trainer", nothing)
    train_command.main(
        [
            f"--config={CONFIGS / 'tiny.py'}",
            f"--workdir={workdir}",
            f"--config.data.train.images={data / 'images' / 'train'}",
            f"--config.data.train.annotations={data / 'train.json'}",
            *words,
        ]
    )
    config, _, run, *_ = seen[-1]
    return config, run._replace(first_state=states[-1])


def test_what_is_typed_is_meant_and_the_rest_is_translated(data, tmp_path, monkeypatch, capsys):
    words = ["--config.train.base_batch_size=64", "--config.train.num_steps=50"]
    config, run = start(data, tmp_path, monkeypatch, *words)
    settings = config.train
    # The file's: batch 2, rate 0.0015, warm-up 2, milestone 3.
    assert (settings.num_steps, settings.warmup_steps, settings.milestones) == (50, 64, (96,))
    assert settings.learning_rate == pytest.approx(0.0015 * 2 / 64)
    assert float(run.learning_rate(64)) == pytest.approx(0.0015 * 2 / 64)
    assert float(run.learning_rate(96)) == pytest.approx(0.00015 * 2 / 64)
    assert run.meta["config"]["train"]["warmup_steps"] == 64
    assert run.meta["config"]["train"]["base_batch_size"] == 2
    text = capsys.readouterr().out
    assert "batch 2 instead of 64: learning rate 0.0015 -> 4.688e-05 (linear)" in text
    assert "as given on the command line: num_steps 50" in text
    assert "milestones 96 lie beyond num_steps 50" in text


def test_a_typed_rate_stays_and_the_square_root_is_taken(data, tmp_path, monkeypatch):
    base = "--config.train.base_batch_size=8"
    config, _ = start(data, tmp_path / "a", monkeypatch, base, "--config.train.learning_rate=0.5")
    assert (config.train.learning_rate, config.train.num_steps) == (0.5, 16)
    config, _ = start(data, tmp_path / "b", monkeypatch, base, "--config.train.lr_scaling=sqrt")
    assert config.train.learning_rate == pytest.approx(0.00075)
    config, _ = start(data, tmp_path / "c", monkeypatch, base, "--config.train.lr_scaling=none")
    assert (config.train.learning_rate, config.train.num_steps) == (0.0015, 4)


def test_another_rule_and_a_base_of_nothing_are_refused(data, tmp_path, monkeypatch):
    words = ["--config.train.base_batch_size=0", "--config.train.lr_scaling=cubic"]
    with pytest.raises(ValueError) as caught:
        start(data, tmp_path, monkeypatch, *words)
    assert "train.base_batch_size must be at least 1, got 0" in str(caught.value)
    assert "train.lr_scaling must be one of linear, sqrt, none, got 'cubic'" in str(caught.value)


def test_nothing_holds_the_first_weights_during_training(data, tmp_path, monkeypatch):
    """Nor the optimizer's first state: with the weights 0.4 GiB of G-IAM R50."""
    first, alive = [], []

    def watched(*arguments):
        run = make_run(*arguments)
        arrays = [x for x in jax.tree.leaves(run.first_state) if np.ndim(x)]
        first.extend(weakref.ref(x if x.base is None else x.base) for x in arrays)
        return run

    def count(row):
        gc.collect()
        alive.append(sum(array() is not None for array in first))

    monkeypatch.setattr(train, "make_run", watched)
    places = {
        f"data.{part}.{key}": str(data / path)
        for part in ("train", "val")
        for key, path in {"images": f"images/{part}", "annotations": f"{part}.json"}.items()
    }
    given = {**places, "train.num_steps": 2, "train.log_every": 1, "train.eval_every": 1}
    train.train(TESTS / "smallest.py", tmp_path / "run", given, writers=[count])
    assert len(first) > 10 and alive and not any(alive)


def test_averages_clipping_and_frozen_stages_reach_the_step(data, tmp_path, monkeypatch, capsys):
    words = ["ema_decay=0.5", "frozen_stages=1", "gradient_clip_norm=2", "learning_rate=1"]
    words = [f"--config.train.{word}" for word in [*words, "weight_decay=0.5", "warmup_steps=0"]]
    _, run = start(data, tmp_path, monkeypatch, *words)
    assert "WARNING: frozen stages stay as they start" in capsys.readouterr().out
    params = run.first_state.params
    assert run.step.ema_decay == 0.5
    assert run.first_state.average == (params, run.first_state.statistics)
    # Gradients of zero: what decays halves, and what is frozen does not.
    zeros = jax.tree.map(np.zeros_like, params)
    update = jax.jit(run.step.optimizer.update)
    updates, _ = update(zeros, run.first_state.opt_state, params)
    decays = decay_mask(params, ParameterRules(("backbone/stem",), ("norm",)))
    assert not any(jax.tree.leaves(decays["backbone"]["stem"]))
    expected = jax.tree.map(lambda value, does: -0.5 * value * does, params, decays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, expected)
    # Ones everywhere, clipped to length 2: their first moment is a tenth of it.
    ones = jax.tree.map(np.ones_like, params)
    _, opt_state = update(ones, run.first_state.opt_state, params)
    moment = opt_state[1][0].mu["decoder"]["inst_branch"]["objectness"]["kernel"]
    number = sum(leaf.size for leaf in jax.tree.leaves(params))
    np.testing.assert_allclose(moment, 0.1 * 2 / np.sqrt(number), rtol=1e-4)


def test_values_of_these_options_that_make_no_sense_are_refused(data, tmp_path, monkeypatch):
    words = ("ema_decay=1", "frozen_stages=-1", "early_stopping=2")
    with pytest.raises(ValueError) as caught:
        start(data, tmp_path, monkeypatch, *(f"--config.train.{word}" for word in words))
    message = str(caught.value)
    assert "train.ema_decay must be at least 0 (off) and below 1, got 1.0" in message
    assert "train.frozen_stages must be at least 0, got -1" in message
    assert "train.early_stopping counts evaluations, and there are none" in message


@pytest.mark.parametrize(
    ("batch_size", "micro_batches", "message"),
    [
        (64, 1, "= 1 x 24 = 24, got 64: give 48 or 72"),
        (64, 3, "= 3 x 24 = 72, got 64: give 72"),
        (48, 2, None),
    ],
)
def test_a_batch_that_the_devices_cannot_share_is_refused_with_the_nearest(
    monkeypatch, batch_size, micro_batches, message
):
    monkeypatch.setattr(jax, "device_count", lambda: 24)  # three hosts of eight
    values = {"train.batch_size": str(batch_size), "train.micro_batches": str(micro_batches)}
    config = load_config(CONFIGS / "base.py", values)
    if message is None:
        refusals.refuse_values(config)
        return
    with pytest.raises(ValueError, match=re.escape(message)):
        refusals.refuse_values(config)
