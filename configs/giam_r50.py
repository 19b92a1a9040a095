"""G-IAM, ResNet-50: the paper's main model.

Command: python train.py --config giam_r50 --init-from resnet50-19c8e357.pth
Hardware: the original used 8 GPUs, batch 64; on RTX 3090 0.869 s a step and 6.0 GB each, which is
  65 hours for 270 000 steps. Not yet trained with this code.
Expected AP: 33.4 on val2017, 34.0 on test-dev; 44.6 FPS on an RTX 2080 Ti, input 608.
Table: SparseInst model zoo, "SparseInst (G-IAM), R-50".
The table's row is for a short side of 608, which is set here; the original's file says 640.
"""

from sparseinst_jax.configs import base


def get_config():
    """Return the published recipe, evaluated at the table's size."""
    config = base.get_config()
    config.data.eval_size = (608, 853)
    return config
