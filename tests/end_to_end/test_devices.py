"""Two virtual devices against one, in a process of its own: devices are fixed when jax starts."""

import os
import subprocess
import sys

# Collectives wait inside the thread pool (see CONTRIBUTING.md).
THREADS = {"PJRT_NPROC": "32", "NPROC": "32"}
PROGRAM = """
import jax

jax.config.update("jax_num_cpu_devices", 2)

import numpy as np
import optax

from sparseinst_jax.checkpoints.state import TrainState
from sparseinst_jax.data.batch import Batch
from sparseinst_jax.models.backbones.resnet import ResNet
from sparseinst_jax.models.trees import functional
from sparseinst_jax.models.sparseinst.model import SparseInst
from sparseinst_jax.models.sparseinst.objective import SparseInstObjective
from sparseinst_jax.training.step import TrainStep

rng = np.random.default_rng(0)
batch = Batch(
    images=rng.integers(0, 256, (4, 32, 32, 3)).astype(np.uint8),
    valid_size=np.full((4, 2), [32, 30], np.int32),
    labels=rng.integers(0, 2, (4, 4)).astype(np.int32),
    masks=rng.integers(0, 5, (4, 4, 8, 8)).astype(np.uint8),
    # 1 and 2 objects on the first device, 4 and none on the second: a mean of means would differ.
    is_target=np.arange(4) < np.array([1, 2, 4, 0])[:, None],
    image_id=np.arange(4),
)


def run(devices):
    rng = np.random.default_rng(1)
    backbone = ResNet(stage_depths=(1, 1, 1, 1), width=4, norm="batch_norm", rng=rng)
    model = SparseInst(
        backbone, num_classes=2, encoder_channels=8, decoder_channels=8, decoder_convs=1,
        num_masks=5, num_groups=1, kernel_dim=4, rng=rng,
    )
    apply, params, statistics = functional(model)
    optimizer = optax.sgd(1e-2)
    step = TrainStep(SparseInstObjective(apply, 5), optimizer, devices=devices)
    state = step.place(TrainState(np.int32(0), params, statistics, optimizer.init(params)))
    losses = []
    for _ in range(3):
        state, metrics = step(state, batch)
        jax.block_until_ready(state)
        losses.append(float(metrics["loss/total"][0]))
    return losses, step.fetch(state)


assert len(jax.local_devices()) == 2
one_losses, one = run(jax.local_devices()[:1])
two_losses, two = run(jax.local_devices())
np.testing.assert_allclose(one_losses, two_losses, rtol=1e-4)
for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
    np.testing.assert_allclose(left, right, rtol=1e-3, atol=1e-5)
print("equal", one_losses)
"""


def test_two_devices_train_as_one_with_batch_norm_and_uneven_objects():
    environment = os.environ | THREADS
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("equal")
