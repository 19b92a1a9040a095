"""What a notebook calls: the same runs and numbers as the commands, as plain calls."""

import pytest

import sparseinst_jax
from sparseinst_jax.data.shapes import draw_shapes_dataset
from sparseinst_jax.setup.config import load_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps with an evaluation, and its data."""
    folder = tmp_path_factory.mktemp("python")
    data = draw_shapes_dataset(folder / "data", 4, 2, seed=3, image_size=(64, 64))
    overrides = {
        f"data.{split}.{key}": str(data / place)
        for split in ("train", "val")
        for key, place in (("annotations", f"{split}.json"), ("images", f"images/{split}"))
    }
    overrides |= {"train.num_steps": 2, "train.eval_every": 2, "data.generator": ""}
    return sparseinst_jax.train("tiny", folder / "run", overrides), data, overrides


def test_training_from_python_is_the_commands_run_and_goes_on(trained, capsys):
    result, _, overrides = trained
    assert (result.step, result.exit_code) == (2, 0)
    assert [row["step"] for row in result.rows] == [1, 2] and "AP" in result.rows[1]
    assert (result.workdir / "curves.png").is_file()
    # Values that are given are meant as they are, as on a command line.
    stored = load_config(result.workdir / "config.json")
    assert (stored.train.num_steps, stored.data.generator) == (2, "")
    again = sparseinst_jax.train(load_config("tiny", overrides), result.workdir)
    assert (again.step, again.exit_code) == (2, 0)
    assert "is finished: step 2 of 2" in capsys.readouterr().out


def test_a_run_is_scored_on_its_own_data_and_a_predictor_on_those_that_are_named(trained):
    result, data, _ = trained
    metrics = sparseinst_jax.evaluate(result.workdir)
    assert metrics["AP"] == pytest.approx(result.rows[1]["AP"], abs=1e-9)
    predictor = sparseinst_jax.load(result.workdir)
    named = sparseinst_jax.evaluate(predictor, data / "val.json", data / "images" / "val")
    assert named.as_dict() == metrics.as_dict()


def test_what_cannot_be_called_is_refused_with_what_is_expected(trained):
    result, data, _ = trained
    with pytest.raises(ValueError, match="expected a workdir"):
        sparseinst_jax.train(load_config("tiny"))
    predictor = sparseinst_jax.load(result.workdir)
    for given in ((predictor,), (predictor, data / "val.json"), (result.workdir, data / "v.json")):
        with pytest.raises(ValueError, match="expected annotations and images"):
            sparseinst_jax.evaluate(*given)
