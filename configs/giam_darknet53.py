"""G-IAM, DarkNet-53.

Command: python train.py --config giam_darknet53
Hardware: the original used 8 GPUs, batch 64; hours unknown, not yet trained with this code.
Expected AP: none published; the original has this file but no row for it.
Table: none; sparse_inst_darknet53_giam.yaml of the original.
The original's file names no pretrained weights either.
"""

from ml_collections import ConfigDict

from sparseinst_jax.configs import base


def get_config():
    """Return the recipe with the DarkNet-53 backbone."""
    config = base.get_config()
    backbone = dict(name="cspdarknet", cross_stage=False, stage_depths=(1, 2, 8, 8, 4), width=32)
    config.model.backbone = ConfigDict(dict(backbone, norm="batch_norm"))
    return config
