"""The configurations of a checkout, which lie in `configs/` at its root.

A wheel holds that folder as the package `sparseinst_jax.configs`, which Python prefers to this
file: `from sparseinst_jax.configs import giam_r50` is the same everywhere.
"""

from pathlib import Path

__path__ = [str(Path(__file__).parents[1] / "configs")]
