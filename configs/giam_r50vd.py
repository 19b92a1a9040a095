"""G-IAM, ResNet-50-vd, without random crops.

Command: python train.py --config giam_r50vd --init-from resnet50d_ra2-464e36ba.pth
Hardware: the original used 8 GPUs, batch 64; hours unknown, not yet trained with this code.
Expected AP: none published; the original has this file but no row for it.
Table: none; sparse_inst_r50vd_giam.yaml of the original.
"""

from sparseinst_jax.configs import base


def get_config():
    """Return the recipe with the vd backbone."""
    config = base.get_config()
    config.model.backbone.variant = "d"
    return config
