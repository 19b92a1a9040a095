"""G-IAM with softmax maps, CSPDarkNet-53.

Command: python train.py --config giam_cspdarknet53
  --init-from cspdarknet53_ra_256-d05c7c21.pth
Hardware: the original used 8 GPUs, batch 64; hours unknown, not yet trained with this code.
Expected AP: 35.1 on val2017; test-dev not published; FPS not published, input 640.
Table: SparseInst model zoo, "SparseInst (G-IAM), CSPDarkNet".
The table says G-IAM; the file released with the weights uses the softmax decoder. Batch norm is
trained: here on statistics of the whole batch, in the original of each GPU.
"""

from ml_collections import ConfigDict

from sparseinst_jax.configs import base


def get_config():
    """Return the recipe with softmax maps and the CSPDarkNet-53 backbone."""
    config = base.get_config()
    config.model.normalizer = "softmax"
    backbone = dict(name="cspdarknet", cross_stage=True, stage_depths=(1, 2, 8, 8, 4), width=32)
    config.model.backbone = ConfigDict(dict(backbone, norm="batch_norm"))
    return config
