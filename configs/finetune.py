"""Your own data: a COCO json and a folder of images; short schedule, from trained weights.

Command: python train.py --config finetune --init-from giam_r50
  --config.data.train.images=DIR --config.data.train.annotations=train.json
  --config.data.val.images=DIR --config.data.val.annotations=val.json
From scratch (no weights): omit --init-from and set --config.model.backbone.norm=group_norm
  --config.train.learning_rate=5e-4 (up to 1e-3) --config.train.gradient_clip_norm=5, more steps:
  --config.train.num_steps=20000 --config.train.milestones="(15000, 18000)".
Few images: --config.train.frozen_stages=2, --config.train.early_stopping=4 (evaluations).
Less memory: --config.train.batch_size=8, which halves the rate and doubles the steps; or cut the
  same batch into parts: --config.train.micro_batches=4 (same result with frozen or group norm).
Smaller objects: raise data.train_sizes, train_max_size and eval_size together.
Hardware: one GPU; hours not measured. Expected AP: depends on the data.
Table: none.
"""

from sparseinst_jax.configs import base


def get_config():
    """Return the short schedule."""
    config = base.get_config()
    config.train.update(dict(batch_size=16, base_batch_size=16, num_steps=6000, learning_rate=5e-5))
    config.train.update(dict(warmup_steps=500, milestones=(4500, 5500)))
    config.train.update(dict(log_every=20, checkpoint_every=500))
    config.train.eval_every = 500
    config.data.update(dict(keep_empty=True, num_workers=4))
    return config
