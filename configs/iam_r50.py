"""Plain IAM, ResNet-50: one map per object.

Command: python train.py --config iam_r50 --init-from resnet50-19c8e357.pth
Hardware: the original used 8 GPUs, batch 64; hours unknown, not yet trained with this code.
Expected AP: 32.8 on val2017, 33.2 on test-dev; 44.3 FPS on an RTX 2080 Ti, input 640.
Table: SparseInst model zoo, "SparseInst, R-50".
"""

from sparseinst_jax.configs import base


def get_config():
    """Return the recipe with one group."""
    config = base.get_config()
    config.model.num_groups = 1
    return config
