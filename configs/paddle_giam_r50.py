"""PaddleDetection's recipe: G-IAM, ResNet-50.

Command: python train.py --config paddle_giam_r50
  --init-from ResNet50_vb_normal_pretrained.pdparams
Hardware: PaddleDetection used 8 GPUs, batch 64; hours unknown, not yet trained with this code.
Expected AP: 32.7 on val2017, input 640; test-dev and FPS not published.
Table: PaddleDetection, sparseinst_r50_giam_150e_coco.
"""

from sparseinst_jax.configs import paddle_iam_r50


def get_config():
    """Return the recipe with four groups."""
    config = paddle_iam_r50.get_config()
    config.model.num_groups = 4
    return config
