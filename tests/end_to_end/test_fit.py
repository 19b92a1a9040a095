"""`fit`: a run of data that a notebook holds, by a configuration or a module; what it returns."""

from pathlib import Path

import numpy as np
import pytest

import sparseinst_jax
from sparseinst_jax.data.shapes import draw_shapes_dataset

pytestmark = pytest.mark.usefixtures("quick_compilation")


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


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_run_is_returned_with_its_history_and_predictors_and_goes_on(data, sets, capsys):
    rows, calls = [], []

    def fails_at_the_second_row(row):
        calls.append(row["step"])
        if row["step"] == 2:
            raise ConnectionError("no such host")

    writers = [lambda row: rows.append(row.pop("step")), fails_at_the_second_row]
    run = sparseinst_jax.fit("tiny", *sets, overrides={"train.eval_every": 2}, writers=writers)
    assert (run.workdir, run.step, run.exit_code) == (Path("runs/tiny"), 4, 0)
    # A writer gets rows of its own: what one does to them the others and the file do not see.
    assert rows == [1, 2, 3, 4] and calls == [1, 2]
    assert "fails_at_the_second_row, one of the writers, raised ConnectionError: no such host" in (
        capsys.readouterr().out
    )
    history = run.history
    assert history["step"].tolist() == [1, 2, 3, 4]
    assert history["loss/total"].tolist() == [row["loss/total"] for row in run.rows]
    assert np.isnan(history["AP"]).tolist() == [True, False, True, False]

    photo = data / "images/val/000001.png"
    for predictor, step in ((run.best, "best"), (run.last, 4)):
        from_disk = sparseinst_jax.load(run.workdir, step)
        np.testing.assert_array_equal(predictor(photo).scores, from_disk(photo).scores)
    assert run.last.class_names == sets[0].class_names
    metrics = sparseinst_jax.evaluate(run.last, sets[1])
    assert metrics is not None and metrics["AP"] == pytest.approx(history["AP"][3], abs=1e-9)

    again = run.resume(num_steps=5)
    assert again.step == 5 and rows == [1, 2, 3, 4, 5]
    np.testing.assert_array_equal(again.history["loss/total"][:4], history["loss/total"])


def test_every_run_without_a_folder_gets_a_new_one_and_the_schedule_fits(data):
    files = (data / "train.json", data / "images/train")
    for name in ("runs/tiny", "runs/tiny-2"):
        run = sparseinst_jax.fit("tiny", files, num_steps=2)
        assert (run.workdir, run.step) == (Path(name), 2)
    config = sparseinst_jax.load_config(run.workdir / "config.json")
    assert (config.train.warmup_steps, config.train.milestones) == (1, (2,))  # of 2 and 3 in 4
    assert (config.train.eval_every, config.data.generator) == (0, "")


class Shifted(sparseinst_jax.models.SparseInst):
    """A network that no configuration describes: its classes are less sure by its own number."""

    def __call__(self, images, train=False, intermediates=None):
        outputs = super().__call__(images, train, intermediates)
        return outputs._replace(class_logits=outputs.class_logits - 0.5)


def test_a_module_is_trained_by_a_recipe_and_loaded_with_a_module(data, sets):
    config = sparseinst_jax.load_config("tiny")
    same = sparseinst_jax.build_model(config, 3)
    by_name = sparseinst_jax.fit("tiny", sets[0], num_steps=2)
    given = sparseinst_jax.fit(same, sets[0], config="tiny", num_steps=2)
    assert given.workdir == Path("runs/sparseinst")
    names = [name for name in given.history if name.startswith("loss/")]
    for name in names:
        np.testing.assert_array_equal(given.history[name], by_name.history[name])

    module = sparseinst_jax.build_model(config, 3)
    other = Shifted(
        module.backbone,
        num_classes=3,
        **{key: config.model[key] for key in ("encoder_channels", "decoder_channels")},
        **{key: config.model[key] for key in ("decoder_convs", "num_masks", "kernel_dim")},
        rng=np.random.default_rng(0),
    )
    run = sparseinst_jax.fit(other, sets[0], config="tiny", num_steps=2)
    assert run.history["loss/class"][0] != given.history["loss/class"][0]
    with pytest.raises(ValueError, match=r"a module of the class Shifted that was given to fit"):
        sparseinst_jax.load(run.workdir)
    photo = data / "images/val/000001.png"
    found = sparseinst_jax.load(run.workdir, model=other)(photo)
    np.testing.assert_array_equal(found.scores, run.last(photo).scores)


def test_data_that_a_run_could_not_find_again_are_refused(data):
    chosen = sparseinst_jax.load_coco(
        data / "train.json", data / "images/train", classes=("plain triangle",)
    )
    with pytest.raises(ValueError, match="got a data set with chosen classes: give"):
        sparseinst_jax.fit("tiny", chosen)
    with pytest.raises(ValueError, match="got a data set with no folder of images"):
        sparseinst_jax.fit("tiny", sparseinst_jax.load_coco(data / "train.json", None))


def test_activations_are_those_of_the_instances_found(data, sets):
    run = sparseinst_jax.fit("tiny", sets[0], num_steps=1)
    predictor = run.last
    photo = data / "images/val/000001.png"
    found, inside = predictor.activations(photo), predictor.forward(photo)
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


def test_a_padded_image_has_maps_of_the_image_alone(data, sets):
    predictor = sparseinst_jax.fit("tiny", sets[0], num_steps=1).last
    found = predictor.activations(np.zeros((50, 90, 3), np.uint8))
    resized = predictor.forward(np.zeros((50, 90, 3), np.uint8)).valid_size
    assert found.maps.shape[2:] == (round(resized[0] / 8), round(resized[1] / 8))
