"""FastInst with one decoder layer, ResNet-50, for the 8 classes of Cityscapes.

Data: sparseinst import-data cityscapes datasets/cityscapes --output datasets/cityscapes/train.json
  --val-output datasets/cityscapes/val.json
Command: python train.py --config fastinst_r50_x1_cityscapes --init-from fastinst_r50_x1
Hardware: GPUs; hours and memory not measured, not yet trained. Expected AP: not known.
Table: none. The original names the data set and has no recipe: the sizes are those of detectron2's
  Mask R-CNN there, the steps Mask2Former's, and the rate falls at COCO's shares of them.
"""

from sparseinst_jax.configs import fastinst_base


def get_config():
    """Return the recipe on large images."""
    config = fastinst_base.get_config()
    config.data.update(dict(augmentation="flip_resize", train_sizes=tuple(range(800, 1025, 32))))
    config.data.update(dict(train_max_size=2048, eval_size=(1024, 2048)))
    for split in ("train", "val"):
        config.data[split].images = "datasets/cityscapes/leftImg8bit"
        config.data[split].annotations = f"datasets/cityscapes/{split}.json"
    config.train.update(dict(num_steps=90_000, milestones=(80_000, 86_667)))
    return config
