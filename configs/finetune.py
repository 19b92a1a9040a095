"""Your own data: a COCO json and a folder of images, from trained weights, a short schedule.

Command: python train.py --config configs/finetune.py --init-from WEIGHTS
  --config.data.train.images=DIR --config.data.train.annotations=train.json
  --config.data.val.images=DIR --config.data.val.annotations=val.json
Without weights: --config.model.backbone.norm=group_norm and many more steps.
Less memory: --config.train.batch_size=8 with learning_rate and num_steps to suit, or keep the batch
  and cut it: --config.train.micro_batches=4 (the same result for frozen and group norm).
Smaller objects: raise data.train_sizes, train_max_size and eval_size together.
Hardware: one GPU; hours not measured. Expected AP: depends on the data.
Table: none.
"""

from configs import base


def get_config():
    """Return the short schedule."""
    config = base.get_config()
    config.train.update(dict(batch_size=16, base_batch_size=16, num_steps=6000, learning_rate=5e-5))
    config.train.update(dict(warmup_steps=500, milestones=(4500, 5500)))
    config.train.update(dict(log_every=20, checkpoint_every=500))
    config.train.eval_every = 500
    config.data.update(dict(keep_empty=True, num_workers=4))
    return config
