"""One host of a job, for `test_hosts`: runs the tasks of a json file one after the other.

A task is {"command": "train" or "eval", "arguments": [...], "log": path, "devices": n}; `devices`
lets one process stand for machines with fewer devices than it has. {"command": "copy"} copies the
folder and the log of a run, {"command": "wait"} waits for a "path" that another process makes.
"""

import functools
import json
import shutil
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from sparseinst_jax import cli
from sparseinst_jax.cli import eval as eval_command
from sparseinst_jax.cli import train as train_command
from sparseinst_jax.data import loader
from sparseinst_jax.runtime import hosts
from sparseinst_jax.setup import run as run_setup
from sparseinst_jax.training.step import TrainStep

_train_batches = loader.train_batches


def log_batches(log: str) -> None:
    """Let training write a line for each of its batches: the ids and what is in the arrays."""

    def logged(dataset, plan, start, number, index, count, *others):
        with open(f"{log}.{index}", "a") as file:
            for offset, batch in enumerate(
                _train_batches(dataset, plan, start, number, index, count, *others)
            ):
                sums = [
                    zlib.crc32(
                        b"".join(
                            np.ascontiguousarray(array[row]).tobytes()
                            for array in (batch.images, batch.masks, batch.labels, batch.valid_size)
                        )
                    )
                    for row in range(len(batch.images))
                ]
                ids = np.asarray(batch.image_id).tolist()
                file.write(json.dumps([start + offset, ids, sums]) + "\n")
                file.flush()
                yield batch

    loader.train_batches = logged


def run_task(task: dict, all_devices: list) -> int | str:
    """Run one task: the exit code, or the message of an error."""
    if task["command"] == "copy":
        shutil.copy(f"{task['run']}.log.0", f"{task['path']}.log.0")
        shutil.copytree(task["run"], f"{task['path']}.tmp")
        Path(f"{task['path']}.tmp").rename(task["path"])
        return 0
    if task["command"] == "wait":
        while not Path(task["path"]).exists():
            time.sleep(0.05)
        return 0
    if "devices" in task:
        devices = all_devices[: task["devices"]]
        jax.local_devices = lambda: devices
        jax.device_count = lambda: len(devices)
        run_setup.TrainStep = functools.partial(TrainStep, devices=devices)
    if "log" in task:
        log_batches(task["log"])
    command = {"train": train_command, "eval": eval_command}[task["command"]]
    try:
        return command.main(task["arguments"])
    except ValueError as error:
        return str(error)
    finally:
        loader.train_batches = _train_batches


def main(argv: Sequence[str]) -> int:
    """Run the tasks of the file; the results go to `<file>.<process>`."""
    hosts.join()
    devices = jax.local_devices()
    tasks = json.loads(Path(argv[0]).read_text())
    results = [run_task(task, devices) for task in tasks]
    Path(f"{argv[0]}.{jax.process_index()}").write_text(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:]))
