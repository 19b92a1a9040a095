"""Train a tiny network for 500 steps on 4 virtual devices, ten times over: does any run hang?

Collectives on more virtual devices than cores have hung in some versions of JAX, seldom and without
a message. Each run is a process of its own with a time-out; the last losses must be equal, too.

    taskset -c 0,1 nice python benchmarks/many_steps.py [SECONDS UNTIL A RUN HAS HUNG]
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sparseinst_jax.data.shapes import draw_shapes_dataset
from sparseinst_jax.training.progress import read_metrics

ROOT = Path(__file__).parents[1]
RUNS, STEPS, DEVICES = 10, 500, 4


def run(data: Path, workdir: Path, timeout: float) -> float:
    """Train once, with two evaluations and five saves; returns the last loss."""
    values = {"batch_size": DEVICES, "base_batch_size": DEVICES, "num_steps": STEPS}
    values |= {"checkpoint_every": 100, "eval_every": STEPS // 2, "log_every": 10}
    command = [sys.executable, str(ROOT / "train.py"), f"--workdir={workdir}", "--config=tiny"]
    command += [f"--config.train.{name}={value}" for name, value in values.items()]
    for split in ("train", "val"):
        command.append(f"--config.data.{split}.images={data / 'images' / split}")
        command.append(f"--config.data.{split}.annotations={data / split}.json")
    flags = f"--xla_force_host_platform_device_count={DEVICES}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    start = time.monotonic()
    subprocess.run(command, env=environment, timeout=timeout, check=True, stdout=subprocess.DEVNULL)
    (*_, last) = read_metrics(workdir / "metrics.csv")
    assert last["step"] == STEPS
    seconds, load, loss = time.monotonic() - start, os.getloadavg()[0], last["loss/total"]
    print(f"{workdir.name}: {seconds:.0f} s, last loss {loss:.9g}, load {load:.1f}", flush=True)
    return loss


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        folder, timeout = Path(name), float(sys.argv[1] if sys.argv[1:] else 900)
        sizes: dict = {"num_train": 16, "num_val": 5, "seed": 1, "image_size": (64, 64)}
        shapes = draw_shapes_dataset(folder / "shapes", **sizes)
        losses = {run(shapes, folder / f"run_{number}", timeout) for number in range(RUNS)}
    sys.exit(len(losses) > 1)
