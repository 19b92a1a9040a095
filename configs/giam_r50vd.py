"""G-IAM, ResNet-50-vd, without random crops.

Command: python train.py --config configs/giam_r50vd.py --init-from resnet50d_ra2-464e36ba.pth
Hardware: the original used 8 GPUs, batch 64; not run to the end with this code.
Expected AP: none published; a file of the original's without a row in its table.
Table: none; sparse_inst_r50vd_giam.yaml of the original.
"""

from sparseinst_jax.configs import base


def get_config():
    """Return the recipe with the vd backbone."""
    config = base.get_config()
    config.model.backbone.variant = "d"
    return config
