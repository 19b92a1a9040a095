"""Train: `python train.py --config configs/shapes.py`; the same as `sparseinst train`."""

import sys

from sparseinst_jax import cli

# The guard matters: processes that read images import this file again.
if __name__ == "__main__":
    sys.exit(cli.run("train"))
