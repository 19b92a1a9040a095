"""What the benchmark says of the input pipeline."""

import numpy as np
import pytest

from sparseinst_jax.cli import benchmark as command
from sparseinst_jax.cli.measuring import input_pipeline, photos
from sparseinst_jax.data.coco import load_coco
from sparseinst_jax.data.plan import TrainPlan


@pytest.fixture
def drawn(tmp_path):
    dataset = load_coco(photos.draw_photos(tmp_path, 4, (48, 64), 3), tmp_path / "images")
    options = {"seed": 0, "batch_size": 2, "train_sizes": (32, 64), "train_max_size": 96}
    return dataset, TrainPlan(dataset.image_sizes, dataset.num_targets, **options)


def test_batches_are_compared_with_decoding_and_resizing_alone_in_turn(drawn, monkeypatch):
    now = [0.0]
    calls = []

    def spend(name, seconds):
        def work(source, step):
            calls.append((name, step.step))
            now[0] += seconds

        return work

    monkeypatch.setattr(input_pipeline, "_decode_and_resize", spend("alone", 0.020))
    monkeypatch.setattr(input_pipeline, "make_batch", spend("whole", 0.025))
    dataset, plan = drawn
    found = input_pipeline.batches(dataset, plan, lambda: now[0]).details()["against_decoding"]
    assert found == {
        "rounds": input_pipeline.ROUNDS,
        "decode_and_resize_ms_per_image": pytest.approx(10),
        "batch_ms_per_image": pytest.approx(12.5),
        "ratio": pytest.approx(1.25),
        "least_ratio": pytest.approx(1.25),
        "most_ratio": pytest.approx(1.25),
    }
    # The same batch for both, the order changes.
    assert [name for name, _ in calls[:4]] == ["whole", "alone", "alone", "whole"]
    assert [step for _, step in calls] == np.arange(input_pipeline.ROUNDS).repeat(2).tolist()


def test_decoding_and_resizing_alone_takes_the_planned_sizes(drawn, monkeypatch):
    dataset, plan = drawn
    taken = []
    asarray = np.asarray
    monkeypatch.setattr(
        input_pipeline.np, "asarray", lambda photo: taken.append(photo.size) or asarray(photo)
    )
    input_pipeline.decode_and_resize(dataset, plan).run()
    sizes = [image.transform.size for image in plan.batch(0).images]
    assert taken == [(width, height) for height, width in sizes]


def test_the_ratio_is_printed():
    row = {
        "name": "input/batches",
        "against_decoding": {
            "rounds": 40,
            "decode_and_resize_ms_per_image": 10,
            "batch_ms_per_image": 12.5,
            "ratio": 1.25,
            "least_ratio": 1.1,
            "most_ratio": 1.4,
        },
    }
    assert command._notes(row) == [
        "input/batches: 12.50 ms an image, decoding and resizing the same alone 10.00 ms: "
        "1.25 times as long (40 batches in turn, 1.10 to 1.40)"
    ]
