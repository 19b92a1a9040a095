"""The demo: drawn shapes, a small network from random weights, minutes on two CPU cores.

Command: python train.py --config configs/shapes.py   (draws its data when it is missing)
Hardware: 2 CPU cores, 12 minutes. Expected AP: 0.59 (docs/performance.md says what limits it).
Table: none; no published counterpart.
The classes are learned last: their loss counts double. A small batch of random weights is clipped.
"""

from sparseinst_jax.configs import base


def get_config():
    """Return the demo's configuration."""
    config = base.get_config()
    backbone = dict(stage_depths=(1, 1, 1, 1), width=8, norm="batch_norm")
    config.model.update(dict(backbone=backbone, encoder_channels=32, decoder_channels=32))
    config.model.update(dict(decoder_convs=2, num_masks=10, kernel_dim=32))
    config.update(dict(objective=dict(class_weight=4.0), train=dict(gradient_clip_norm=5.0)))
    config.data.update(dict(generator="shapes", train_sizes=(128,), train_max_size=160))
    config.data.update(dict(eval_size=(128, 160), keep_empty=True, num_workers=0))
    for split in ("train", "val"):
        config.data[split].images = f"datasets/shapes/images/{split}"
        config.data[split].annotations = f"datasets/shapes/{split}.json"
    config.train.update(dict(batch_size=8, base_batch_size=8, num_steps=8400, eval_every=2100))
    config.train.update(dict(learning_rate=1.5e-3, warmup_steps=200, milestones=(5600, 7600)))
    return config
