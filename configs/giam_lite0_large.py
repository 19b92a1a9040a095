"""G-IAM, EfficientNet-Lite0, for 416 pixels: finer masks at less than half of the speed.

Command: python train.py --config giam_lite0_large --init-from efficientnet-lite0-57934424.pth
Hardware: COCO's schedule needs a GPU; hours unknown, not trained.
Expected AP: not measured. docs/zoo.md has the speed of the network.
Table: none, there is no published counterpart.
"""

from sparseinst_jax.configs import giam_lite0


def get_config():
    """Return the recipe with twice the channels and masks."""
    config = giam_lite0.get_config()
    config.model.update(dict(encoder_channels=128, decoder_channels=128, decoder_convs=3))
    config.model.update(dict(num_masks=100, kernel_dim=64))
    config.data.update(dict(train_sizes=(352, 384, 416), train_max_size=555, eval_size=(416, 555)))
    return config
