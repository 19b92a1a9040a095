"""PaddleDetection's recipe: G-IAM, ResNet-50-vd from SSLD weights, crops, averaged weights.

Command: python train.py --config paddle_giam_r50vd_ssld_aug
  --init-from ResNet50_vd_ssld_v2_pretrained.pdparams
Hardware: PaddleDetection used 8 GPUs, batch 64; hours unknown, not yet trained with this code.
Expected AP: 36.4 on val2017, input 640; test-dev and FPS not published.
Table: PaddleDetection, sparseinst_r50vd_ssld_giam_150_coco_aug.
The published file holds the moving average. Only in this row the rate falls after epochs 114, 137.
"""

from sparseinst_jax.configs import paddle_giam_r50vd_aug


def get_config():
    """Return the recipe with a moving average and other milestones."""
    config = paddle_giam_r50vd_aug.get_config()
    config.train.ema_decay = 0.9998
    config.train.milestones = (114 * 1832, 137 * 1832)
    return config
