"""G-IAM, ResNet-101.

Command: python train.py --config giam_r101 --init-from resnet101-63fe2227.pth
Hardware: the original used 8 GPUs, batch 64; hours unknown, not yet trained with this code.
Expected AP: 34.9 on val2017, 35.5 on test-dev; FPS not published, input 640.
Table: SparseInst model zoo, "SparseInst (G-IAM), R-101".
"""

from sparseinst_jax.configs import base


def get_config():
    """Return the recipe with 23 blocks in res4."""
    config = base.get_config()
    config.model.backbone.stage_depths = (3, 4, 23, 3)
    return config
