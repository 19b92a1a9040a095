"""PaddleDetection's recipe: plain IAM, ResNet-50.

Command: python train.py --config paddle_iam_r50
  --init-from ResNet50_vb_normal_pretrained.pdparams
Hardware: PaddleDetection used 8 GPUs, batch 64; hours unknown, not yet trained with this code.
Expected AP: 32.2 on val2017, input 640; test-dev and FPS not published.
Table: PaddleDetection, sparseinst_r50_150e_coco.
150 epochs of 117266 images in batches of 64: 1832 steps each; the rate falls after 115 and 136.
The table comes from a different evaluation: --config.eval.protocol=paddledetection reproduces it.
"""

from sparseinst_jax.configs import iam_r50


def get_config():
    """Return the recipe with PaddleDetection's schedule, resizing and frozen stem and res2."""
    config = iam_r50.get_config()
    config.data.update(dict(resize_rule="paddledetection", annotation_filter="paddledetection"))
    config.train.update(dict(num_steps=150 * 1832, milestones=(115 * 1832, 136 * 1832)))
    config.train.frozen_stages = 2
    return config
