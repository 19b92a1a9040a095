"""Find objects: `python predict.py --workdir RUN PHOTO`; the same as `sparseinst predict`."""

import sys

from sparseinst_jax import cli

if __name__ == "__main__":
    sys.exit(cli.run("predict"))
