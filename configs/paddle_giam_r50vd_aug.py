"""PaddleDetection's recipe: G-IAM, ResNet-50-vd, random crops.

Command: python train.py --config paddle_giam_r50vd_aug
  --init-from ResNet50_vd_pretrained.pdparams
Hardware: PaddleDetection used 8 GPUs, batch 64; hours unknown, not yet trained with this code.
Expected AP: 34.3 on val2017, input 640; test-dev and FPS not published.
Table: PaddleDetection, sparseinst_r50vd_giam_150e_coco_aug.
"""

from sparseinst_jax.configs import paddle_giam_r50_aug


def get_config():
    """Return the recipe with the vd backbone."""
    config = paddle_giam_r50_aug.get_config()
    config.model.backbone.variant = "d"
    return config
