"""G-IAM, ResNet-50, mixed precision.

Command: python train.py --config giam_r50_bf16 --init-from resnet50-19c8e357.pth
Hardware: with FP16 the original took 0.695 s a step and 3.9 GB (0.869 s and 6.0 GB without) on
  RTX 3090, which is 52 hours for 270 000 steps. Not yet trained with this code.
Expected AP: that of giam_r50; none published for FP16. Original: 52.17 to 67.57 FPS on an RTX 3090.
Table: SparseInst model zoo, "SparseInst with FP16".
The original uses float16 with loss scaling and a float32 matcher. Here: bfloat16, which needs no
scaling; weights, optimizer, normalisers, matching and losses stay float32 (docs/gpu.md).
"""

from sparseinst_jax.configs import giam_r50


def get_config():
    """Return the recipe computed in bfloat16."""
    config = giam_r50.get_config()
    config.model.dtype = "bfloat16"
    return config
