"""G-IAM, PVTv2-B1.

Command: python train.py --config giam_pvt_b1 --init-from pvt_v2_b1.pth
Hardware: the original used 8 GPUs, batch 64; hours unknown, not yet trained with this code.
Expected AP: 35.3 on val2017, 36.0 on test-dev; input 640; 33.5 FPS on an RTX 2080 Ti, 48.9 on an
  RTX 3090.
Table: SparseInst model zoo, "SparseInst (G-IAM), PVTv2-B1".
"""

from ml_collections import ConfigDict

from sparseinst_jax.configs import base


def get_config():
    """Return the recipe with the PVTv2-B1 backbone."""
    config = base.get_config()
    backbone = dict(name="pvt", stage_depths=(2, 2, 2, 2), embed_dims=(64, 128, 320, 512))
    config.model.backbone = ConfigDict(dict(backbone, linear=False, drop_path=0.1))
    return config
