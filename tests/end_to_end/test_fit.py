"""`fit`: a run of data that a notebook holds, by a configuration or a module; what it returns."""

from pathlib import Path

import numpy as np
import pytest

import sparseinst_jax
from sparseinst_jax.data.shapes import draw_shapes_dataset
from tests import smallest

SMALLEST = smallest.__file__
SETTINGS = {"train.eval_every": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit") / "shapes"
    return draw_shapes_dataset(folder, 4, 2, seed=3, image_size=(64, 64))


@pytest.fixture(scope="module")
def sets(data):
    return [
        sparseinst_jax.load_coco(data / f"{split}.json", data / "images" / split)
        for split in ("train", "val")
    ]


@pytest.fixture(scope="module")
def run(data, sets):
    """Four steps with two evaluations, beside the data."""
    return sparseinst_jax.fit(SMALLEST, *sets, data.parent / "run", SETTINGS)


@pytest.fixture(scope="module")
def trained(stored_run):
    return sparseinst_jax.load(stored_run)


def test_a_run_is_returned_with_its_history_and_predictors(data, sets, run):
    assert (run.workdir, run.step, run.exit_code) == (data.parent / "run", 4, 0)
    history = run.history
    assert history["step"].tolist() == [1, 2, 3, 4]
    assert history["loss/total"].tolist() == [row["loss/total"] for row in run.rows]
    assert np.isnan(history["AP"]).tolist() == [True, False, True, False]
    photo = data / "images/val/000001.png"
    for each, step in ((run.best, "best"), (run.last, 4)):
        from_disk = sparseinst_jax.load(run.workdir, step)
        np.testing.assert_array_equal(each(photo).scores, from_disk(photo).scores)
    metrics = sparseinst_jax.evaluate(run.last, sets[1])
    assert metrics is not None and metrics["AP"] == pytest.approx(history["AP"][3], abs=1e-9)


def test_a_run_goes_on_and_tells_its_writers(sets, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("runs/smallest").mkdir(parents=True)  # so that this one goes beside it
    rows, calls = [], []

    def fails_at_the_second_row(row):
        calls.append(row["step"])
        if row["step"] == 2:
            raise ConnectionError("no such host")

    writers = [lambda row: rows.append(row.pop("step")), fails_at_the_second_row]
    run = sparseinst_jax.fit(SMALLEST, sets[0], num_steps=2, writers=writers)
    assert (run.workdir, run.step) == (Path("runs/smallest-2"), 2)
    # A writer gets rows of its own: what one does to them the others and the file do not see.
    assert rows == [1, 2] and calls == [1, 2]
    assert "fails_at_the_second_row, one of the writers, raised ConnectionError: no such host" in (
        capsys.readouterr().out
    )
    config = sparseinst_jax.load_config(run.workdir / "config.json")
    assert (config.train.warmup_steps, config.train.milestones) == (1, (2,))  # of 2 and 3 in 4
    assert (config.train.eval_every, config.data.generator) == (0, "")
    again = run.resume(num_steps=3)
    assert again.step == 3 and rows == [1, 2, 3]
    np.testing.assert_array_equal(again.history["loss/total"][:2], run.history["loss/total"][:2])


class Shifted(smallest.Smallest):
    """A network that no configuration describes: its classes are less sure by its own number."""

    def __call__(self, images, train=False, intermediates=None):
        outputs = super().__call__(images, train, intermediates)
        return outputs._replace(class_logits=outputs.class_logits - 0.5)


def test_a_module_is_trained_by_a_recipe_and_loaded_with_a_module(data, sets, run, tmp_path):
    config = sparseinst_jax.load_config(SMALLEST)
    same = sparseinst_jax.build_model(config, 3)
    given = sparseinst_jax.fit(same, *sets, tmp_path / "same", SETTINGS, config=SMALLEST)
    for name in (name for name in run.history if name.startswith("loss/")):
        np.testing.assert_array_equal(given.history[name], run.history[name])

    other = Shifted(same.backbone, num_classes=3, dtype="float32", rng=np.random.default_rng(0))
    shifted = sparseinst_jax.fit(
        other, sets[0], workdir=tmp_path / "other", config=SMALLEST, num_steps=1
    )
    assert shifted.history["loss/class"][0] != run.history["loss/class"][0]
    with pytest.raises(ValueError, match=r"a module of the class Shifted that was given to fit"):
        sparseinst_jax.load(shifted.workdir)
    photo = data / "images/val/000001.png"
    found = sparseinst_jax.load(shifted.workdir, model=other)(photo)
    np.testing.assert_array_equal(found.scores, shifted.last(photo).scores)


def test_data_that_a_run_could_not_find_again_are_refused(data):
    chosen = sparseinst_jax.load_coco(
        data / "train.json", data / "images/train", classes=("plain triangle",)
    )
    with pytest.raises(ValueError, match="got a data set with chosen classes: give"):
        sparseinst_jax.fit(SMALLEST, chosen)
    with pytest.raises(ValueError, match="got a data set with no folder of images"):
        sparseinst_jax.fit(SMALLEST, sparseinst_jax.load_coco(data / "train.json", None))


def test_activations_are_those_of_the_instances_found(data, trained):
    photo = data / "images/val/000001.png"
    found, inside = trained.activations(photo), trained.forward(photo)
    assert found.names == ("group 1", "group 2", "group 3", "group 4")
    assert found.maps.shape == (len(found.prediction), 4, 8, 8) and len(found) > 0
    # The network's own tensor: channels are (group, mask).
    maps = np.asarray(inside.intermediates["instance_activation_maps"])[0]
    query = int(found.prediction.query_index[0])
    np.testing.assert_array_equal(found.maps[0, 2], maps[:8, :8, 2 * 10 + query])
    picture = sparseinst_jax.plot_activations(found, score_threshold=0.0, most=2)
    assert picture.height > 2 * 240 and picture.width > 5 * 240
    nothing = sparseinst_jax.plot_activations(found, score_threshold=1.0)
    assert nothing.width < 240


def test_a_padded_image_has_maps_of_the_image_alone(trained):
    image = np.zeros((50, 90, 3), np.uint8)
    height, width = trained.forward(image).valid_size
    maps = trained.activations(image).maps
    assert maps.shape[2:] == (round(height / 8), round(width / 8))
