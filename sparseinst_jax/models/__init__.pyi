from .backbones.cspdarknet import CSPDarkNet as CSPDarkNet
from .backbones.pvt import PyramidVisionTransformer as PyramidVisionTransformer
from .backbones.resnet import ResNet as ResNet
from .layers import functional as functional
from .sparseinst.model import SparseInst as SparseInst
