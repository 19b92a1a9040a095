"""Images are shared out over devices and hosts: each is predicted once, whatever the count."""

import dataclasses
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from sparseinst_jax.data.coco import load_coco
from sparseinst_jax.data.rules import ORIGINAL_PROTOCOL
from sparseinst_jax.data.shapes import draw_shapes_dataset
from sparseinst_jax.evaluation import evaluator
from sparseinst_jax.runner.predictor import FoundInstances

SIZES = ((64, 64), (64, 96))


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Seven images of one size and four of another, mixed."""
    folder: Path = tmp_path_factory.mktemp("data")
    square = draw_shapes_dataset(folder / "a", num_train=1, num_val=7, seed=1, image_size=SIZES[0])
    wide = draw_shapes_dataset(folder / "b", num_train=1, num_val=4, seed=1, image_size=SIZES[1])
    parts = [load_coco(f / "val.json", f / "images" / "val") for f in (square, wide)]
    records = []
    for number, record in enumerate([*parts[0].records, *parts[1].records]):
        records.append(dataclasses.replace(record, image_id=100 + number * 7 % 11))
    return parts[0], sorted(records, key=lambda record: record.image_id)


class Stub:
    """Finds in every image one object whose score tells the image."""

    class_names = ("striped disc",)
    eval_size = (64, 96)
    protocol = ORIGINAL_PROTOCOL

    def __init__(self, num_together):
        self.num_together, self.calls = num_together, []

    def prepare(self, image):
        return image

    def start(self, items):
        assert 0 < len(items) <= self.num_together
        assert len({image.shape for image in items}) == 1  # of one padded size
        self.calls.append(len(items))
        return items

    def finish(self, pending):
        for image in pending:
            height, width = image.shape[:2]
            mask = np.zeros((1, width, height), np.uint8)
            score, zero = np.array([image.mean()], np.float32), np.zeros(1, np.int32)
            yield FoundInstances(zero, zero, iter([(mask, score)]), (height, width))


class WaitingStub(Stub):
    """Reads no image of the third batch before masks of the first are asked for."""

    def __init__(self):
        super().__init__(1)
        self.asked, self.num_read, self.threads = threading.Event(), 0, set()

    def prepare(self, image):
        self.num_read += 1
        assert self.num_read < 3 or self.asked.wait(20), "packing waits for images"
        return image

    def start(self, items):
        self.threads.add(("start", threading.get_ident()))
        return super().start(items)

    def finish(self, pending):
        self.threads.add(("finish", threading.get_ident()))
        self.asked.set()
        return list(super().finish(pending))


def test_masks_are_packed_while_images_are_read_and_handed_to_the_device(datasets):
    dataset, _ = datasets
    stub = WaitingStub()
    assert evaluator.predict_dataset(stub, dataset, num_workers=1) == evaluator.predict_dataset(
        Stub(1), dataset
    )
    # On a CPU, what one thread hands to the device is done in turn, what two hand to it is not.
    assert len(stub.threads) == len({thread for _, thread in stub.threads}) == 2


def test_batches_are_places_of_images_of_one_padded_size():
    sizes = np.array([(64, 64), (64, 96), (32, 32), (100, 150), (64, 65)])
    # (100, 150) becomes (64, 96), (64, 65) is padded to (64, 96); the short side of all is 64.
    assert evaluator._batches(sizes, (64, 96), 2) == [[0, 2], [1, 3], [4]]


def test_no_record_is_made_before_its_image_is_read(monkeypatch, datasets):
    dataset, _ = datasets
    made = []
    make = type(dataset.records).__getitem__
    monkeypatch.setattr(
        type(dataset.records), "__getitem__", lambda self, i: made.append(i) or make(self, i)
    )
    evaluator._check_files(dataset)
    evaluator._batches(dataset.image_sizes, (64, 96), 2)
    assert made == []
    evaluator.predict_dataset(Stub(1), dataset)
    assert sorted(made) == list(range(7))


def on_hosts(monkeypatch, number, task):
    """Run a task on so many hosts, threads here, that gather as processes do."""
    here, lock = threading.local(), threading.Barrier(number)
    table: list[bytes] = [b""] * number

    def gather(payload):
        table[here.index] = payload
        lock.wait(20)
        everything = list(table)
        lock.wait(20)
        return everything

    monkeypatch.setattr(
        evaluator,
        "jax",
        SimpleNamespace(process_index=lambda: here.index, process_count=lambda: number),
    )
    monkeypatch.setattr(evaluator.hosts, "gather", gather)
    results: list = [None] * number

    def run(index):
        here.index = index
        try:
            results[index] = task(index)
        except ValueError as error:
            results[index] = str(error)

    threads = [threading.Thread(target=run, args=[index]) for index in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("number", [2, 3, 16])
@pytest.mark.parametrize("num_together", [1, 3, 8])
def test_every_image_is_predicted_once_in_the_order_of_the_json(
    monkeypatch, datasets, number, num_together
):
    dataset, records = datasets
    dataset = _with(dataset, records)
    expected = evaluator.predict_dataset(Stub(1), dataset)
    assert [entry["image_id"] for entry in expected] == list(range(100, 111))
    stubs = [Stub(num_together) for _ in range(number)]
    results = on_hosts(
        monkeypatch, number, lambda index: evaluator.predict_dataset(stubs[index], dataset)
    )
    assert results == [expected, *[[]] * (number - 1)]
    calls = [stub.calls for stub in stubs]
    assert sum(map(sum, calls)) == 11
    # Seven and four, cut into batches: no host has two more than another.
    assert sum(map(len, calls)) == -(-7 // num_together) + -(-4 // num_together)
    assert max(map(len, calls)) - min(map(len, calls)) <= 1


def test_what_goes_wrong_on_one_host_is_raised_on_all(monkeypatch, datasets):
    dataset, records = datasets
    dataset = _with(dataset, [records[0], dataclasses.replace(records[1], path="/nowhere/b.png")])
    monkeypatch.setattr(evaluator, "_check_files", lambda _: None)  # gone after it was asked for
    results = on_hosts(monkeypatch, 2, lambda index: evaluator.predict_dataset(Stub(1), dataset))
    assert results[0] == results[1]
    assert "/nowhere/b.png" in results[0] and results[0].startswith("host ")


class Records(list):
    """Records of several jsons, with the columns that are asked for."""

    image_ids = property(lambda self: np.array([record.image_id for record in self]))
    image_sizes = property(lambda self: np.array([(r.height, r.width) for r in self]))
    files = property(lambda self: [(record.file_name, record.path) for record in self])


def _with(dataset, records):
    return dataclasses.replace(dataset, records=Records(records))
