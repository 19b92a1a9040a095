"""G-IAM, ResNet-101 with deformable res4 and res5.

Command: python train.py --config giam_r101_dcn --init-from resnet101-63fe2227.pth
Hardware: the original used 8 GPUs, batch 64; hours unknown, not yet trained with this code.
Expected AP: 36.4 on val2017, 36.9 on test-dev; FPS not published, input 640.
Table: SparseInst model zoo, "SparseInst (G-IAM), R-101-DCN".
"""

from sparseinst_jax.configs import giam_r101


def get_config():
    """Return the recipe with 23 blocks in res4 and deformable convolutions."""
    config = giam_r101.get_config()
    config.model.backbone.deformable_stages = ("res4", "res5")
    return config
