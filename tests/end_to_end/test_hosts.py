"""The same run on one, two and four devices and on two processes, and a host that is lost.

Of FastInst a short run on one device, and one on two processes of two each.

Devices are virtual ones of the CPU, processes are real and talk by gloo. One process stands for
machines with 1, 2 and 4 devices: starting and compiling takes most of the time.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparseinst_jax.checkpoints.store import Checkpoints
from sparseinst_jax.data.shapes import draw_shapes_dataset
from sparseinst_jax.training.progress import read_metrics
from tests import smallest, tiny_fastinst
from tests.end_to_end import host

pytestmark = pytest.mark.timeout(900)  # three processes that compile, maybe on a busy machine

ROOT = Path(__file__).parents[2]
NUM_STEPS, FASTINST_STEPS = 20, 4
SMALLEST, FASTINST = smallest.__file__, tiny_fastinst.__file__
DEVICES = "--xla_force_host_platform_device_count"
# Largest relative difference of a loss in 20 steps: thirty times what was found.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def data(folder) -> Path:
    data = draw_shapes_dataset(
        folder / "shapes", num_train=10, num_val=5, seed=3, image_size=(64, 64)
    )
    truth = json.loads((data / "val.json").read_text())
    first = truth["images"][0]["id"]
    one = {**truth, "images": truth["images"][:1]}
    one["annotations"] = [e for e in truth["annotations"] if e["image_id"] == first]
    (data / "one.json").write_text(json.dumps(one))
    return data


def configured(data: Path, workdir: Path, config: object = SMALLEST, **values: object) -> list[str]:
    arguments = [f"--config={config}", f"--workdir={workdir}"]
    for split in ("train", "val"):
        arguments.append(f"--config.data.{split}.images={data / 'images' / split}")
        arguments.append(f"--config.data.{split}.annotations={data / split}.json")
    values = {
        "batch_size": 4,
        "base_batch_size": 4,
        "num_steps": NUM_STEPS,
        "warmup_steps": 5,
        "milestones": "(15,)",
        "checkpoint_every": 0,
        **values,
    }
    return arguments + [f"--config.train.{key}={value}" for key, value in values.items()]


def evaluated(data: Path, workdir: Path, output: Path, annotations: str = "val") -> list[str]:
    return [
        f"--workdir={workdir}",
        f"--output={output}",
        "--pictures=0",
        f"--config.data.val.annotations={data / annotations}.json",
    ]


def environment(num_devices: int) -> dict[str, str]:
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        # To those of `quick_compilation`: the sums are as exact without optimisation.
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}={num_devices}",
    }


def start_hosts(
    folder: Path, name: str, tasks: list[dict], *, number: int, num_devices: int
) -> list[subprocess.Popen]:
    """Start processes of so many devices each that run the tasks; see `finish_hosts`."""
    file = folder / f"{name}.json"
    file.write_text(json.dumps(tasks))
    variables = environment(num_devices) | (job(number) if number > 1 else {})
    return [
        subprocess.Popen(
            [sys.executable, host.__file__, str(file)],
            env={**variables, "JAX_PROCESS_ID": str(index)},
            stdout=(folder / f"{name}.out.{index}").open("w"),
            stderr=subprocess.STDOUT,
        )
        for index in range(number)
    ]


def finish_hosts(
    folder: Path, name: str, processes: list[subprocess.Popen], others: Sequence[subprocess.Popen]
) -> list[list]:
    """Wait for the processes while the others are well: the results of each."""
    running = [*processes, *others]
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in running):
            break  # those that wait for it would wait for ever
        time.sleep(0.05)
    files = sorted(folder.glob("*.out.*"))
    assert not any(process.poll() for process in running), "\n\n".join(
        file.read_text()[-3000:] for file in files
    )
    count = len(processes)
    return [json.loads((folder / f"{name}.json.{index}").read_text()) for index in range(count)]


def job(number: int) -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(number)}


def losses(workdir: Path, num_steps: int = NUM_STEPS) -> np.ndarray:
    rows = read_metrics(workdir / "metrics.csv")
    assert [row["step"] for row in rows] == list(range(1, num_steps + 1))
    return np.array([row["loss/total"] for row in rows])


def batches(log: Path) -> dict[int, list]:
    """Ids and sums of the global batch of each step, the hosts' parts in their order."""
    found: dict[int, list] = {}
    for file in sorted(log.parent.glob(f"{log.name}.*")):
        for line in file.read_text().splitlines():
            step, ids, sums = json.loads(line)
            found.setdefault(step, []).extend(zip(ids, sums, strict=True))
    return found


@pytest.fixture(scope="module")
def runs(folder, data):
    """All runs, in as few processes as possible."""

    fastinst: dict = {"config": FASTINST, "num_steps": FASTINST_STEPS, "milestones": "(3,)"}

    def train_task(name: str, devices: int | None, **values: Any) -> dict:
        task = {"command": "train", "arguments": configured(data, folder / name, **values)}
        task["log"] = str(folder / f"{name}.log")
        return task if devices is None else {**task, "devices": devices}

    def eval_task(output: str, devices: int | None, annotations: str = "val") -> dict:
        arguments = evaluated(data, folder / "one", folder / output, annotations)
        task = {"command": "eval", "arguments": arguments}
        return task if devices is None else {**task, "devices": devices}

    # Of batches of two images the second is the second host's.
    truth = json.loads((data / "val.json").read_text())
    images = data / "images" / "val"
    cut = (images / truth["images"][2]["file_name"]).read_bytes()[:200]
    truth["images"][2]["file_name"] = "broken.png"
    (images / "broken.png").write_bytes(cut)
    (data / "broken.json").write_text(json.dumps(truth))
    alone = [
        train_task("devices", 1, num_steps=3),
        {"command": "copy", "run": str(folder / "devices"), "path": str(folder / "hosts")},
        train_task("one", 1),
        train_task("devices", 4, num_steps=12),
        train_task("devices", 2),
        *[eval_task(f"eval_{number}", number) for number in (1, 2, 4)],
        train_task("fastinst_one", 1, **fastinst),
        {"command": "wait", "path": str(folder / "together_done")},
        train_task("hosts", 1),
    ]
    together = [
        {"command": "wait", "path": str(folder / "hosts")},
        train_task("hosts", None, num_steps=17, eval_every=17),
        {"command": "wait", "path": str(folder / "one" / "checkpoints" / str(NUM_STEPS))},
        eval_task("eval_hosts", None),
        eval_task("eval_hosts_one", None, "one"),
        train_task("fastinst_hosts", None, **fastinst),
        eval_task("eval_broken", None, "broken"),
    ]
    processes = start_hosts(folder, "alone", alone, number=1, num_devices=4)
    try:
        processes += start_hosts(folder, "together", together, number=2, num_devices=2)
        results = finish_hosts(folder, "together", processes[1:], processes[:1])
        (folder / "together_done").touch()
        assert finish_hosts(folder, "alone", processes[:1], ()) == [[0] * len(alone)]
    finally:
        for process in processes:
            process.kill()
    assert [found[:-1] for found in results] == [[0] * (len(together) - 1)] * 2
    return folder, [found[-1] for found in results]


@pytest.mark.parametrize("name", ["devices", "hosts"])
def test_a_run_continued_on_other_devices_or_hosts_has_the_same_losses(runs, name):
    """`devices`: 1 to step 3, 4 to 12, 2; `hosts`: 1 to step 3, 2 x 2 to 17, 1."""
    folder, _ = runs
    expected = losses(folder / "one")
    error = np.abs(losses(folder / name) / expected - 1).max()
    print(f"{name}: largest relative difference of a loss {error:.2g}")
    assert error < ROUNDING
    assert np.ptp(expected) > 0.1 * expected.max()  # they do change


def test_fastinst_has_the_same_losses_on_two_hosts(runs):
    """Its random points and the counts of its terms are those of the global batch."""
    folder, _ = runs
    one, two = (losses(folder / f"fastinst_{name}", FASTINST_STEPS) for name in ("one", "hosts"))
    error = np.abs(two / one - 1).max()
    print(f"FastInst: largest relative difference of a loss {error:.2g}")
    assert error < ROUNDING
    assert np.ptp(one) > 0.01 * one.max()  # they do change


@pytest.mark.parametrize("name", ["devices", "hosts"])
def test_the_global_batches_are_the_same_images_in_the_same_order_to_the_last_pixel(runs, name):
    folder, _ = runs
    expected = batches(folder / "one.log")
    assert sorted(expected) == list(range(NUM_STEPS))
    assert all(len(batch) == 4 for batch in expected.values())
    found = batches(folder / f"{name}.log")
    # Batches are read ahead: those after the end of a part are read again by the next.
    assert {step: found[step][:4] for step in found} == expected


@pytest.mark.parametrize("output", ["eval_2", "eval_4", "eval_hosts"])
def test_an_evaluation_writes_the_same_files_on_any_number_of_devices_and_hosts(runs, output):
    folder, _ = runs
    for name in ("predictions.json", "metrics.json"):
        expected = (folder / "eval_1" / name).read_text()
        assert (folder / output / name).read_text() == expected
    results = json.loads((folder / output / "predictions.json").read_text())
    truth = json.loads((folder / "shapes" / "val.json").read_text())
    order = [entry["id"] for entry in truth["images"]]
    assert list(dict.fromkeys(entry["image_id"] for entry in results)) == order
    assert len(results) == 5 * 10  # each image once: every mask of ten is kept


def test_a_host_without_any_image_takes_part(runs):
    folder, _ = runs
    first = json.loads((folder / "shapes" / "one.json").read_text())["images"][0]["id"]
    all_results = json.loads((folder / "eval_1" / "predictions.json").read_text())
    expected = [entry for entry in all_results if entry["image_id"] == first]
    assert json.loads((folder / "eval_hosts_one" / "predictions.json").read_text()) == expected


def test_an_image_that_one_host_cannot_read_is_an_error_of_all_and_not_a_hang(runs):
    _, messages = runs
    assert messages[0] == messages[1]
    assert messages[0].startswith("host 1: ") and "broken.png" in messages[0]


def test_an_evaluation_in_training_is_stored_by_the_first_host(runs):
    folder, _ = runs
    scored = [row for row in read_metrics(folder / "hosts" / "metrics.csv") if "AP" in row]
    assert [row["step"] for row in scored] == [17]
    with Checkpoints(folder / "hosts", read_only=True) as checkpoints:
        assert set(checkpoints.read_meta(17)["metrics"]) == {"AP", "AP50", "AP75"}


LOOP = """
import sys, time
import jax, numpy as np
from sparseinst_jax import cli
from sparseinst_jax.runtime import hosts

def main(argv):
    hosts.join()
    add = jax.pmap(lambda x: jax.lax.psum(x, "a"), axis_name="a")
    for step in range(10**6):
        hosts.report(f"step {step}")
        jax.block_until_ready(add(np.ones((jax.local_device_count(), 2))))
        if step == 3:
            print("running", flush=True)
        time.sleep(0.01)

sys.exit(cli.run(main, sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "number, expected",
    [
        (signal.SIGSTOP, "has not answered for "),
        (signal.SIGKILL, "probably another host ended"),
    ],
    ids=["suspended", "killed"],
)
def test_a_host_that_stops_answering_ends_the_others_with_a_message(folder, number, expected):
    timeout = 4
    variables = environment(1) | job(2) | {"SPARSEINST_HOST_TIMEOUT": str(timeout)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LOOP],
            env={**variables, "JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        assert all(
            any("running" in line for line in process.stdout)  # type: ignore[union-attr]
            for process in processes
        )
        started = time.monotonic()
        processes[1].send_signal(number)
        _, text = processes[0].communicate(timeout=60)
        seconds = time.monotonic() - started
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert processes[0].returncode == 75, text
    assert expected in text and "The same command continues from the last checkpoint" in text
    print(f"ended after {seconds:.1f} s")
    assert seconds < timeout + 10  # a busy machine needs some to end
