"""FastInst with one decoder layer, EfficientNet-Lite0, narrow.

Command: python train.py --config fastinst_lite0 --init-from efficientnet-lite0-57934424.pth
Hardware: COCO's schedule needs a GPU; hours unknown, not trained.
Expected AP: not measured.
Table: none, there is no published counterpart.
"""

from sparseinst_jax.configs import fastinst_base, giam_lite0


def get_config():
    """Return the recipe with a small network and images of 320 x 427."""
    config, small = fastinst_base.get_config(), giam_lite0.get_config()
    config.model.backbone = small.model.backbone
    config.model.update(dict(channels=64, num_queries=50, num_heads=4, ffn_width=256))
    for key in ("train_sizes", "train_max_size", "eval_size"):
        config.data[key] = small.data[key]
    return config
