"""Plain IAM, ResNet-50: one map per object (32.8 AP on val2017 at 640, 33.2 on test-dev).

Command: python train.py --config configs/iam_r50.py --init-from r50.npz
Hardware: as giam_r50; not run to the end with this code.
Table: SparseInst model zoo, row "IAM R-50".
"""

from configs import base


def get_config():
    """Return the recipe with one group."""
    config = base.get_config()
    config.model.num_groups = 1
    return config
