"""Score: `python eval.py --workdir runs/shapes`; the same as `sparseinst eval`."""

import sys

from sparseinst_jax import cli

if __name__ == "__main__":
    sys.exit(cli.run("eval"))
