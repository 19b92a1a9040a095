"""Kill training runs by SIGKILL at random moments, and compare with one that was left alone.

    python tests/end_to_end/kill_at_random.py --kills 30

Four kinds of moments take turns: any time after the start (mostly while a run starts or restores),
in training, in the middle of a save, in the middle of an evaluation. A killed run is started again
by the same command until it is finished; then another run begins, until all kills are done. Every
column of metrics.csv that does not measure time or memory must equal the uninterrupted run's, as
text; no step may occur twice; no process may be left. Exit code 1 if anything differs.
"""

import argparse
import contextlib
import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from sparseinst_jax.checkpoints.folders import whole_steps  # noqa: E402
from sparseinst_jax.data.shapes import draw_shapes_dataset  # noqa: E402

MEASURED = ("images_per_second", "data_wait", "memory_gib")  # columns that never repeat
MOMENTS = ("any time", "training", "save", "evaluation")
START_SECONDS = 12.0
_POLL_SECONDS = 0.001


def command(data: Path, workdir: Path, *words: str) -> list[str]:
    """The command line of a run of a minute."""
    values = {
        "data.num_workers": 1,
        "train.num_steps": 60,
        "train.milestones": "(50,)",
        "train.checkpoint_every": 4,
        "train.eval_every": 10,
        "train.log_every": 2,
    }
    for split in ("train", "val"):
        values[f"data.{split}.images"] = data / "images" / split
        values[f"data.{split}.annotations"] = data / f"{split}.json"
    given = [f"--config.{key}={value}" for key, value in values.items()]
    tiny = ROOT / "configs" / "tiny.py"
    start = [sys.executable, str(ROOT / "train.py"), f"--config={tiny}", f"--workdir={workdir}"]
    return [*start, *given, *words]


def start(words: list[str], log: Path, cache: Path) -> subprocess.Popen:
    """Start a run that writes into a log."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache)}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    with log.open("w") as file:
        return subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=environment)


def rows(workdir: Path) -> list[dict[str, str]]:
    """What metrics.csv says, as text, without what was measured."""
    with (workdir / "metrics.csv").open() as file:
        found = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in MEASURED and v} for row in found]


def kill_at(process: subprocess.Popen, is_time: Callable[[], bool]) -> bool:
    """Kill a process by SIGKILL when it is time; False if it ended before."""
    while process.poll() is None:
        if is_time():
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
        time.sleep(_POLL_SECONDS)
    return False


def moment(kind: str, workdir: Path, log: Path, draw: random.Random) -> Callable[[], bool]:
    """A function that becomes true at a random moment of a kind."""
    count = draw.randint(1, 3) if kind == "save" else draw.randint(1, 5)
    delay = draw.uniform(0, {"any time": START_SECONDS, "save": 0.03}.get(kind, 0.2))
    if kind == "any time":
        count = 0
    seen: set[str] = set()
    reached: list[float] = [] if count else [time.monotonic()]
    before = (workdir / "metrics.csv").read_text() if (workdir / "metrics.csv").exists() else ""

    def is_time() -> bool:
        if not reached:
            if kind == "save":
                folder = workdir / "checkpoints"
                seen.update(str(p) for p in folder.glob("*tmp*"))
                is_there = len(seen) >= count
            elif kind == "evaluation":
                is_there = "evaluating step" in log.read_text()
            else:
                path = workdir / "metrics.csv"
                text = path.read_text() if path.exists() else ""
                is_there = text != before and log.read_text().count("\nstep ") >= count
            if is_there:
                reached.append(time.monotonic())
        return bool(reached) and time.monotonic() - reached[0] >= delay

    return is_time


def processes_of(folder: Path) -> list[int]:
    """Processes (of Linux) that were started with the folder in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def main() -> int:
    """Kill as often as asked for; print what happened."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = draw_shapes_dataset(folder / "data", num_train=12, num_val=4, image_size=(64, 64))
        whole = folder / "uninterrupted"
        process = start(command(data, whole), folder / "log", folder / "xla")
        if process.wait():
            print((folder / "log").read_text())
            return 1
        wanted = rows(whole)
        killed = faults = number = 0
        while killed < arguments.kills:
            number += 1
            workdir, log = folder / f"run{number}", folder / "log"
            while True:
                process = start(command(data, workdir), log, folder / "xla")
                kind = MOMENTS[killed % len(MOMENTS)]
                is_time = moment(kind, workdir, log, draw)
                if killed >= arguments.kills:
                    process.wait()
                    break
                if not kill_at(process, is_time):
                    break
                killed += 1
                saved = whole_steps(workdir / "checkpoints")
                done = rows(workdir)[-1:] if (workdir / "metrics.csv").exists() else []
                halves = len(list((workdir / "checkpoints").glob("*tmp*")))
                print(
                    f"kill {killed}, {kind}: run {number}, metrics to step"
                    f" {done[0]['step'] if done else 0}, saved {saved[-1:] or 0}, half saves"
                    f" {halves}",
                    flush=True,
                )
            found = rows(workdir) if process.returncode == 0 else []
            is_equal = found == wanted
            faults += not is_equal
            print(f"run {number}: exit code {process.returncode}, equal: {is_equal}", flush=True)
            if not is_equal:
                print(log.read_text()[-3000:])
                pairs = zip(found, wanted, strict=False)
                print([pair for pair in pairs if pair[0] != pair[1]][:2])
        time.sleep(5)  # processes that read images notice within seconds that they are alone
        left = processes_of(folder)
        print(f"{killed} kills, {number} runs, {faults} differ; processes left: {left}")
    return 1 if faults or left else 0


if __name__ == "__main__":
    sys.exit(main())
