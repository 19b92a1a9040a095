"""FastInst with one decoder layer, ResNet-50-d with deformable res4 and res5.

Command: python train.py --config fastinst_r50vd_dcn_x1 --init-from resnet50d_ra2-464e36ba.pth
Hardware: the original used 4 V100, batch 16, float16; hours unknown, not yet trained with this
  code.
Expected AP: 37.4 on val2017, 38.0 on test-dev; 47.8 FPS on a V100, input 576; 30 M parameters.
Table: FastInst model zoo, "FastInst-D1, R50-d-DCN".
"""

from sparseinst_jax.configs import fastinst_base


def get_config():
    """Return the recipe with the deep stem and deformable convolutions."""
    config = fastinst_base.get_config()
    config.model.backbone.variant = "d"
    config.model.backbone.deformable_stages = ("res4", "res5")
    return config
