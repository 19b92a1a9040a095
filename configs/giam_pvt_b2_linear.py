"""G-IAM, PVTv2-B2 with linear attention.

Command: python train.py --config giam_pvt_b2_linear --init-from pvt_v2_b2_li.pth
Hardware: the original used 8 GPUs, batch 64; hours unknown, not yet trained with this code.
Expected AP: 37.2 on val2017, 38.2 on test-dev; 26.5 FPS on an RTX 2080 Ti, input 640.
Table: SparseInst model zoo, "SparseInst (G-IAM), PVTv2-B2-li".
"""

from ml_collections import ConfigDict

from sparseinst_jax.configs import base


def get_config():
    """Return the recipe with the PVTv2-B2-linear backbone."""
    config = base.get_config()
    backbone = dict(name="pvt", stage_depths=(3, 4, 6, 3), embed_dims=(64, 128, 320, 512))
    config.model.backbone = ConfigDict(dict(backbone, linear=True, drop_path=0.1))
    return config
