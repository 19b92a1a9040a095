"""G-IAM, ResNet-50, mixed precision.

Command: python train.py --config configs/giam_r50_bf16.py --init-from resnet50-19c8e357.pth
Hardware: the original took 0.695 s a step and 3.9 GB with FP16 (0.869 s and 6.0 GB without)
  on RTX 3090; not run to the end with this code.
Expected AP: that of giam_r50; none published for FP16. Original: 52.17 to 67.57 FPS on an RTX 3090.
Table: SparseInst model zoo, "SparseInst with FP16".
The original: float16 with loss scaling, matcher in float32. Here: bfloat16 (the exponent of
float32, so nothing is scaled); weights, optimizer, normalisers, matching and losses float32.
"""

from sparseinst_jax.configs import giam_r50


def get_config():
    """Return the recipe computed in bfloat16."""
    config = giam_r50.get_config()
    config.model.dtype = "bfloat16"
    return config
