import pytest

from sparseinst_jax.training.batch_scaling import Schedule, scale_schedule

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
