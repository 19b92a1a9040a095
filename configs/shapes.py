"""The demo: drawn shapes, a small network from random weights, minutes on two CPU cores.

Command: python train.py --config configs/shapes.py   (draws its data when it is missing)
Hardware: 2 CPU cores, about 8 minutes. Expected: mask AP 0.50 or more on the drawn val images.
Table: none; no published counterpart.
"""

from configs import base


def get_config():
    """Return the demo's configuration."""
    config = base.get_config()
    backbone = dict(stage_depths=(1, 1, 1, 1), width=16, norm="batch_norm")
    config.model.update(dict(backbone=backbone, encoder_channels=64, decoder_channels=64))
    config.model.update(dict(num_masks=20, kernel_dim=32))
    config.data.update(dict(generator="shapes", train_sizes=(128,), train_max_size=213))
    config.data.update(dict(eval_size=(128, 213), keep_empty=True, num_workers=1))
    for split in ("train", "val"):
        config.data[split].images = f"datasets/shapes/images/{split}"
        config.data[split].annotations = f"datasets/shapes/{split}.json"
    config.train.update(dict(batch_size=16, num_steps=600, learning_rate=1e-3, warmup_steps=50))
    config.train.update(dict(milestones=(450, 550), log_every=10, checkpoint_every=200))
    config.train.eval_every = 200
    return config
