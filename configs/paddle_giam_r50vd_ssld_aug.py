"""PaddleDetection's recipe: G-IAM, ResNet-50-vd from SSLD weights, crops, averaged weights.

Command: python train.py --config configs/paddle_giam_r50vd_ssld_aug.py
  --init-from ResNet50_vd_ssld_v2_pretrained.pdparams
Hardware: PaddleDetection used 8 GPUs, batch 64; not run to the end with this code.
Expected AP: 36.4 on val2017, input 640; without test-dev and FPS.
Table: PaddleDetection, sparseinst_r50vd_ssld_giam_150_coco_aug.
The published file holds the moving average. Rates fall after 114 and 137 epochs in this row alone.
"""

from sparseinst_jax.configs import paddle_giam_r50vd_aug


def get_config():
    """Return the recipe with a moving average and other milestones."""
    config = paddle_giam_r50vd_aug.get_config()
    config.train.ema_decay = 0.9998
    config.train.milestones = (114 * 1832, 137 * 1832)
    return config
