"""G-IAM, ResNet-50-vd with deformable res4 and res5, random crops: the paper's best.

Command: python train.py --config giam_r50vd_dcn_aug
  --init-from resnet50d_ra2-464e36ba.pth
Hardware: the original used 8 GPUs, batch 64; hours unknown, not yet trained with this code.
Expected AP: 37.4 on val2017, 37.9 on test-dev; 40.0 FPS on an RTX 2080 Ti, input 608.
  At 640: 37.7 on val2017, 38.1 on test-dev; 39.3 FPS.
Table: SparseInst model zoo, "SparseInst (G-IAM), R-50-vd-DCN", aug, at 608 and at 640.
For the second row use eval.py with --config.data.eval_size="(640, 853)" and the same weights.
"""

from sparseinst_jax.configs import giam_r50vd_aug


def get_config():
    """Return the recipe with random crops, the vd backbone and deformable convolutions."""
    config = giam_r50vd_aug.get_config()
    config.model.backbone.deformable_stages = ("res4", "res5")
    return config
