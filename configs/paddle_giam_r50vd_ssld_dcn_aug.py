"""PaddleDetection's recipe: as paddle_giam_r50vd_ssld_aug, with modulated deformable convolutions.

Command: python train.py --config paddle_giam_r50vd_ssld_dcn_aug
  --init-from ResNet50_vd_ssld_v2_pretrained.pdparams
Hardware: PaddleDetection used 8 GPUs, batch 64; hours unknown, not yet trained with this code.
Expected AP: 37.9 on val2017, input 640; test-dev and FPS not published.
Table: PaddleDetection, sparseinst_r50vd_ssld_dcn_giam_150e_coco_aug.
The published file holds the moving average of the weights.
"""

from sparseinst_jax.configs import paddle_giam_r50vd_aug


def get_config():
    """Return the recipe with a moving average and modulated deformable res3, res4 and res5."""
    config = paddle_giam_r50vd_aug.get_config()
    config.train.ema_decay = 0.9998
    deformable = dict(deformable_stages=("res3", "res4", "res5"), modulated=True)
    config.model.backbone.update(deformable)
    return config
