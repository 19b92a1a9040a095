"""mmdetection's recipe: plain IAM, ResNet-50.

Command: python train.py --config mmdet_iam_r50 --init-from resnet50-19c8e357.pth
Hardware: mmdetection used 8 GPUs, batch 64, 8.7 GB; hours unknown, not yet trained with this code.
Expected AP: 32.9 on val2017, input 640; 44.3 FPS on an unnamed device; test-dev not published.
Table: mmdetection projects/SparseInst, R-50 (no weights published).
The stem is frozen, there is no warm-up, and objects with run-length masks are left out.
"""

from sparseinst_jax.configs import iam_r50


def get_config():
    """Return the recipe without warm-up, with a frozen stem, and with mmdetection's data."""
    config = iam_r50.get_config()
    config.data.update(dict(annotation_filter="mmdetection", resize_rule="mmdetection"))
    config.train.update(dict(warmup_steps=0, frozen_stages=1))
    return config
