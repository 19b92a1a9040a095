"""Pictures of a run's first batches, and `debug-batch`, which makes any batch again."""

import json
import shlex

import numpy as np
import pytest
from PIL import Image

from sparseinst_jax import cli
from sparseinst_jax.cli import debug_batch
from sparseinst_jax.data.coco import Annotation, CocoDataset, ImageRecord
from sparseinst_jax.data.loader import load_images, make_batch
from sparseinst_jax.data.plan import ImagePlan, Paste, StepPlan
from sparseinst_jax.data.target_masks import FULL_BITS, QUARTER_LEVELS
from sparseinst_jax.data.transforms import Transform
from sparseinst_jax.drawing import batches, pictures
from sparseinst_jax.setup.config import load_config
from sparseinst_jax.training.step import TrainStep
from tests.end_to_end.test_training import TINY, arguments, data, train

__all__ = ["data"]  # a fixture

OPTIONS = {
    "data__augmentation": "lsj",
    "data__copy_paste": 0.8,
    "data__crowd": "ignore",
    "data__flip_label_pairs": "circle=square",
}


def _do_nothing(self, state, batch, *stop):
    """In place of a step, which takes long to compile; the pictures do not depend on it."""
    zeros = np.zeros(len(self.devices), np.float32)
    return state._replace(step=state.step + 1), {"loss/total": zeros, "grad_norm": zeros}


@pytest.fixture(scope="module", autouse=True)
def idle_steps():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "__call__", _do_nothing)
        yield


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "augmented"
    names = [c["name"] for c in json.loads((data / "train.json").read_text())["categories"]]
    options = {**OPTIONS, "data__flip_label_pairs": "=".join(names[:2])}
    assert train(data, workdir, train__num_steps=2, **options) == 0
    return workdir, options


def test_a_fresh_run_draws_its_first_batches_and_a_resumed_one_does_not(run, data):
    workdir, options = run
    drawn = sorted((workdir / "batches").iterdir())
    assert [path.name for path in drawn] == ["step_000000.png", "step_000001.png"]
    content = [path.read_bytes() for path in drawn]
    for path in drawn:
        path.write_bytes(b"kept")
    assert train(data, workdir, train__num_steps=3, **options) == 0
    assert sorted((workdir / "batches").iterdir()) == drawn
    assert [path.read_bytes() for path in drawn] == [b"kept"] * 2
    for path, before in zip(drawn, content, strict=True):
        path.write_bytes(before)


def test_debug_batch_draws_the_batch_that_training_drew(run, tmp_path, capsys):
    workdir, _ = run
    argv = ["--workdir", str(workdir), "--step", "1", "--output", str(tmp_path)]
    assert debug_batch.main(argv) == 0
    name = "step_000001.png"
    again, before = Image.open(tmp_path / name), Image.open(workdir / "batches" / name)
    np.testing.assert_array_equal(np.asarray(again), np.asarray(before))
    printed = capsys.readouterr().out
    assert "step 1, epoch 0: 2 images, padded to 64x64" in printed
    assert f"picture: {tmp_path / name}" in printed


def test_any_later_step_is_made_from_a_configuration_alone(data, tmp_path, capsys):
    argv = arguments(data, tmp_path / "none", train__batch_size=3)
    argv = [part for part in argv if not part.startswith("--workdir")]
    assert debug_batch.main([*argv, "--step", "1000", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "step_001000.png").exists()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("step 1000, epoch 500: 3 images")
    ids = [line.split()[0] for line in printed[2:5]]
    files = [line.split()[-1] for line in printed[2:5]]
    images = json.loads((data / "train.json").read_text())["images"]
    name_of = {str(image["id"]): image["file_name"] for image in images}
    assert [name_of[image_id] for image_id in ids] == files
    next_words = shlex.split(printed[-1])
    assert printed[-2] == "Next:" and next_words[:3] == ["sparseinst", "debug-batch", argv[0]]
    assert next_words[-1] == "--step=1001" and "--config.train.batch_size=3" in next_words


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--step", "0"], "give either --config FILE or --workdir RUN"),
        ([f"--config={TINY}", "--workdir=x", "--step", "0"], "give either --config"),
        ([f"--config={TINY}", "--step", "-1"], "--step must be 0 or more, got -1"),
        ([f"--config={TINY}"], "--step"),
    ],
)
def test_a_wrong_command_line_is_refused(argv, message, capsys):
    with pytest.raises(SystemExit) as error:
        debug_batch.main(argv)
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert cli.run(debug_batch.main, ["--workdir", str(tmp_path), "--step", "0"]) == 1
    assert "has no config.json. Give the folder that training wrote into" in capsys.readouterr().err


def _square(top, left, bottom, right):
    return [[left, top, right, top, right, bottom, left, bottom]]


@pytest.fixture
def planned(tmp_path):
    """A 32x32 image cut to 16x24 with an object lost either way, and one of another image."""
    records = []
    for number, grey in ((7, 20), (8, 220)):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (32, 32), (grey,) * 3).save(path)
        records.append(ImageRecord(number, path.name, str(path), 32, 32))
    places = [_square(0, 0, 8, 8), _square(20, 0, 30, 8), _square(0, 16, 8, 24)]
    records[0].annotations[:] = [
        Annotation(label, place, False, 0.0, 70 + label) for label, place in enumerate(places)
    ]
    records[0].annotations.append(Annotation(0, _square(8, 0, 16, 24), True, 0.0, 79))
    records[1].annotations.append(Annotation(1, _square(0, 0, 12, 12), False, 0.0, 80))
    dataset = CocoDataset(records, ("cat", "dog", "owl"), (1, 2, 3), True, "a.json")
    cut = Transform(False, (32, 32), (0, 0, 16, 24), (16, 24))
    stay = Transform(True, None, None, (32, 32))
    paste = Paste(1, stay._replace(flip=False), (0,))
    images = (ImagePlan(0, cut, paste), ImagePlan(1, stay))
    return dataset, StepPlan(5, 2, (32, 32), 8, images, (), True)


def test_the_table_says_transform_size_objects_and_what_was_lost(planned):
    dataset, plan = planned
    loaded = list(load_images(dataset.records, plan, None))
    lines = debug_batch.describe_batch(plan, loaded, dataset)
    assert lines[0] == (
        "step 5, epoch 2: 2 images, padded to 32x32 (height x width), room for 8 objects each"
    )
    rows = [line.split() for line in lines[1:4]]
    assert rows[0] == ["image", "id", "original", "transform", "size", "objects", "lost", "file"]
    assert "  x1.00, crop 16x24 at y 0 x 0  16x24  2        2     7.png + 1 objects of" in lines[2]
    assert lines[2].endswith("8.png (x1.00)")
    assert "flip, x1.00" in lines[3] and rows[2][-4:] == ["32x32", "1", "0", "8.png"]
    assert lines[4:] == [
        "image 7: 1 lost, no pixel left in the transformed image: dog (annotation 71)",
        "image 7: 1 lost, under pasted objects: cat (annotation 70)",
    ]


@pytest.mark.parametrize("form", [QUARTER_LEVELS, FULL_BITS], ids=["levels", "bits"])
def test_the_picture_shows_masks_ignored_pixels_padding_and_the_titles(planned, form):
    dataset, plan = planned
    plan = plan._replace(targets=form)
    batch = make_batch(dataset.records, plan)
    picture = batches.draw_batch(batch, plan, dataset.records, dataset.class_names, 16)
    one = batches.draw_batch(batch, plan, dataset.records, dataset.class_names, 1)
    assert picture.width == 2 * one.width + 6
    cell = np.asarray(batches._draw_image(batch, 0, plan.targets, ("", "", "")), int)
    factor = cell.shape[0] // 32
    # The pixel (y, x) of the padded image, away from outlines and captions.
    pixel = lambda y, x: cell[y * factor + 1, x * factor + 1].tolist()  # noqa: E731
    blend = lambda grey, colour: np.rint(0.55 * grey + 0.45 * np.array(colour)).tolist()  # noqa: E731
    colours = [pictures.instance_colour(int(label)) for label in batch.labels[0][:2]]
    assert pixel(14, 20) == blend(20, (255, 255, 255))  # ignored
    assert np.abs(np.subtract(pixel(4, 20), blend(20, colours[0]))).max() <= 1  # the owl
    assert np.abs(np.subtract(pixel(2, 2), blend(220, colours[1]))).max() <= 1  # the pasted dog
    assert 112 <= pixel(4, 28)[0] <= 144 and 112 <= pixel(24, 4)[0] <= 144  # striped padding


def test_large_batches_are_drawn_in_part_at_the_start_of_a_run(planned):
    dataset, plan = planned
    plan = plan._replace(images=plan.images * 2)
    batch = make_batch(dataset.records, plan)
    drawn = [
        batches.draw_batch(batch, plan, dataset.records, dataset.class_names, number)
        for number in (2, 4, 99)
    ]
    assert drawn[0].height < drawn[1].height and drawn[1].size == drawn[2].size
    assert load_config(TINY).data.copy_paste == 0.0
