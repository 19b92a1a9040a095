"""Networks: model families, backbones and the building blocks that they share.

`functional` makes of a network the pure function and the trees that training and inference take.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
