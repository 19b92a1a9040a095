from pathlib import Path

import pytest

from sparseinst_jax.commands import train as train_command
from sparseinst_jax.commands.train_setup import resolve_schedule
from sparseinst_jax.config import diff, load_config
from sparseinst_jax.data.shapes import draw_shapes_dataset
from sparseinst_jax.training.batch_scaling import Schedule, scale_schedule

CONFIGS = Path(__file__).parents[2] / "configs"
PUBLISHED = Schedule(5e-5, 1000, (210_000, 250_000), 270_000)


@pytest.mark.parametrize(
    ("batch", "rule", "rate"),
    [(8, "linear", 6.25e-6), (16, "sqrt", 2.5e-5), (256, "linear", 2e-4), (256, "sqrt", 1e-4)],
)
def test_the_rate_goes_with_the_batch_and_the_steps_against_it(batch, rule, rate):
    scaled, _ = scale_schedule(PUBLISHED, batch, 64, rule)
    assert scaled.learning_rate == pytest.approx(rate, rel=1e-12)
    steps = {
        8: (8000, (1_680_000, 2_000_000), 2_160_000),
        16: (4000, (840_000, 1_000_000), 1_080_000),
        256: (250, (52_500, 62_500), 67_500),
    }
    assert scaled[1:] == steps[batch]


def test_steps_are_rounded_and_stay_at_least_one_and_in_order():
    # 64 / 48 of 100, 101 and 200 is 133.3, 134.7 and 266.7.
    scaled, _ = scale_schedule(Schedule(0.3, 100, (101, 200), 200), 48, 64, "linear")
    assert scaled == (pytest.approx(0.225), 133, (135, 267), 267)
    scaled, _ = scale_schedule(Schedule(0.5, 3, (3, 4), 5), 64, 2, "linear")
    assert scaled == (16.0, 1, (1, 2), 1)
    scaled, _ = scale_schedule(Schedule(0.5, 3, (30, 20), 40), 2, 4, "linear")
    assert scaled.milestones == (60, 40)  # a mistake stays one, and is refused as such
    assert scale_schedule(Schedule(0.5, 0, (), 64), 2, 64, "linear")[0][1:3] == (0, ())


def test_what_happened_is_said_in_a_line():
    _, lines = scale_schedule(PUBLISHED, 8, 64, "linear")
    assert lines == [
        "batch 8 instead of 64: learning rate 5e-05 -> 6.25e-06 (linear), warm-up 1000 -> 8000"
        " steps, milestones (210000, 250000) -> (1680000, 2000000), num_steps 270000 -> 2160000"
    ]
    _, lines = scale_schedule(PUBLISHED, 8, 64, "linear", ["num_steps", "milestones"])
    assert lines[0].endswith("(linear), warm-up 1000 -> 8000 steps")
    assert lines[1:] == [
        "  as given on the command line: milestones (210000, 250000), num_steps 270000"
    ]
    assert scale_schedule(PUBLISHED, 64, 64, "linear") == (PUBLISHED, [])


def test_a_small_batch_that_nothing_was_scaled_for_is_warned_of():
    assert scale_schedule(PUBLISHED, 16, 64, "none") == (PUBLISHED, [])
    schedule, (line,) = scale_schedule(PUBLISHED, 15, 64, "none")
    assert schedule == PUBLISHED
    assert line.startswith("WARNING: a batch of 15 is far below the 64")
    assert "--config.train.lr_scaling=linear" in line


def test_a_warm_up_and_milestones_beyond_the_end_are_warned_of():
    schedule = Schedule(0.1, 50, (10, 50, 60), 50)
    _, lines = scale_schedule(schedule, 8, 8, "linear")
    assert lines[0].startswith("WARNING: the warm-up of 50 steps does not end within num_steps 50")
    assert lines[1].startswith("WARNING: milestones 50, 60 lie beyond num_steps 50")
    _, lines = scale_schedule(schedule._replace(num_steps=61), 8, 8, "linear")
    assert lines == []


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


@pytest.mark.parametrize("name", ["base", "finetune", "shapes", "tiny"])
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
    seen = []
    monkeypatch.setattr(train_command, "_loop", lambda *arguments: seen.append(arguments) or 0)
    train_command.main(
        [
            f"--config={CONFIGS / 'tiny.py'}",
            f"--workdir={workdir}",
            f"--config.data.train.images={data / 'images' / 'train'}",
            f"--config.data.train.annotations={data / 'train.json'}",
            *words,
        ]
    )
    config, _, _, run, _ = seen[-1]
    return config, run


def test_what_is_typed_is_meant_and_the_rest_is_translated(data, tmp_path, monkeypatch, capsys):
    words = ["--config.train.base_batch_size=64", "--config.train.num_steps=50"]
    config, run = start(data, tmp_path, monkeypatch, *words)
    train = config.train
    # The file's: batch 2, rate 0.0015, warm-up 2, milestone 3.
    assert (train.num_steps, train.warmup_steps, train.milestones) == (50, 64, (96,))
    assert train.learning_rate == pytest.approx(0.0015 * 2 / 64)
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
