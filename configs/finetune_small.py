"""Your own data without a GPU: a small network from random weights; minutes on two CPU cores.

Command: sparseinst train --config finetune_small --workdir runs/mine
  --config.data.train.images=DIR --config.data.train.annotations=train.json
  --config.data.val.images=DIR --config.data.val.annotations=val.json
Hardware: 2 CPU cores; docs/own_data.md has times and APs of two data sets.
More photos or finer masks: more steps, --config.train.num_steps=6000
  --config.train.milestones="(4500, 5500)", then larger images (data.eval_size, train_sizes and
  train_max_size together) and a wider network (model.backbone.width=16).
Table: none, there is no published counterpart.
"""

from sparseinst_jax.configs import finetune


def get_config():
    """Return the short schedule with a small network."""
    config = finetune.get_config()
    config.model.backbone.update(dict(stage_depths=(1, 1, 1, 1), width=8, norm="batch_norm"))
    config.model.update(dict(encoder_channels=48, decoder_channels=48, decoder_convs=2))
    config.model.update(dict(num_masks=50, kernel_dim=32))
    config.data.update(dict(train_sizes=(320,), train_max_size=427, eval_size=(320, 427)))
    config.data.num_workers = 1
    config.train.update(dict(batch_size=4, base_batch_size=4, num_steps=1000, eval_every=500))
    config.train.update(dict(learning_rate=1e-3, warmup_steps=100, milestones=(700, 900)))
    config.train.update(dict(gradient_clip_norm=5.0, checkpoint_every=250))
    return config
