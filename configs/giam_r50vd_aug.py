"""G-IAM, ResNet-50-vd, with random crops.

Command: python train.py --config giam_r50vd_aug --init-from resnet50d_ra2-464e36ba.pth
Hardware: the original used 8 GPUs, batch 64; hours unknown, not yet trained with this code.
Expected AP: 35.6 on val2017, 36.1 on test-dev; 42.8 FPS on an RTX 2080 Ti, input 608.
Table: SparseInst model zoo, "SparseInst (G-IAM), R-50-vd", aug.
"""

from sparseinst_jax.configs import giam_r50_aug


def get_config():
    """Return the recipe with random crops and the vd backbone."""
    config = giam_r50_aug.get_config()
    config.model.backbone.variant = "d"
    return config
