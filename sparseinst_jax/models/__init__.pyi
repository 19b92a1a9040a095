from .backbones.cspdarknet import CSPDarkNet as CSPDarkNet
from .backbones.pvt import PyramidVisionTransformer as PyramidVisionTransformer
from .backbones.resnet import ResNet as ResNet
from .sparseinst.model import SparseInst as SparseInst
from .trees import functional as functional
