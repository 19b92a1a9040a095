"""What the machine does to a run: no room, streams that are gone, twins. All of it is real."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparseinst_jax import cli
from sparseinst_jax.checkpoints.folders import whole_steps
from sparseinst_jax.checkpoints.store import Checkpoints
from sparseinst_jax.data.shapes import draw_shapes_dataset
from sparseinst_jax.runtime.output import LOST_OUTPUT
from tests.end_to_end import kill_at_random
from tests.end_to_end.test_faults import CACHE, arguments

WAIT = 240  # seconds; on a machine that is busy a start takes a minute, and a hang took twenty
TRAIN = Path(__file__).parents[2] / "train.py"
# A mount of our own, of a user with or without rights; where the system forbids both, the tests of
# full disks by a limit on files (`small_files`) remain, and the reports of SIGBUS in test_skipping.
CAN_MOUNT = subprocess.run(
    ["unshare", "-rm", "mount", "-t", "tmpfs", "t", "/mnt"], capture_output=True, check=False
)
needs_mount = pytest.mark.skipif(CAN_MOUNT.returncode != 0, reason=CAN_MOUNT.stderr.decode())


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    return draw_shapes_dataset(folder, num_train=8, num_val=2, seed=3, image_size=(64, 64))


def start(before: str, data: Path, workdir: Path, *words: str) -> subprocess.Popen:
    """Start training in a shell, after some of its commands; a session of its own."""
    line = [sys.executable, str(TRAIN), *arguments(data, workdir, *words)]
    # No word of it needs quotes but the milestones, which may stand inside of quotes.
    line = [word.replace("(", r"\(").replace(")", r"\)") for word in line]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(CACHE)}
    return subprocess.Popen(
        ["bash", "-c", before.replace("TRAIN", f"exec {' '.join(line)}")],
        env=environment,
        start_new_session=True,
        # Under `nohup` the tests ignore it, and what they start would, too.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )


def wait_for_steps(process: subprocess.Popen, workdir: Path, number: int) -> None:
    path = workdir / "metrics.csv"
    while process.poll() is None:
        if path.exists() and path.read_text().count("\n") > number:
            return
        time.sleep(0.02)


MANY = ("--config.train.num_steps=1000", "--config.train.milestones=(3,)")


@needs_mount
@pytest.mark.parametrize("options", ["nr_inodes=50", "size=1500k"])  # no folders; no bytes
def test_a_save_without_room_ends_the_run_at_once_with_one_message(data, tmp_path, capfd, options):
    run = tmp_path / "disk" / "run"
    run.parent.mkdir()
    mount = f"mount -t tmpfs -o {options} disk {run.parent} && (TRAIN); code=$?"
    look = f"; ls {run}/* >&2; exit $code"  # what is on the mount is gone with it
    process = start(f"unshare -rm bash -c {shlex.quote(mount + look)}", data, run, *MANY)
    assert process.wait(WAIT) == 1
    said = capfd.readouterr().err
    assert "Traceback" not in said and "loop is closed" not in said and "awaited" not in said
    message, _, left = said.partition(f"{run}/checkpoints:\n")  # from there on it is `ls`
    assert message.count("error: ") == 1
    assert f"{run}/" in message
    # A picture of the first batches can be what finds no room, before a save does.
    if f"{run}/batches" not in message:
        assert message.count("could not be saved") == 1
        assert f"{run}/checkpoints" in message or "there is none" in message
        assert "The last one: " in message
    assert "orbax-checkpoint-tmp" not in left  # the half save does not fill the disk


@pytest.mark.parametrize(
    ("shell", "sent", "code", "is_noted"),
    [
        # The reader is gone, and then a Ctrl-C goes to the group.
        ("TRAIN > >(head -1 > /dev/null)", signal.SIGINT, 130, True),
        ("TRAIN > /dev/full 2>&1", signal.SIGTERM, 143, True),
        ("TRAIN >&- 2>&- <&-", signal.SIGHUP, 129, False),
    ],
)
def test_output_that_is_gone_costs_no_step(data, tmp_path, shell, sent, code, is_noted):
    run = tmp_path / "run"
    process = start(shell, data, run, *MANY, "--config.train.checkpoint_every=0")
    wait_for_steps(process, run, 3)
    os.killpg(process.pid, sent)
    assert process.wait(WAIT) == code
    (saved,) = whole_steps(run / "checkpoints")
    assert len(kill_at_random.rows(run)) == saved >= 3
    assert (run / LOST_OUTPUT).exists() == is_noted


def test_under_nohup_a_terminal_that_closes_ends_nothing(data, tmp_path):
    run = tmp_path / "run"
    process = start("trap '' HUP; TRAIN > /dev/null", data, run, *MANY)
    wait_for_steps(process, run, 3)
    process.send_signal(signal.SIGHUP)
    wait_for_steps(process, run, 8)
    assert process.poll() is None
    process.terminate()
    assert process.wait(WAIT) == 143


def test_a_second_start_says_who_trains_there_and_ends_with_a_code_of_its_own(
    data, tmp_path, capfd
):
    run = tmp_path / "run"
    with Checkpoints(run) as checkpoints:
        time.sleep(1)  # Orbax cleans up in the background
        half = checkpoints.directory / "8.orbax-checkpoint-tmp"  # of a save that is going on
        half.mkdir()
        assert cli.run("train", arguments(data, run)) == 73
        said = capfd.readouterr().err
        assert f"another process trains in {run} (host " in said
        assert f", process {os.getpid()}, since 2" in said
        assert half.exists()
    assert cli.run("train", arguments(data, run)) == 0
    assert not half.exists() and not (run / "run.lock").exists()


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """A run that reads without workers."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    assert cli.run("train", arguments(data, workdir, "--config.train.num_steps=12")) == 0
    return workdir


@needs_mount
@pytest.mark.parametrize("size", ["40k", "400k"])  # too small for queues; for batches (SIGBUS)
def test_shared_memory_that_is_too_small_is_done_without(data, whole, tmp_path, capfd, size):
    run = tmp_path / "run"
    words = ("--config.data.num_workers=1", "--config.train.num_steps=12")
    shell = f"mount -t tmpfs -o size={size} t /dev/shm && TRAIN"
    process = start(f"unshare -rm bash -c {shlex.quote(shell)}", data, run, *words)
    assert process.wait(WAIT) == 0
    said = capfd.readouterr().err
    assert said.count("/dev/shm (0 MiB, 0 free) is too small") == 1 and "--shm-size" in said
    assert kill_at_random.rows(run) == kill_at_random.rows(whole)


def test_the_first_error_is_the_one_that_is_shown(data, tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("Event loop is closed\nand more")

    monkeypatch.setattr("sparseinst_jax.drawing.charts.save", broken)
    image = next((data / "images" / "train").iterdir())
    content = image.read_bytes()
    image.write_bytes(content[:50])
    try:
        assert cli.run("train", arguments(data, tmp_path / "run")) == 1
    finally:
        image.write_bytes(content)
    said = capsys.readouterr()
    assert said.err.count("error: ") == 1 and f"{image.name} cannot be read" in said.err
    assert "WARNING: no curves.png: Event loop is closed\n" in said.out
