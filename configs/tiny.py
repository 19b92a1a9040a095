"""For tests: runs in seconds on a CPU and learns nothing useful.

Command: python train.py --config tiny
Hardware: any. Expected AP: none. Table: none.
"""

from sparseinst_jax.configs import shapes


def get_config():
    """Return the demo's configuration, smaller."""
    config = shapes.get_config()
    config.model.backbone.width = 8
    config.model.update(dict(encoder_channels=16, decoder_channels=16, decoder_convs=1))
    config.model.update(dict(num_masks=10, kernel_dim=8))
    config.data.update(dict(train_sizes=(64,), train_max_size=96, eval_size=(64, 96)))
    config.data.num_workers = 0
    config.train.update(dict(batch_size=2, base_batch_size=2, num_steps=4, warmup_steps=2))
    config.train.update(dict(milestones=(3,), log_every=1, checkpoint_every=2, eval_every=0))
    return config
