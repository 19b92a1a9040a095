"""FastInst with one decoder layer, ResNet-50, for the 100 classes of ADE20K's instances.

Data: sparseinst import-data ade20k datasets/ADEChallengeData2016
  --output datasets/ADEChallengeData2016/train.json
  --val-output datasets/ADEChallengeData2016/val.json
Command: python train.py --config fastinst_r50_x1_ade20k --init-from fastinst_r50_x1
Hardware: GPUs; hours and memory not measured, not yet trained. Expected AP: not known.
Table: none. The original names the data set and has no recipe: sizes are those of its COCO recipe,
  the steps Mask2Former's, and the rate falls at COCO's shares of them.
"""

from sparseinst_jax.configs import fastinst_base


def get_config():
    """Return the published recipe with other data and fewer steps."""
    config = fastinst_base.get_config()
    for split in ("train", "val"):
        config.data[split].images = "datasets/ADEChallengeData2016/images"
        config.data[split].annotations = f"datasets/ADEChallengeData2016/{split}.json"
    config.train.update(dict(num_steps=160_000, milestones=(142_222, 154_074)))
    return config
