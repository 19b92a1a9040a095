"""FastInst with three decoder layers, ResNet-101.

Command: python train.py --config fastinst_r101_x3 --init-from resnet101-63fe2227.pth
Hardware: the original used 4 V100, batch 16, float16; hours unknown, not yet trained with this
  code.
Expected AP: 38.9 on val2017, 39.9 on test-dev; 28.0 FPS on a V100, input 640; 53 M parameters.
Table: FastInst model zoo, "FastInst-D3, R101".
"""

from sparseinst_jax.configs import fastinst_r50_x3


def get_config():
    """Return the recipe with 23 blocks in res4."""
    config = fastinst_r50_x3.get_config()
    config.model.backbone.stage_depths = (3, 4, 23, 3)
    return config
