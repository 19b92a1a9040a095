"""COCO data: index, transforms, plan of batches, loader and the drawn demo data set."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
