"""Readers that die or hang are started again at the same item."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from sparseinst_jax.data import coco, failures, loader, plan, shapes
from sparseinst_jax.data.failures import supervised

DIED = "Worker process was terminated unexpectedly with exit code -9."


class Reader:
    """Numbers from `first`; `faults[n]` is called, once each, in place of giving number n."""

    def __init__(self, faults):
        self.faults, self.starts, self.closed = faults, [], 0

    def __call__(self, first):
        self.starts.append(first)
        try:
            for number in range(first, 6):
                for fault in self.faults.get(number, [])[:1]:
                    self.faults[number].pop(0)
                    fault()
                yield number
        finally:
            self.closed += 1


def die():
    raise RuntimeError(DIED)


def test_a_reader_that_died_is_started_again_at_the_same_item():
    reader, said = Reader({3: [die], 4: [die]}), []
    assert list(supervised(reader, 6, said.append)) == [0, 1, 2, 3, 4, 5]
    assert reader.starts == [0, 3, 4] and reader.closed == 3
    assert len(said) == 2 and "has died (exit code -9); reading starts again at" in said[0]


def test_a_reader_that_dies_twice_at_the_same_item_ends_the_run_with_a_message():
    reader, said = Reader({3: [die, die]}), []
    with pytest.raises(
        ValueError, match=r"has died \(exit code -9\), 2 times in a row.*data.num_workers"
    ):
        list(supervised(reader, 6, said.append))
    assert len(said) == 1


@pytest.mark.parametrize(
    "fault", [RuntimeError(DIED.replace("-9", "-7")), OSError(28, "No space left on device")]
)
def test_without_room_in_shared_memory_processes_are_done_without(fault):
    def fail():
        raise fault

    reader, alone, said = Reader({3: [fail]}), Reader({}), []
    assert list(supervised(reader, 6, said.append, alone)) == [0, 1, 2, 3, 4, 5]
    assert reader.starts == [0] and alone.starts == [3]
    (line,) = said
    assert line.startswith("WARNING: /dev/shm (") and "--shm-size=8g" in line
    with pytest.raises(ValueError, match=r"/dev/shm .* is too small"):  # where it cannot be
        list(supervised(Reader({0: [fail, fail]}), 6, said.append))


def test_a_reader_that_hangs_is_left_and_another_one_started(monkeypatch):
    monkeypatch.setattr(failures, "STUCK_SECONDS", 0.3)
    monkeypatch.setattr(failures, "_CLOSE_SECONDS", 0.1)
    stuck = threading.Event()
    reader, said = Reader({2: [lambda: stuck.wait(30)]}), []
    assert list(supervised(reader, 6, said.append)) == [0, 1, 2, 3, 4, 5]
    assert reader.starts == [0, 2] and "no batch for 0.3 s, the readers hang" in said[0]
    stuck.set()


def test_the_fault_of_an_image_is_raised_and_closing_ends_the_reader():
    def broken():
        raise ValueError("a.jpg")

    with pytest.raises(ValueError, match=r"a\.jpg"):
        list(supervised(Reader({1: [broken]}), 6))
    reader = Reader({})
    items = supervised(reader, 6)
    assert next(items) == 0
    items.close()
    assert reader.closed == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "suspended"])
def test_a_process_that_reads_images_is_replaced(tmp_path, monkeypatch, number):
    said = []

    def say(line):
        said.append(line)
        monkeypatch.undo()  # the next process takes seconds to start

    root = shapes.draw_shapes_dataset(tmp_path / "shapes", 6, 1, seed=2, image_size=(64, 64))
    data = coco.load_coco(root / "train.json", root / "images/train")
    sizes = {"seed": 1, "batch_size": 2, "train_sizes": (64,), "train_max_size": 64}
    steps = plan.TrainPlan(data.image_sizes, data.num_targets, **sizes)
    expected = list(loader.train_batches(data, steps, 0, 12))
    monkeypatch.setattr(failures, "_print", say)
    batches = loader.train_batches(data, steps, 0, 12, num_workers=1)
    found = [next(batches)]
    monkeypatch.setattr(failures, "STUCK_SECONDS", 1.0)
    (worker,) = failures.multiprocessing.active_children()
    os.kill(worker.pid, number)
    found += list(batches)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.images, b.images)
        np.testing.assert_array_equal(a.masks, b.masks)
    assert len(said) == 1
    # What a killed process leaves behind may keep its queue from saying so.
    assert "has died" in said[0] or "the readers hang" in said[0]
    assert "the readers hang" in said[0] or number == signal.SIGKILL
    assert not worker.is_alive()


ORPHAN = """
import os, subprocess, sys, time
from sparseinst_jax.data import loader
loader._PARENT_POLL_SECONDS = 0.1
if __name__ == "__main__":
    child = [sys.executable, "-c", "from sparseinst_jax.data import loader; import os, time;"
             f"loader._PARENT_POLL_SECONDS = 0.1; loader._end_with_parent({os.getpid()}, 0, 1);"
             "print('on', flush=True); time.sleep(60)"]
    process = subprocess.Popen(child, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    print(process.pid, flush=True)
    os.kill(os.getpid(), 9)
"""


def test_a_process_that_reads_images_ends_when_the_program_was_killed():
    run = subprocess.run([sys.executable, "-c", ORPHAN], capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    stop = time.monotonic() + 20
    while os.path.exists(f"/proc/{run.stdout.strip()}") and time.monotonic() < stop:
        with open(f"/proc/{run.stdout.strip()}/stat") as file:
            if file.read().split()[2] == "Z":  # ended, and nobody asks for it
                break
        time.sleep(0.1)
    else:
        assert time.monotonic() < stop
