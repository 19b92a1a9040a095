"""G-IAM, ResNet-50: the paper's main model (33.4 AP on val2017 at 608, 34.0 on test-dev).

Command: python train.py --config configs/giam_r50.py --init-from r50.npz
Hardware: the original took 0.869 s a step and 6.0 GB on an RTX 3090;
  not run to the end with this code.
Table: SparseInst model zoo, row "G-IAM R-50".
"""

from configs import base


def get_config():
    """Return the published recipe unchanged."""
    return base.get_config()
