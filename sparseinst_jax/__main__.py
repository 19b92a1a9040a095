"""Run a command: `python -m sparseinst_jax train ...` is `sparseinst train ...`."""

import sys

from sparseinst_jax import cli

if __name__ == "__main__":
    sys.exit(cli.main())
