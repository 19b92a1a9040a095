"""The model families and the backbones by name; a program outside the package adds its own."""

from __future__ import annotations

from typing import Any

from sparseinst_jax.models.backbones.cspdarknet import CSPDarkNet
from sparseinst_jax.models.backbones.efficientnet_lite import EfficientNetLite
from sparseinst_jax.models.backbones.pvt import PyramidVisionTransformer
from sparseinst_jax.models.backbones.resnet import ResNet
from sparseinst_jax.models.family import Family
from sparseinst_jax.models.fastinst.family import FASTINST
from sparseinst_jax.models.sparseinst.family import SPARSEINST

FAMILIES: dict[str, Family] = {"sparseinst": SPARSEINST, "fastinst": FASTINST}
"""What `config.model.family` may say. Add your own: a `Family`, or `dataclasses.replace` of one."""

BACKBONES: dict[str, Any] = {
    "resnet": ResNet,
    "cspdarknet": CSPDarkNet,
    "pvt": PyramidVisionTransformer,
    "efficientnet_lite": EfficientNetLite,
}
