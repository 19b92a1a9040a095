"""G-IAM with softmax maps, ResNet-50 (33.6 AP on val2017).

Command: python train.py --config configs/giam_softmax_r50.py --init-from r50.npz
Hardware: as giam_r50; not run to the end with this code.
Table: SparseInst model zoo, row "G-IAM (softmax) R-50".
"""

from configs import base


def get_config():
    """Return the recipe with maps normalised by a softmax over the image."""
    config = base.get_config()
    config.model.normalizer = "softmax"
    return config
