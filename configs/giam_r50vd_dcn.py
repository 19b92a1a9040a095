"""G-IAM, ResNet-50-vd with deformable res4 and res5, without random crops.

Command: python train.py --config giam_r50vd_dcn --init-from resnet50d_ra2-464e36ba.pth
Hardware: the original used 8 GPUs, batch 64; hours unknown, not yet trained with this code.
Expected AP: none published; the original has this file but no row for it.
Table: none; sparse_inst_r50vd_dcn_giam.yaml of the original.
"""

from sparseinst_jax.configs import giam_r50vd


def get_config():
    """Return the recipe with the vd backbone and deformable convolutions."""
    config = giam_r50vd.get_config()
    config.model.backbone.deformable_stages = ("res4", "res5")
    return config
