"""PaddleDetection's recipe: G-IAM, ResNet-50, random crops.

Command: python train.py --config paddle_giam_r50_aug
  --init-from ResNet50_vb_normal_pretrained.pdparams
Hardware: PaddleDetection used 8 GPUs, batch 64; hours unknown, not yet trained with this code.
Expected AP: 33.3 on val2017, input 640; test-dev and FPS not published.
Table: PaddleDetection, sparseinst_r50_giam_150e_coco_aug.
"""

from sparseinst_jax.configs import paddle_iam_r50_aug


def get_config():
    """Return the recipe with four groups and random crops."""
    config = paddle_iam_r50_aug.get_config()
    config.model.num_groups = 4
    return config
