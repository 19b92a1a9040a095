"""SparseInst in JAX and Flax: real-time instance segmentation without boxes or NMS.

`load(RUN)` gives a predictor, `train` and `evaluate` do what the commands do; see README.md. The
names, all of them in `__init__.pyi`, are loaded when they are first asked for: importing this
package starts neither JAX nor a device, and nothing in it changes the process around it but
`prepare_process`, which the command line calls automatically.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
