"""Train a tiny network for 500 steps on 4 virtual devices, ten times over: does any run hang?

Collectives on more virtual devices than cores have hung in some versions of JAX, seldom and without
a message. Each run is a process of its own with a time-out; the last losses must be equal, too.

    taskset -c 0,1 nice python benchmarks/many_steps.py
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sparseinst_jax.data.shapes import draw_shapes_dataset
from sparseinst_jax.training.progress import read_metrics

ROOT = Path(__file__).parents[1]


def main() -> int:
    """Run and print a line for each run; the exit code is 1 if one hung, failed or differed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--timeout", type=float, default=900, help="seconds until a run has hung")
    arguments = parser.parse_args()
    print(f"cores {len(os.sched_getaffinity(0))}, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        data = draw_shapes_dataset(
            Path(folder) / "shapes", num_train=16, num_val=5, seed=1, image_size=(64, 64)
        )
        outcomes = [
            run(data, Path(folder) / f"run_{number}", arguments) for number in range(arguments.runs)
        ]
    return int(any(outcome != outcomes[0] or outcome is None for outcome in outcomes))


def run(data: Path, workdir: Path, arguments: argparse.Namespace) -> float | None:
    """Train once, with two evaluations; the last loss, or None."""
    values = {
        "batch_size": arguments.devices,
        "base_batch_size": arguments.devices,
        "num_steps": arguments.steps,
        "checkpoint_every": 100,
        "eval_every": -(-arguments.steps // 2),
        "log_every": 10,
    }
    command = [sys.executable, str(ROOT / "train.py"), f"--workdir={workdir}"]
    command += [f"--config={ROOT / 'configs' / 'tiny.py'}"]
    command += [f"--config.train.{name}={value}" for name, value in values.items()]
    for split in ("train", "val"):
        command.append(f"--config.data.{split}.images={data / 'images' / split}")
        command.append(f"--config.data.{split}.annotations={data / split}.json")
    flags = f"--xla_force_host_platform_device_count={arguments.devices}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    started = time.monotonic()
    try:
        done = subprocess.run(
            command, env=environment, timeout=arguments.timeout, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired:
        print(f"{workdir.name}: HUNG, ended after {arguments.timeout:.0f} s", flush=True)
        return None
    seconds = time.monotonic() - started
    if done.returncode:
        print(f"{workdir.name}: exit code {done.returncode}\n{done.stderr[-2000:]}", flush=True)
        return None
    rows = read_metrics(workdir / "metrics.csv")
    print(
        f"{workdir.name}: {len(rows)} steps in {seconds:.0f} s, last loss"
        f" {rows[-1]['loss/total']:.9g}, load {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    return rows[-1]["loss/total"] if len(rows) == arguments.steps else None


if __name__ == "__main__":
    sys.exit(main())
