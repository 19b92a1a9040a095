"""FastInst with three decoder layers, ResNet-50-d with deformable res4 and res5.

Command: python train.py --config fastinst_r50vd_dcn_x3 --init-from resnet50d_ra2-464e36ba.pth
Hardware: the original used 4 V100, batch 16, float16; hours unknown, not yet trained with this
  code.
Expected AP: 40.1 on val2017, 40.5 on test-dev; 32.5 FPS on a V100, input 640; 35 M parameters.
Table: FastInst model zoo, "FastInst-D3, R50-d-DCN".
"""

from sparseinst_jax.configs import fastinst_r50_x3


def get_config():
    """Return the recipe with the deep stem and deformable convolutions."""
    config = fastinst_r50_x3.get_config()
    config.model.backbone.variant = "d"
    config.model.backbone.deformable_stages = ("res4", "res5")
    return config
