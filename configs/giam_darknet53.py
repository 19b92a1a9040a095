"""G-IAM, DarkNet-53.

Command: python train.py --config configs/giam_darknet53.py
Hardware: the original used 8 GPUs, batch 64; not run to the end with this code.
Expected AP: none published; a file of the original's without a row in its table.
Table: none; sparse_inst_darknet53_giam.yaml of the original.
The original's file names no pretrained weights, either.
"""

from ml_collections import ConfigDict

from sparseinst_jax.configs import base


def get_config():
    """Return the recipe with the DarkNet-53 backbone."""
    config = base.get_config()
    backbone = dict(name="cspdarknet", cross_stage=False, stage_depths=(1, 2, 8, 8, 4), width=32)
    config.model.backbone = ConfigDict(dict(backbone, norm="batch_norm"))
    return config
