"""Disturb training runs at random moments, and compare with one that was left alone.

    python tests/end_to_end/kill_at_random.py --times 30 [--by kill|tee|twins|full] [--config FILE]

* kill: SIGKILL.
* tee: what a run prints goes through `tee`; SIGINT, SIGTERM or SIGHUP to both of them.
* twins: the same command is started a second time; half of the first ones are then killed.
* full: the disk becomes full (a small one in memory, mounted as root or by `unshare -rm`).

Four kinds of moments take turns: any time after the start (mostly while a run starts or restores),
in training, in the middle of a save, in the middle of an evaluation. A run that ended is started
again by the same command until it is finished; then another run begins, until all is done. Every
column of metrics.csv that does not measure time or memory must equal the uninterrupted run's, as
text; no step may occur twice; no step saved before may be lost; exit codes must be those of
docs/faults.md, within a minute; no process may be left. Exit code 1 if anything differs.
"""

import argparse
import contextlib
import csv
import functools
import os
import random
import shutil
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
TINY = ROOT / "configs" / "tiny.py"
START_SECONDS = 12.0
MOST_SECONDS = 90.0  # from a disturbance to the end; a start takes 20 s where others work too
DISK = "size=60m"
_POLL_SECONDS = 0.001


def command(data: Path, workdir: Path, *words: str, config: object = TINY) -> list[str]:
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
    start = [sys.executable, str(ROOT / "train.py"), f"--config={config}", f"--workdir={workdir}"]
    return [*start, *given, *words]


def start(words: list[str], log: Path, cache: Path, tee: bool = False) -> subprocess.Popen:
    """Start a run that writes into a log, if wanted through `tee` in its process group."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache)}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    options: dict = {"stderr": subprocess.STDOUT, "env": environment, "process_group": 0}
    if not tee:
        with log.open("w") as file:
            return subprocess.Popen(words, stdout=file, **options)
    log.write_text("")
    process = subprocess.Popen(words, stdout=subprocess.PIPE, **options)
    with log.open("w") as file:
        group = {"process_group": process.pid, "stdout": file}
        subprocess.Popen(["tee", os.devnull], stdin=process.stdout, **group)
    assert process.stdout is not None
    process.stdout.close()  # only `tee` has the reading end
    return process


def rows(workdir: Path) -> list[dict[str, str]]:
    """What metrics.csv says, as text, without what was measured."""
    with (workdir / "metrics.csv").open() as file:
        found = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in MEASURED and v} for row in found]


def kill_at(process: subprocess.Popen, is_time: Callable[[], bool]) -> bool:
    """Kill a process by SIGKILL when it is time; False if it ended before."""
    is_there = wait_until(process, is_time)
    if is_there:
        process.kill()
        process.wait()
    return is_there


def wait_until(process: subprocess.Popen, is_time: Callable[[], bool]) -> bool:
    """Wait until it is time; False if the process ended before."""
    while process.poll() is None:
        if is_time():
            return True
        time.sleep(_POLL_SECONDS)
    return False


def disturb(by: str, process: subprocess.Popen, again: Callable, disk: Path, draw: random.Random):
    """Disturb a run in a way, and wait; gives what happened and the faults of its end."""
    what, codes, faults = by, {0}, []
    if by == "kill":
        process.kill()
        codes = {-signal.SIGKILL}
    elif by == "tee":
        number = draw.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
        what, codes = number.name, {0, 128 + number, -number}
        os.killpg(process.pid, number)
    elif by == "twins":
        second = again()
        code = second.wait(MOST_SECONDS)
        if code != 73 and not (code == 0 and process.poll() == 0):
            faults.append(f"the second start ended with {code}")
        what = f"a second start, which ended with {code}"
        if process.poll() is None and draw.random() < 0.5:
            process.kill()
            what, codes = f"{what}; the first one killed", {-signal.SIGKILL}
    else:
        filler, codes = disk / "filler", {0, 1}
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(1 << 16)):
                pass
    try:
        code = process.wait(MOST_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        faults.append("it hangs")
    (disk / "filler").unlink(missing_ok=True)
    if code not in codes:
        faults.append(f"exit code {code}, expected one of {sorted(codes)}")
    return f"{what}, exit code {code}", faults


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
    """Processes (of Linux) that were started with the folder on their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def main() -> int:
    """Disturb as often as asked for; print what happened."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=30)
    parser.add_argument("--by", choices=("kill", "tee", "twins", "full"), default="kill")
    parser.add_argument("--config", default=TINY, help="of minutes at most")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.by == "full" and "DISK" not in os.environ:  # once more, where mounts are ours
        environment = {**os.environ, "DISK": "1"}
        return subprocess.call(["unshare", "-rm", sys.executable, *sys.argv], env=environment)
    for number in (signal.SIGHUP, signal.SIGTERM):  # a run inherits what `nohup` ignores
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder, disk = Path(name), Path(name) / "disk"
        disk.mkdir()
        if arguments.by == "full":
            subprocess.check_call(["mount", "-t", "tmpfs", "-o", DISK, "disk", str(disk)])
        cache = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", folder / "xla"))
        data = draw_shapes_dataset(folder / "data", num_train=12, num_val=4, image_size=(64, 64))
        whole = folder / "uninterrupted"
        process = start(command(data, whole, config=arguments.config), folder / "log", cache)
        if process.wait():
            print((folder / "log").read_text())
            return 1
        wanted = rows(whole)
        done = faults = number = 0
        while done < arguments.times:
            number += 1
            workdir, log = disk / f"run{number}", folder / "log"
            words = command(data, workdir, config=arguments.config)
            while True:
                process = start(words, log, cache, arguments.by == "tee")
                kind = MOMENTS[done % len(MOMENTS)]
                is_time = moment(kind, workdir, log, draw)
                if done >= arguments.times:
                    process.wait()
                    break
                if not wait_until(process, is_time):
                    break
                done += 1
                saved = whole_steps(workdir / "checkpoints")[-1:]
                again = functools.partial(start, words, folder / "log2", cache)
                what, wrong = disturb(arguments.by, process, again, disk, draw)
                left = whole_steps(workdir / "checkpoints")[-1:]
                if left < saved:
                    wrong.append(f"step {saved} is lost")
                if (text := log.read_text()).count("Traceback") or "loop is closed" in text:
                    wrong.append("a traceback")
                print(
                    f"{done}, {kind}: {what}; saved {saved}, then {left} {wrong or ''}", flush=True
                )
                if wrong:
                    faults += 1
                    print(text[-3000:])
            found = rows(workdir) if process.returncode == 0 else []
            is_equal = found == wanted
            faults += not is_equal
            print(f"run {number}: exit code {process.returncode}, equal: {is_equal}", flush=True)
            if not is_equal:
                print(log.read_text()[-3000:])
                pairs = zip(found, wanted, strict=False)
                print([pair for pair in pairs if pair[0] != pair[1]][:2])
            if arguments.by == "full":
                shutil.rmtree(workdir)
        time.sleep(5)  # processes that read images notice within seconds that they are alone
        left = processes_of(folder)
        if arguments.by == "full":
            subprocess.check_call(["umount", str(disk)])
        print(
            f"{arguments.by} {done} times, {number} runs, {faults} faults; processes left: {left}"
        )
    return 1 if faults or left else 0


if __name__ == "__main__":
    sys.exit(main())
