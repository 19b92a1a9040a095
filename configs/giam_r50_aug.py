"""G-IAM, ResNet-50, with random crops.

Command: python train.py --config giam_r50_aug --init-from resnet50-19c8e357.pth
Hardware: the original used 8 GPUs, batch 64; hours unknown, not yet trained with this code.
Expected AP: 34.2 on val2017, 34.7 on test-dev; 44.6 FPS on an RTX 2080 Ti, input 608.
Table: SparseInst model zoo, "SparseInst (G-IAM), R-50", aug.
"""

from sparseinst_jax.configs import giam_r50


def get_config():
    """Return the recipe with a crop of 384 to 600 pixels before half of the resizes."""
    config = giam_r50.get_config()
    config.data.augmentation = "flip_resize_crop"
    return config
