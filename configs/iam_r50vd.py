"""Plain IAM, ResNet-50-vd: deep stem, average-pooled shortcuts.

Command: python train.py --config iam_r50vd --init-from resnet50d_ra2-464e36ba.pth
Hardware: the original used 8 GPUs, batch 64; hours unknown, not yet trained with this code.
Expected AP: 34.1 on val2017, 34.5 on test-dev; 42.6 FPS on an RTX 2080 Ti, input 640.
Table: SparseInst model zoo, "SparseInst, R-50-vd".
"""

from sparseinst_jax.configs import iam_r50


def get_config():
    """Return the recipe with one group and the vd backbone."""
    config = iam_r50.get_config()
    config.model.backbone.variant = "d"
    return config
