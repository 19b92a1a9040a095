"""G-IAM, ResNet-50 with deformable res4 and res5, random crops.

Command: python train.py --config giam_r50_dcn_aug --init-from resnet50-19c8e357.pth
Hardware: the original used 8 GPUs, batch 64; hours unknown, not yet trained with this code.
Expected AP: 36.4 on val2017, 36.8 on test-dev; 41.6 FPS on an RTX 2080 Ti, input 608.
Table: SparseInst model zoo, "SparseInst (G-IAM), R-50-DCN", aug.
"""

from sparseinst_jax.configs import giam_r50_aug


def get_config():
    """Return the recipe with deformable convolutions."""
    config = giam_r50_aug.get_config()
    config.model.backbone.deformable_stages = ("res4", "res5")
    return config
