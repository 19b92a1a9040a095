"""G-IAM with softmax maps, ResNet-50.

Command: python train.py --config giam_softmax_r50 --init-from resnet50-19c8e357.pth
Hardware: the original used 8 GPUs, batch 64; hours unknown, not yet trained with this code.
Expected AP: 33.6 on val2017; test-dev not published; 44.6 FPS on an RTX 2080 Ti, input 608.
Table: SparseInst model zoo, "SparseInst (G-IAM, Softmax), R-50".
"""

from sparseinst_jax.configs import giam_r50


def get_config():
    """Return the recipe with maps normalised by a softmax over the image."""
    config = giam_r50.get_config()
    config.model.normalizer = "softmax"
    return config
