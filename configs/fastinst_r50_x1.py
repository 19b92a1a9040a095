"""FastInst with one decoder layer, ResNet-50: the fastest published row.

Command: python train.py --config fastinst_r50_x1 --init-from resnet50-19c8e357.pth
Hardware: the original used 4 V100, batch 16, float16; hours unknown, not yet trained with this
  code.
Expected AP: 34.9 on val2017, 35.6 on test-dev; 53.8 FPS on a V100, input 576; 30 M parameters.
Table: FastInst model zoo, "FastInst-D1, R50".
"""

from sparseinst_jax.configs import fastinst_base


def get_config():
    """Return the published recipe."""
    return fastinst_base.get_config()
