"""The demo: drawn shapes and a small network from random weights; minutes on two CPU cores.

Command: python train.py --config shapes   (draws its data if missing)
Hardware: 2 CPU cores; docs/performance.md has the time and the limits. Expected AP: 58.6.
Table: none, there is no published counterpart.
Classes are learned last, so their loss counts double. Gradients are clipped, because with random
weights and a small batch the first ones are very long.
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
