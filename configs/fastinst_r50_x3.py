"""FastInst with three decoder layers, ResNet-50.

Command: python train.py --config fastinst_r50_x3 --init-from resnet50-19c8e357.pth
Hardware: the original used 4 V100, batch 16, float16; hours unknown, not yet trained with this
  code.
Expected AP: 37.9 on val2017, 38.6 on test-dev; 35.5 FPS on a V100, input 640; 34 M parameters.
Table: FastInst model zoo, "FastInst-D3, R50".
"""

from sparseinst_jax.configs import fastinst_base


def get_config():
    """Return the recipe with three layers, evaluated at a larger size."""
    config = fastinst_base.get_config()
    config.model.num_layers = 3
    config.data.eval_size = (640, 853)
    return config
